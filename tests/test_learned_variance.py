"""IDDPM: a solver whose noise is scaled by the model itself, from the scheduler to the bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import CALLS, CFG, Exported, export, make_dit, make_pixart, make_table, random_mask
from diffusers import DDPMScheduler

from hcompress.caching.harmonica import Training
from hcompress.caching.problem import Problem
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.errors import SolverError
from hcompress.sampling import constants_of, sample, sample_seeded, solver_noises, start_noise
from hcompress_export.parity import drifts
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import open_bundle
from hcompress_runtime.kernels import executed

LABELS = [0, 3, 4]


def adapter_of(family: str):
    """With a guessed variance of the size that trained models give: anything from -1 to 1."""
    adapter = {"dit": make_dit, "pixart": make_pixart}[family](out_channels=4)
    last = adapter.network.proj_out_2 if family == "dit" else adapter.network.proj_out
    with torch.no_grad():
        last.weight.reshape(-1, 4, last.in_features)[:, 2:] *= 20  # [patch pixels, channels, width]
    return adapter


@pytest.fixture(scope="module", params=["dit", "pixart"])
def adapter(request):
    return adapter_of(request.param)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Exported:
    adapter = adapter_of("dit")
    mask = random_mask(CALLS, len(adapter.graph))
    return export(tmp_path_factory.mktemp("iddpm") / "bundle", adapter, mask, solver="iddpm")


def test_the_kernels_of_every_call_can_be_named(bundle):
    opened = open_bundle(bundle.path)
    assert all(executed(opened, call)["Gemm"] for call in range(len(opened.graphs)))


def test_the_sampler_is_diffusers_own_loop(adapter):
    table = make_table("iddpm", 12)[0]
    scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=False, variance_type="learned_range")
    scheduler.set_timesteps(12)
    condition = adapter.condition(adapter.even_conditions(3))
    start, noises = start_noise(adapter, 5, range(3)), solver_noises(adapter, table, 5, range(3))
    spread = []
    x = start
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        drawn = iter(noises)
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *shape, **options: next(drawn))
        for t, constants in zip(scheduler.timesteps, constants_of(adapter, table), strict=True):
            raw = adapter.guided(x, condition, constants, CFG)
            spread.append(raw[:, 2:].std().item())
            x = scheduler.step(raw, t, x).prev_sample
    assert min(spread) > 0.1  # else the variance would not have been asked for much
    got = sample(adapter, table, condition, start, cfg=CFG, noises=noises)
    # 2e-5: twelve steps in float32, in which gain and slope are rounded (eps 6e-8) and gains reach some hundred
    torch.testing.assert_close(got, x, rtol=0, atol=2e-5 * x.abs().max().item())


def test_the_bundle_gives_the_samples_of_the_sampler(bundle):
    want = sample_seeded(bundle.adapter, bundle.table, LABELS, seed=3, cfg=CFG, compute=bundle.schedule.compute).numpy()
    with Runtime(bundle.path) as runtime:
        assert (runtime.bundle.table.learned == bundle.table.learned).all()
        got = runtime.generate(LABELS, seed=3, batch=2)
        worst = max(drift.error for drift in drifts(bundle.adapter, runtime, LABELS, bundle.schedule.compute))
    assert worst <= 1e-4  # the tolerance of parity in float32
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_training_sees_the_variance_and_the_noise_it_scales():
    adapter, table = adapter_of("dit"), make_table("iddpm", 4)[0]
    problem = Problem(adapter, table, CFG, 0, process=None, images=None)
    training = Training(problem, HarmoniCaSettings(beta=1e-3, trajectories=2, batch=2, refresh=4))
    condition, start, noises = training.draw(0)
    with torch.no_grad():
        with_noise, without = (
            training.denoise(1, start, condition, lambda branch, evaluate: evaluate(), given)
            for given in (noises, [noise * 0 for noise in noises])
        )
    assert not torch.allclose(with_noise, without)
    assert all(np.isfinite(progress.loss) for progress in training.run())


def test_a_model_that_guesses_no_variance_is_refused_in_one_line(tiny_dit):
    table = make_table("iddpm", 4)[0]
    with pytest.raises(SolverError, match="which gives 2 channels and not 4; use ddpm"):
        sample_seeded(tiny_dit, table, LABELS, seed=0, cfg=CFG)
