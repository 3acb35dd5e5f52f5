"""What is measured of samples: pictures as pictures, latents as what their VAE makes of them, and by which metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALLS, CFG, make_dit, random_mask, save_vae
from diffusers import DDIMScheduler
from PIL import Image

from hcompress.adapter import Adapter
from hcompress.device import checked_device
from hcompress.errors import DataError, InputError
from hcompress.metrics import emoji, fashion
from hcompress.metrics.clip_score import Clip
from hcompress.metrics.inception import Inception
from hcompress.metrics.paired import psnr_db, relative_l2, ssim
from hcompress.models.decoder import load_decoder
from hcompress.report.published import viewer_of
from hcompress.report.quality import DECODED, distribution, left_out, paired
from hcompress.schedule import Schedule
from hcompress.setting import Setting, open_setting
from hcompress.zoo import emoji_clip


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


@pytest.mark.parametrize(
    ("model", "what", "metrics"),
    [
        (
            "zoo:fashion-dit",
            fashion,
            lambda n: fashion.fashion_metrics(torch.zeros(n, 1, 28, 28), torch.zeros(n).int()),
        ),
        (
            "zoo:emoji-pixart",
            emoji,
            lambda n: emoji.emoji_metrics(torch.zeros(n, 3, 32, 32), torch.zeros(n, 4, 384), torch.ones(n, 4)),
        ),
    ],
)
def test_numbers_of_samples_that_a_metric_refuses_are_known_beforehand(model: str, what: Any, metrics: Any) -> None:
    setting = open_setting(model, "ddim", CALLS, CFG)
    if what is emoji and not emoji_clip.installed():
        assert "pip install 'hcompress[zoo]'" in (left_out(setting, what.MIN_SAMPLES) or "")
        return
    assert left_out(setting, what.MIN_SAMPLES) is left_out(setting, what.MAX_SAMPLES) is None
    for count in (1, what.MIN_SAMPLES - 1, what.MAX_SAMPLES + 1):
        with pytest.raises(DataError) as refused:
            metrics(count)
        told = left_out(setting, count) or ""
        assert f"need {what.MIN_SAMPLES} to {what.MAX_SAMPLES} samples" in told and f"got {count}" in told
        assert told.partition("need ")[2].partition(",")[0] in str(refused.value)
        assert distribution(setting, torch.zeros(count, 1)) == {}


def test_eval_of_few_samples_says_what_it_leaves_out_and_gives_the_rest(hcompress: Any) -> None:
    code, stdout, told = hcompress("eval", "zoo:fashion-dit", "--steps", 2, "--samples", 4, "--json")
    figures = json.loads(stdout)["uncached"]
    assert code == 0 and "fd64" not in figures and figures["macs"] > 0
    assert told.strip() == "fashion metrics are left out: they need 65 to 5000 samples, got 4"


def test_eval_refuses_options_that_would_do_nothing(hcompress: Any, models: dict[str, Path], tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    judged = (tmp_path, "--prompts", tmp_path / "one.png")
    sampling = {"--solver": "ddim", "--steps": 3, "--cfg": 0, "--samples": 3, "--seed": 0, "--reuse": "taylor"}
    wrong = {
        **{(*judged, option, value): option for option, value in sampling.items()},
        (*judged, "--inception", "file"): "--inception",
        (models["pictures"], "--reuse", "taylor"): "--reuse",
        (models["pictures"], "--inception", "file"): "--inception",
        (models["pictures"], "--size", 8): "--size",
        (tmp_path, "--reference", tmp_path, "--clip", "folder"): "--clip",
    }
    for arguments, option in wrong.items():
        code, stdout, told = hcompress("eval", *arguments)
        assert code == 1 and not stdout and told.startswith(f"error: {option} would do nothing: "), told
        assert len(told.splitlines()) == 1


@pytest.mark.parametrize("option", ["--samples", "--steps"])
@pytest.mark.parametrize("number", [0, -3])
def test_eval_takes_no_number_below_one(hcompress: Any, models: dict[str, Path], option: str, number: int) -> None:
    code, _, told = hcompress("eval", models["pictures"], option, number)
    assert code == 2 and option in told


def test_no_guidance_is_a_guidance_too(hcompress: Any, models: dict[str, Path], tmp_path: Path) -> None:
    """A schedule of guidance 0 is evaluated at 0, and so is one that is asked to be."""
    setting, file = open_setting(str(models["pictures"]), "ddim", CALLS, 0.0), tmp_path / "schedule.safetensors"
    graph = setting.adapter.graph
    Schedule(random_mask(CALLS, len(graph)), graph.names, setting.identity, {"name": "random"}).save(file)
    ask = ("--schedule", file)
    shown = [
        hcompress("eval", models["pictures"], *ask, "--samples", 3, "--json", *more)[1]
        for more in ((), ("--cfg", 0), ("--cfg", 1))
    ]
    assert shown[0] == shown[1] != shown[2]
    for name, more in {"own": (), "asked": ("--cfg", 0), "other": ("--cfg", 1.5)}.items():
        picture = (*ask, "--labels", "0,1", "--out", tmp_path / f"{name}.png")
        assert hcompress("generate", models["pictures"], *picture, *more)[0] == 0
    drawn = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("own", "asked", "other")}
    assert drawn["own"] == drawn["asked"] != drawn["other"]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "CPU", "cuda:99", "cuda"])
def test_a_device_that_is_not_there_is_one_line_wherever_it_is_asked_for(name: str, models: dict[str, Path]) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for load in (
        lambda: open_setting(str(models["pictures"]), "ddim", CALLS, CFG, device=name),
        lambda: Inception(models["pictures"], name),
        lambda: Clip(str(models["pictures"]), name),
    ):
        with pytest.raises(InputError, match=r"pass --device cpu|there is no cuda:99: \d+ CUDA devices") as refused:
            load()
        assert "\n" not in str(refused.value)
    assert checked_device("cpu") == torch.device("cpu")


def test_latents_without_their_vae_are_refused_before_they_are_made(models: dict[str, Path]) -> None:
    for kind, channels in {"pictures": 1, "latents": 3}.items():
        setting = opened(models[kind])
        assert viewer_of(setting)(draw(setting, 1, 0)).shape[1] == channels
    with pytest.raises(DataError, match=r"makes latents of 4 channels and .*bare/vae is missing.* download the VAE"):
        viewer_of(opened(models["bare latents"]))
