"""From text to embeddings: a tiny encoder of transformers' own, the verb, and every way in which the two do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_dit, make_pixart, make_sd3
from diffusers import DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import BertConfig, BertModel, BertTokenizerFast, T5Config, T5EncoderModel
from transformers.utils import logging

from hcompress.errors import InputError
from hcompress.models.loading import load_model
from hcompress.prompts import words_of, write_prompts
from hcompress.prompts_file import Encoded
from hcompress.text_encoder import BATCH, TextEncoder
from hcompress.zoo import data_folder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "sad", "apple", "robot"]
WIDTH = 10  # of conftest's PixArt, which reads 5 tokens


def save_encoder(folder: Path, tokenizer: Path | None = None, *, width: int = WIDTH, t5: bool = False) -> Path:
    """A random encoder in `folder`, its tokenizer beside it unless `tokenizer` says where."""
    torch.manual_seed(0)
    logging.disable_progress_bar()  # of saving: it would be among what a command is expected to print
    if t5:
        small = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        T5EncoderModel(T5Config(vocab_size=len(WORDS), **small)).save_pretrained(folder)
    else:
        sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(tokenizer or folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt with a text encoder in its folder, as diffusers lays them out."""
    folder = tmp_path_factory.mktemp("model")
    make_pixart(own=False, channels=1, out_channels=1).network.save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')  # which reads 120 tokens
    save_encoder(folder / "text_encoder", folder / "tokenizer")
    return folder


@pytest.mark.parametrize("t5", [False, True])
def test_states_are_the_encoders_own_and_padding_changes_none(tmp_path: Path, t5: bool) -> None:
    reader = TextEncoder(save_encoder(tmp_path, t5=t5))
    prompts = ["red apple", "sad", "sad red robot"]
    states, mask = reader.states(prompts, 6)
    assert states.shape == (3, 6, WIDTH) and mask.sum(axis=1).tolist() == reader.lengths(prompts) == [4, 3, 5]
    assert not states[~mask].any()
    for prompt, row, counts in zip(prompts, states, mask, strict=True):
        ids = reader.tokenizer(prompt, return_tensors="pt")["input_ids"]
        alone = reader.model(input_ids=ids).last_hidden_state[0].numpy()
        np.testing.assert_allclose(row[counts], alone, atol=1e-5)  # float32; masked scores are -3e38, exp is 0


def test_the_null_prompt_is_empty_unless_one_is_given(encoder: Path) -> None:
    reader = TextEncoder(encoder)
    plain, led = (Encoded(reader, ["red apple"], 5, *negative).tensors() for negative in ((), ("sad",)))
    assert plain["null_mask"].sum() == 2 and led["null_mask"].sum() == 3  # with [CLS] and [SEP]
    assert np.array_equal(led["null_embeds"], Encoded(reader, ["sad"], 5).tensors()["prompt_embeds"])
    assert np.array_equal(plain["prompt_embeds"], led["prompt_embeds"])
    with pytest.raises(InputError, match="no prompts"):
        Encoded(reader, [], 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_written_in_batches_is_what_is_in_memory(encoder: Path, tmp_path: Path, dtype: type) -> None:
    """As safetensors itself would write it, for its own reader."""
    told: list[int] = []
    prompts = ["red apple", "sad robot"] * BATCH
    encoded = Encoded(TextEncoder(encoder), prompts, 7, "sad", dtype, told.append)
    write_prompts(tmp_path / "written.safetensors", encoded)
    assert told == [BATCH, 2 * BATCH]
    written, tensors = load_file(tmp_path / "written.safetensors"), encoded.tensors()
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and np.array_equal(written[name], tensor)
    with safe_open(tmp_path / "written.safetensors", "numpy") as opened:
        assert json.loads(opened.metadata()["prompts"]) == prompts


def test_from_text_to_a_picture(hcompress: Any, model: Path, tmp_path: Path) -> None:
    """With the model's own encoder; and with the same one named, for the bundle, whose model has moved."""
    out = tmp_path / "asked.safetensors"
    done = json.loads(hcompress("encode", model, "red apple", "sad robot", "--out", out, "--json")[1])
    with safe_open(out, "numpy") as opened:
        assert json.loads(opened.metadata()["prompts"]) == ["red apple", "sad robot"]
    assert done == {"out": str(out), "prompts": 2, "tokens": 120}
    flags = ("--solver", "dpm++", "--steps", 2, "--prompts", out, "--out")
    assert hcompress("generate", model, *flags, tmp_path / "model.png")[0] == 0

    bundle = tmp_path / "bundle"
    assert hcompress("export", model, "--dense", "--solver", "dpm++", "--steps", 2, "--out", bundle)[0] == 0
    moved = model.rename(tmp_path / "moved")
    named = ("--encoder", moved, "--out", tmp_path / "bundle.safetensors")
    assert hcompress("encode", bundle, "red apple", "sad robot", *named)[0] == 0
    moved.rename(model)
    first, second = load_file(out), load_file(tmp_path / "bundle.safetensors")
    assert all(np.array_equal(first[name], second[name]) for name in first) and first.keys() == second.keys()
    prompts = ("--prompts", tmp_path / "bundle.safetensors", "--out", tmp_path / "bundle.png")
    assert hcompress("generate", bundle, *prompts)[0] == 0


def test_captions_become_what_a_model_trains_on(hcompress: Any, model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    run = ("train", own, "--method", "random", "--target-cur", 0.3, "--solver", "dpm++")
    run = (*run, "--steps", 3, "--reuse", "corrected", "--set", "caching.fit_samples=8", "--set", "caching.fit_steps=0")
    run = (*run, "--out", tmp_path / "run")
    code, _, err = hcompress(*run)
    assert code == 1 and "hcompress encode MODEL --from CAPTIONS.txt --for-training" in err
    captions = tmp_path / "captions.txt"
    captions.write_text("red apple\n\n  sad robot \nred robot\n")
    asked = ("encode", own, "--from", captions, "--for-training")
    made = Path(hcompress(*asked)[1].strip())
    assert (own / "prompts.txt").read_text() == "red apple\nsad robot\nred robot\n"
    assert words_of(load_model(str(own)), 4) == ["red apple", "sad robot", "red robot", "red apple"]
    kept, alone = load_file(made), Encoded(TextEncoder(model), ["red apple", "sad robot", "red robot"], 120).tensors()
    assert made == own / "prompts.safetensors" and kept["prompt_embeds"].dtype == np.float16
    np.testing.assert_allclose(kept["prompt_embeds"], alone["prompt_embeds"], atol=2e-3)  # fp16, values of a few
    assert hcompress(*run, "--resume")[0] == 0
    code, _, err = hcompress(*asked)
    assert code == 1 and "is there already; delete it to have others" in err


def test_what_does_not_fit_is_one_line(hcompress: Any, model: Path, encoder: Path, tmp_path: Path) -> None:
    make_dit().network.save_pretrained(tmp_path / "dit" / "transformer")
    make_pixart().network.save_pretrained(tmp_path / "bare" / "transformer")
    make_sd3().network.save_pretrained(tmp_path / "sd3" / "transformer")
    for name in ("dit", "bare", "sd3"):
        DPMSolverMultistepScheduler().save_pretrained(tmp_path / name / "scheduler")
    wide = save_encoder(tmp_path / "wide", width=12)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    out, empty = tmp_path / "no.safetensors", tmp_path / "empty.txt"
    empty.write_text(" \n")
    for arguments, line in (
        ((tmp_path / "dit", "red"), "takes no text; it is conditioned on labels"),
        ((tmp_path / "sd3", "red"), "takes pooled_prompt_embeds too, of several text encoders"),
        ((tmp_path / "bare", "red"), "comes without a text encoder; pass one as --encoder FOLDER"),
        ((tmp_path / "bare", "red", "--encoder", tmp_path), "no text encoder in"),
        ((tmp_path / "bare", "red", "--encoder", tmp_path / "broken"), "cannot be loaded"),
        ((tmp_path / "bare", "red", "--encoder", wide), "gives 12 numbers a token, but"),
        ((model, "red " * 119), "has 121 tokens, but"),
        ((model, "red", "--negative", "sad " * 119), "shorten it"),
        ((model,), "say what to encode"),
        ((model, "--from", out), "cannot be read as a text file of prompts"),
        ((model, "--from", empty), "holds no prompts; write one a line"),
        ((model, "red", "--from", empty), "not both"),
        ((model, "red", "--for-training"), "say where to"),
    ):
        code, _, err = hcompress("encode", *arguments, "--out", out)
        assert code == 1 and line in err and err.count("\n") == 1 and not out.exists(), err
    code, _, err = hcompress("encode", "zoo:emoji-pixart", "red", "--for-training")
    assert code == 1 and "--for-training is for a MODEL of yours" in err


def test_the_zoos_encoder_is_fetched_by_a_verb_that_the_error_names(
    hcompress: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HCOMPRESS_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    code, _, err = hcompress("encode", "zoo:emoji-pixart", "red apple", "--out", tmp_path / "no.safetensors")
    assert code == 1 and "get it with `hcompress zoo fetch-data minilm`" in err and err.count("\n") == 1
