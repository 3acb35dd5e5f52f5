"""What images are trained with: their class, what a text encoder makes of their caption, or the null condition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_method, make_pixart, make_prompts
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_emoji import save_emoji
from test_text import save_encoder

from hcompress.adapter import Adapter
from hcompress.captions import caption_of
from hcompress.errors import DataError
from hcompress.images import ZOO_DATA, Arrays, ImageStream, open_images
from hcompress.models.loading import ZOO
from hcompress.models.prompts import halves
from hcompress.prompts import encode_for
from hcompress.setting import Setting, open_setting

CAPTIONS = ["red apple", "sad robot", None, "sad"]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PixArt with a text encoder in its folder; what is made of captions is kept beside it."""
    monkeypatch.setenv("HCOMPRESS_DATA", str(tmp_path / "data"))
    make_pixart(own=False, channels=1, out_channels=1).network.save_pretrained(tmp_path / "model" / "transformer")
    DPMSolverMultistepScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    save_encoder(tmp_path / "model" / "text_encoder", tmp_path / "model" / "tokenizer")
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, three of them with a caption."""
    (tmp_path / "images").mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.new("L", (8, 8), 10 * number).save(tmp_path / "images" / f"{number}.png")
        if caption:
            (tmp_path / "images" / f"{number}.txt").write_text(f"{caption}\nand what nobody reads\n")
    return tmp_path / "images"


def setting_of(model: Path) -> Setting:
    return open_setting(str(model), "dpm++", 4, 1.5)


def number_of(sample: torch.Tensor) -> int:
    return round((sample.mean().item() + 1) * 12.75)


@settings(max_examples=30, deadline=None)
@given(told=st.lists(st.none() | st.integers(0, 4), min_size=1, max_size=6), chance=st.integers(0, 63))
def test_a_class_is_told_unless_it_is_dropped_or_unknown(
    tiny_dit: Adapter, told: list[int | None], chance: int
) -> None:
    dropped = chance >> np.arange(len(told)) & 1 == 1
    labels = tiny_dit.image_condition(told, dropped, np.random.default_rng(0))["labels"].tolist()
    null = tiny_dit.num_classes
    assert labels == [null if drop or one is None else one for one, drop in zip(told, dropped, strict=True)]


@settings(max_examples=30, deadline=None)
@given(told=st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=6), chance=st.integers(0, 63))
def test_a_prompt_is_told_unless_it_is_dropped_or_unknown(
    tiny_pixart: Adapter, told: list[int | None], chance: int
) -> None:
    prompts = make_prompts(4, seed=7)
    if not any(one is not None for one in told):
        prompts |= {name: array for name, array in make_prompts(3).items() if "null" in name}  # then it is its own
    rows = [None if one is None else {name: array[one % len(array)] for name, array in prompts.items()} for one in told]
    dropped = chance >> np.arange(len(told)) & 1 == 1
    condition = tiny_pixart.image_condition(rows, dropped, np.random.default_rng(0))
    assert condition.keys() == {"prompt_embeds", "prompt_mask"}
    for name, tensor in condition.items():
        null = prompts[name.replace("prompt", "null")][0]
        wanted = [null if drop or one is None else prompts[name][one] for one, drop in zip(told, dropped, strict=True)]
        assert np.array_equal(tensor.numpy(), np.stack(wanted))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_text_model_trains_on_captions_but_for_the_dropped_ones(tiny_pixart: Adapter, dropout: float) -> None:
    """Learning-to-Cache, from the source of images to what its network is given."""
    prompts = make_prompts(4, seed=7)
    captions = {f"{row}": {name: array[row % len(array)] for name, array in prompts.items()} for row in range(4)}
    pixels = np.zeros((4, *tiny_pixart.sample_shape), np.uint8) + 60 * np.arange(4, dtype=np.uint8)[:, None, None, None]
    stream = ImageStream(Arrays(pixels, [*captions]), 3, None, torch.device("cpu"), captions=captions)
    method: Any = make_method(
        "learning-to-cache", tiny_pixart, {"beta": 0.3, "batch": 200, "label_dropout": dropout}, solver="dpm++"
    )
    method.images = stream
    told = method.images_at(0, 0)[1]["prompt_embeds"].numpy()
    shown = np.round((stream.batch(0, 200, flip=False)[0].mean(dim=(1, 2, 3)).numpy() + 1) * 127.5).astype(int) // 60
    null = (told == prompts["null_embeds"][0]).all(axis=(1, 2))
    assert np.array_equal(told[~null], prompts["prompt_embeds"][shown[~null]])
    assert abs(null.mean() - dropout) <= 0.15  # four standard deviations of 200 draws


def test_captions_lie_beside_the_pictures_of_a_folder_and_are_read_once(model: Path, folder: Path) -> None:
    said: list[str] = []
    stream = open_images(setting_of(model), 0, str(folder), said.append)
    assert said[0].startswith("reading 3 captions with the text encoder, once: kept at ")
    assert said[1:] == ["1 of 4 images have no caption (NAME.txt): they train the null prompt"]
    wanted = encode_for(str(model), [caption or "" for caption in CAPTIONS]).tensors()
    samples, told = stream.batch(0, 8, flip=False)
    for sample, one in zip(samples, told, strict=True):
        number = number_of(sample)
        for name, array in one.items():
            row = wanted[name][number % len(wanted[name])]  # of picture 2 the null prompt, which is the empty one
            # float16, of 11 bits; a batch of other prompts sums in another order
            np.testing.assert_allclose(array.astype(np.float32), row, rtol=2**-10, atol=1e-4)
    said.clear()
    again = open_images(setting_of(model), 0, str(folder), said.append).batch(0, 8, flip=False)[1]
    assert len(said) == 1 and all(np.array_equal(one[name], other[name])
                                  for one, other in zip(told, again, strict=True) for name in one)  # fmt: skip
    (folder / "2.txt").write_text("apple")
    said.clear()
    open_images(setting_of(model), 0, str(folder), said.append)
    assert len(said) == 1 and said[0].startswith("reading 4 captions")


def test_a_model_without_prompts_of_its_own_is_shown_pictures_without_captions(model: Path, folder: Path) -> None:
    for number in (0, 1):
        (folder / f"{number}.txt").unlink()
    setting = setting_of(model)
    stream = open_images(setting, 0, str(folder))
    null = encode_for(str(model), ["sad"]).tensors()["null_embeds"][0].astype(np.float16)
    for first in range(4):
        samples, told = stream.batch(first, 1, flip=False)
        condition = setting.adapter.image_condition(told, np.zeros(1, np.bool_), np.random.default_rng(0))
        is_null = np.array_equal(condition["prompt_embeds"][0].numpy(), null)
        assert is_null == (number_of(samples[0]) != 3)


def test_without_captions_no_encoder_is_needed_and_with_them_one_is(model: Path, folder: Path) -> None:
    (model / "text_encoder").rename(model / "elsewhere")
    with pytest.raises(DataError, match="without a text encoder to read captions with; copy text_encoder") as error:
        open_images(setting_of(model), 0, str(folder))
    assert "\n" not in str(error.value)
    for file in folder.glob("*.txt"):
        file.unlink()
    said: list[str] = []
    assert open_images(setting_of(model), 0, str(folder), said.append).batch(0, 2, flip=False)[1] == [None, None]
    assert said == ["4 of 4 images have no caption (NAME.txt): they train the null prompt"]


def test_what_is_no_caption_is_refused_in_one_line(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "0.txt").write_text("")
    assert caption_of(folder / "0.png") is None
    open_images(setting_of(model), 0, str(folder))
    (kept,) = (tmp_path / "data" / "captions").iterdir()
    kept.write_bytes(kept.read_bytes()[:40])
    with pytest.raises(DataError, match="delete it, and captions are encoded again"):
        open_images(setting_of(model), 0, str(folder))
    (folder / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"0\.txt cannot be read .*store it as UTF-8") as error:
        open_images(setting_of(model), 0, str(folder))
    assert "\n" not in str(error.value)


def test_emoji_come_with_their_captions_but_for_those_that_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCOMPRESS_DATA", str(tmp_path))
    save_emoji(tmp_path)
    before = ZOO_DATA["zoo:emoji-pixart"]()
    prompts = (ZOO / "emoji-pixart" / "prompts.txt").read_text("utf-8").splitlines()
    arrays = dict(np.load(tmp_path / "emoji.npz"))
    learning, scoring = halves(len(prompts))
    shown = [int(np.flatnonzero(arrays["captions"] == before.labels[at])[0]) for at in range(2)]
    captions = arrays["captions"].astype(object)
    captions[shown] = prompts[learning[0]], prompts[scoring[0]]
    np.savez(tmp_path / "emoji.npz", **arrays | {"captions": captions.astype(str)})
    after = ZOO_DATA["zoo:emoji-pixart"]()
    assert len(after) == len(before) - 1 and after.labels == [prompts[learning[0]], *before.labels[2:]]
