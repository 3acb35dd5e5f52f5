"""A latent model's bundle makes pictures: its VAE decoder travels along."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CALLS, CFG, make_dit, make_table, random_mask, save_vae
from diffusers import DDIMScheduler
from PIL import Image

from hcompress.adapter import Adapter
from hcompress.cli.main import main
from hcompress.errors import ModelError
from hcompress.models.decoder import load_decoder
from hcompress_export.bundle import export_bundle
from hcompress_export.parity import prove
from hcompress_runtime import Runtime

LABELS = [0, 3, 1]


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, float)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return make_dit(channels=4)


@pytest.fixture(scope="module")
def model(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny latent model: 4 x 8 x 8 latents, 3 x 16 x 16 pictures."""
    folder = tmp_path_factory.mktemp("latent")
    adapter.network.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    save_vae(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(adapter: Adapter, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    table, solver = make_table("ddim")
    identity = adapter.identity(str(model), solver, CFG)
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    mask = random_mask(CALLS, len(adapter.graph))
    from hcompress.schedule import Schedule

    schedule = Schedule(mask, adapter.graph.names, identity, {"name": "random"})
    decoder = load_decoder(model)
    export_bundle(
        adapter,
        table,
        identity,
        out,
        cfg=CFG,
        schedule=schedule,
        decoder=decoder,
        inspect=lambda folder: prove(adapter, folder, mask),
    )
    return out


def test_pictures_are_those_of_the_vae(model: Path, bundle: Path) -> None:
    decoder = load_decoder(model)
    with Runtime(bundle) as runtime:
        latents = runtime.generate(LABELS, seed=1)
        pictures = runtime.pictures(latents)
    with torch.no_grad():
        want = decoder(torch.from_numpy(latents)).numpy()
    assert pictures.shape == (3, 3, 16, 16) and np.std(want) > 0.01
    assert np.abs(pictures - want).max() <= 1e-5 * np.abs(want).max()  # float32 rounding over some ten convolutions


def test_the_decoder_is_loaded_when_a_picture_is_asked_for(bundle: Path) -> None:
    with Runtime(bundle) as runtime:
        latents = runtime.generate(LABELS)
        assert runtime._decoder is None
        runtime.pictures(latents)
        assert runtime._decoder is not None


def test_generate_gives_a_coloured_picture_from_bundle_and_model(
    bundle: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = ["--schedule", bundle / "schedule.safetensors"]
    for source, more, out in ((bundle, [], "one.png"), (model, schedule, "other.png")):
        arguments = ["generate", source, "--labels", "0,1", "--out", tmp_path / out, *more]
        monkeypatch.setattr(sys, "argv", ["hcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
    one, other = picture(tmp_path / "one.png"), picture(tmp_path / "other.png")
    assert one.shape == (16, 2 * 16 + 2, 3)
    assert np.abs(one - other).max() <= 1  # one level, where a value lies between two
    assert picture(bundle / "preview.png").shape == (16, 5 * 16 + 4 * 2, 3)


def test_a_broken_vae_is_one_line(model: Path, tmp_path: Path) -> None:
    assert load_decoder(tmp_path) is None
    (tmp_path / "vae").mkdir()
    with pytest.raises(ModelError, match=r"the VAE in .* cannot be read \(.*download or copy it again"):
        load_decoder(tmp_path)
