"""What is measured of samples: pictures as pictures, latents as what their VAE makes of them, and by which metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALLS, CFG, make_dit, random_mask, save_vae
from diffusers import DDIMScheduler

from hcompress.adapter import Adapter
from hcompress.metrics.paired import psnr_db, relative_l2, ssim
from hcompress.models.decoder import load_decoder
from hcompress.report.quality import DECODED, paired
from hcompress.schedule import Schedule
from hcompress.setting import Setting, open_setting


def save(adapter: Adapter, folder: Path, *, vae: bool = False) -> Path:
    """`adapter` as a diffusers folder."""
    adapter.network.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    if vae:
        save_vae(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a model of pictures, and of one of latents with and without its VAE."""
    folder = tmp_path_factory.mktemp("models")
    latent = make_dit(channels=4)
    return {
        "pictures": save(make_dit(channels=1), folder / "pictures"),
        "latents": save(latent, folder / "latents", vae=True),
        "bare latents": save(latent, folder / "bare"),
    }


def opened(model: Path) -> Setting:
    return open_setting(str(model), "ddim", CALLS, CFG)


def draw(setting: Setting, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, *setting.adapter.sample_shape, generator=torch.Generator().manual_seed(seed))


def test_latents_are_compared_as_the_pictures_that_they_decode_to(models: dict[str, Path]) -> None:
    """In whatever batches: the mean over one more sample than is decoded at once."""
    setting, decoder = opened(models["latents"]), load_decoder(models["latents"])
    reference = draw(setting, DECODED + 1, 0)
    samples = reference + 0.3 * draw(setting, DECODED + 1, 1)
    with torch.no_grad():
        ours, theirs = (decoder(one).clamp(-1, 1) for one in (samples, reference))
    figures = paired(setting, samples, reference)
    # float32 convolutions over batches of another size
    assert figures["psnr_db"] == pytest.approx(psnr_db(ours, theirs), rel=1e-4)
    assert figures["ssim"] == pytest.approx(ssim(ours, theirs), rel=1e-4)
    assert figures["relative_l2"] == relative_l2(samples, reference)


def test_an_error_of_latents_beyond_one_counts(models: dict[str, Path]) -> None:
    setting = opened(models["latents"])
    reference = 1.5 + draw(setting, 3, 0).abs()
    assert paired(setting, reference + 2, reference)["psnr_db"] < 60 < paired(setting, reference, reference)["psnr_db"]


@pytest.mark.parametrize("kind", ["pictures", "bare latents"])
def test_what_has_no_range_has_no_psnr(models: dict[str, Path], kind: str) -> None:
    """Pictures have one, [-1, 1], and are compared as they would be saved."""
    setting = opened(models[kind])
    reference = draw(setting, 3, 0)
    samples = reference + 0.3 * draw(setting, 3, 1)
    figures = paired(setting, samples, reference)
    assert figures.pop("relative_l2") == relative_l2(samples, reference)
    expected = {"psnr_db": psnr_db(samples.clamp(-1, 1), reference.clamp(-1, 1))} if kind == "pictures" else {}
    assert figures == pytest.approx(expected)  # 8 x 8: too small for SSIM


@pytest.mark.parametrize("kind", ["pictures", "latents", "bare latents"])
def test_eval_prints_what_there_is(hcompress: Any, models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    setting, file = opened(models[kind]), tmp_path / "schedule.safetensors"
    graph = setting.adapter.graph
    Schedule(random_mask(CALLS, len(graph)), graph.names, setting.identity, {"name": "random"}).save(file)
    ask = ("eval", models[kind], "--schedule", file, "--samples", 3)
    code, stdout, _ = hcompress(*ask, "--json")
    figures = json.loads(stdout)
    assert code == 0 and ("psnr_db" in figures, "ssim" in figures) == (kind != "bare latents", kind == "latents")
    code, table, _ = hcompress(*ask)
    assert code == 0 and "relative_l2" in table
    assert ("psnr_db" in table) == (kind != "bare latents") and "fd64" not in table


def test_bare_latents_are_quantized_and_what_there_is_is_shown(
    hcompress: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    options = ("--method", "int8-max", "--set", "quant.samples=1", "--samples", 2, "--steps", CALLS)
    code, table, _ = hcompress("quantize", models["bare latents"], *options, "--out", tmp_path / "out")
    assert code == 0 and "relative_l2" in table and "psnr_db" not in table
