"""Text for a named model or bundle: which text encoder reads it, whether it fits, and the prompts of a model's own.

A model's encoder is the one in its own folder, where diffusers puts it, or on the hub beside it. `zoo:emoji-pixart`
reads with MiniLM, which is ten times its size and does not ship: `hcompress zoo fetch-data minilm` fetches it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote

import numpy as np
from numpy.typing import DTypeLike
from safetensors import safe_open

from hcompress.errors import InputError, ModelError
from hcompress.models.loading import Model, fetch_text_encoder, is_hub_id, load_model
from hcompress.models.prompts import ENCODED, FILE, scored
from hcompress.prompts_file import Encoded
from hcompress.text_encoder import TextEncoder
from hcompress.zoo import data_folder
from hcompress_runtime.conditions import Input
from hcompress_runtime.files import write_atomically

MINILM_MODELS = ("zoo:emoji-pixart",)
WORDS = "prompts"  # in the metadata of a prompts file: what its rows say, a JSON list
TEXT = "prompts.txt"  # beside FILE: the same for people, and for files without WORDS, a line each
QUOTED = 60  # characters of a prompt, in an error


def encode_for(
    source: str,
    prompts: Sequence[str],
    *,
    negative: str = "",
    encoder: Path | None = None,
    device: str = "cpu",
    dtype: DTypeLike = np.float32,
    on_batch: Callable[[int], object] = lambda done: None,
) -> Encoded:
    """A prompts file for SOURCE, a bundle or a model, in the making.

    device, dtype: where the encoder runs, in float32, and what its states are stored in
    on_batch:      told how many prompts are done

    Raises InputError for a model that takes no text, or more than states and mask, for an encoder of another width and
    for a prompt that is too long; ModelError where there is no encoder.
    """
    inputs, name, folder = _open(source)
    if "prompt_embeds" not in inputs:
        raise InputError(f"{source} takes no text; it is conditioned on {', '.join(inputs)}")
    if more := {name for name in inputs if name.endswith("prompt_embeds")} - ENCODED:
        raise InputError(
            f"{source} takes {' and '.join(more)} too, of several text encoders: write the file from what diffusers' "
            "encode_prompt gives, see export/FORMAT.md"
        )
    tokens, width = inputs["prompt_embeds"].shape
    reader = TextEncoder(encoder or _encoder_of(name, folder), device)
    if reader.width != width:
        raise InputError(
            f"this text encoder gives {reader.width} numbers a token, but {source} takes {width}; "
            "pass the one that the model was trained with as --encoder FOLDER"
        )
    for prompt, length in zip((*prompts, negative), reader.lengths([*prompts, negative]), strict=True):
        if length > tokens:
            said = repr(prompt[:QUOTED]) + (" ..." if len(prompt) > QUOTED else "")
            raise InputError(f"prompt {said} has {length} tokens, but {source} reads {tokens}; shorten it")
    return Encoded(reader, prompts, tokens, negative, dtype, on_batch)


def read_captions(file: Path) -> list[str]:
    """The lines of a text file that are not blank, a prompt each. Raises InputError where there are none."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a text file of prompts ({error}); one a line, UTF-8") from error
    if not any(lines):
        raise InputError(f"{file} holds no prompts; write one a line")
    return [line for line in lines if line]


def write_prompts(file: Path, encoded: Encoded) -> None:
    """A prompts file that keeps the words beside what the encoder made of them."""
    write_atomically(file, lambda opened: encoded.write(opened, words_kept(encoded.prompts)))


def words_kept(prompts: Sequence[str]) -> dict[str, str]:
    """The metadata of a prompts file."""
    return {WORDS: json.dumps([*prompts])}


def folder_for_own(source: str) -> Path:
    """Where the prompts of SOURCE's own belong, which has none yet.

    Raises InputError for what has no folder that is the user's, and for one that has prompts.
    """
    if source.startswith(("zoo:", "random:")) or (Path(source) / "manifest.json").is_file():
        raise InputError(f"--for-training is for a MODEL of yours, and {source} is none; pass --out FILE")
    folder = load_model(source).folder
    if (folder / FILE).exists():
        raise InputError(f"{folder / FILE} is there already; delete it to have others")
    return folder


def keep_own(folder: Path, encoded: Encoded) -> Path:
    """Make these prompts those of the model in `folder`: FILE, which training and scoring draw from, and TEXT."""
    write_atomically(folder / TEXT, "".join(f"{prompt}\n" for prompt in encoded.prompts).encode())
    write_prompts(folder / FILE, encoded)
    return folder / FILE


def words_of(model: Model, count: int) -> list[str]:
    """What each of `count` samples is asked to show, in the order of `even_conditions`.

    Raises InputError for a model that is not asked in words, ModelError where it has no prompts, or their words were
    not kept.
    """
    if "prompt_embeds" not in (told := model.adapter.conditions):
        raise InputError(f"CLIP compares pictures with text; {model.name} takes {', '.join(told)}, so leave out --clip")
    model.adapter.even_conditions(1)  # refuses a model without prompts
    if not (file := model.folder / FILE).is_file():
        raise InputError(f"CLIP compares pictures with text; prompts of {model.name} are noise, so leave out --clip")
    words, rows = _kept_words(file)
    if len(words) != rows:
        raise ModelError(
            f"CLIP needs the words of the {rows} prompts in {file}, and {len(words) or 'none'} are kept: write them "
            f"into {file.with_name(TEXT)}, a line each, or delete {FILE} there and encode the captions again: "
            f"hcompress encode {quote(model.name)} --from CAPTIONS.txt --for-training"
        )
    return [words[row] for row in scored(rows, count)]


def _kept_words(file: Path) -> tuple[list[str], int]:
    """What a model's own prompts say, [] where that was not kept, and how many they are."""
    with safe_open(file, "numpy") as opened:
        kept = (opened.metadata() or {}).get(WORDS)
        rows = opened.get_slice("prompt_embeds").get_shape()[0]
    try:
        words = json.loads(kept) if kept else file.with_name(TEXT).read_text("utf-8").splitlines()
    except (OSError, ValueError):  # absent, or not of ours
        words = []
    return words, rows


def _open(source: str) -> tuple[Mapping[str, Input], str, Path]:
    """What SOURCE is told of a sample, the name of its model, and the model's folder."""
    if (Path(source) / "manifest.json").is_file():
        from hcompress_runtime.bundle import open_bundle

        bundle = open_bundle(Path(source))
        name = str(bundle.manifest["identity"]["model"])
        return bundle.conditions, name, Path(name)
    model = load_model(source)
    return model.adapter.conditions, source, model.folder


def _encoder_of(name: str, folder: Path) -> Path:
    """The folder of the model's own text encoder, fetched from the hub where the model came from there."""
    if (folder / "text_encoder").is_dir():
        return folder
    if is_hub_id(name):
        folder = fetch_text_encoder(name)
        if (folder / "text_encoder").is_dir():
            return folder
    if name not in MINILM_MODELS:
        raise ModelError(f"{name} comes without a text encoder; pass one as --encoder FOLDER (config.json, tokenizer)")
    minilm = data_folder() / "minilm"
    if not (minilm / "config.json").is_file():
        raise ModelError(
            f"{name} reads text with MiniLM, which is not at {minilm}; get it with `hcompress zoo fetch-data minilm`"
        )
    return minilm
