"""What is joint attention's alone: two streams in a slot, pooled prompts, flow matching as diffusers' pipelines do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import CALLS, Exported, export, make_flux, make_pooled_prompts, make_sd3, random_mask
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.numpy import save_file
from test_all_models import dense

from hcompress.adapter import Adapter, compute_all, config_hash
from hcompress.cli.main import main
from hcompress.errors import InputError, ModelError
from hcompress.models.flux import Flux
from hcompress.models.loading import load_model
from hcompress.recipe import resolve
from hcompress.sampling import sample
from hcompress.solver import make_scheduler, probe, solver_identity
from hcompress.train import train
from hcompress_export.parity import parity
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import open_bundle
from hcompress_runtime.trt_build import build_engine

ASKED = make_pooled_prompts(3, seed=5)
PROMPT = {name: ASKED[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
CLOSE = 3e-5  # relative: float32 through 5 calls of two libraries, amplified by guidance
# stabilityai/stable-diffusion-3-medium, FLUX.1-schnell and FLUX.1-dev, scheduler/scheduler_config.json
SD3_FLOW, SCHNELL_FLOW = {"shift": 3.0}, {"shift": 1.0, "base_shift": 0.5, "max_shift": 1.15}
DEV_FLOW = SCHNELL_FLOW | {"shift": 3.0, "use_dynamic_shifting": True}
MAKE = {
    "sd3.5": lambda: make_sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": lambda: make_flux(guidance_embeds=True),
}


def start_of(adapter: Adapter) -> torch.Tensor:
    return torch.randn(3, *adapter.sample_shape, generator=torch.Generator().manual_seed(0))


def tensors(prompts: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Prompts as diffusers' pipelines take them, a row each."""
    names = {"null_embeds": "negative_prompt_embeds", "pooled_null_embeds": "negative_pooled_prompt_embeds"}
    rows = {names.get(name, name): np.broadcast_to(array, (3, *array.shape[1:])) for name, array in prompts.items()}
    return {name: torch.from_numpy(array.copy()) for name, array in rows.items()}


@pytest.mark.parametrize("config", [SD3_FLOW, SCHNELL_FLOW])
def test_samples_are_those_of_the_pipeline_of_stable_diffusion_3(config: dict[str, Any]) -> None:
    adapter, scheduler = make_sd3(channels=4), FlowMatchEulerDiscreteScheduler(**config)
    start = start_of(adapter)
    pipe = StableDiffusion3Pipeline(adapter.network, scheduler, *[None] * 7)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        **tensors(ASKED),
        latents=start,
        height=64,
        width=64,
        num_inference_steps=CALLS,
        guidance_scale=4.5,
        output_type="latent",
        return_dict=False,
    )[0]
    table = probe(make_scheduler("flow-euler", adapter.scheduler_config(scheduler.config)), CALLS)
    got = sample(adapter, table, adapter.condition(ASKED), start, cfg=4.5)
    assert (got - want).abs().max() <= CLOSE * want.abs().max()


@pytest.mark.parametrize(
    ("config", "guidance", "cfg"), [(DEV_FLOW, 2.0, 1.0), (DEV_FLOW, None, 1.5), (SCHNELL_FLOW, None, 1.0)]
)
def test_samples_are_those_of_the_pipeline_of_flux(config: dict[str, Any], guidance: float | None, cfg: float) -> None:
    """With its even sigmas, its shift by resolution, its packing, its division of the timestep."""
    adapter = make_flux(guidance_embeds=guidance is not None)
    scheduler, start = FlowMatchEulerDiscreteScheduler(**config), start_of(adapter)
    pipe = FluxPipeline(scheduler, None, None, None, None, None, adapter.network)
    pipe.set_progress_bar_config(disable=True)
    asked = ASKED if cfg != 1 else PROMPT
    tokens = pipe(
        **tensors(asked),
        latents=FluxPipeline._pack_latents(start, *start.shape),
        height=64,
        width=64,
        num_inference_steps=CALLS,
        guidance_scale=guidance or 0.0,
        true_cfg_scale=cfg,
        output_type="latent",
        return_dict=False,
    )[0]
    want = FluxPipeline._unpack_latents(tokens, 64, 64, vae_scale_factor=8)
    table = probe(make_scheduler("flow-euler", adapter.scheduler_config(scheduler.config)), CALLS)
    told = {} if guidance is None else {"guidance": np.array([guidance])}
    got = sample(adapter, table, adapter.condition({**asked, **told}), start, cfg=cfg)
    assert (got - want).abs().max() <= CLOSE * want.abs().max()


def test_even_sigmas_make_another_solver() -> None:
    """Which a schedule is bound to."""
    plain, even = (make_scheduler("flow-euler", SD3_FLOW | more) for more in ({}, {"even_sigmas": True}))
    assert solver_identity(plain, CALLS) != solver_identity(even, CALLS)
    sigmas = np.linspace(1, 1 / CALLS, CALLS)
    want = 3 * sigmas / (1 + 2 * sigmas)
    np.testing.assert_allclose(probe(even, CALLS).timesteps, 1000 * want, rtol=1e-6)  # float32
    assert probe(plain, CALLS).timesteps[-1] < 10 < 1000 * want[-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MAKE)
def test_halves_are_bit_identical_to_diffusers_too(name: str, dtype: torch.dtype) -> None:
    """Rotary tables and norms of queries and keys float32, timesteps rounded where the pipeline rounds them."""
    adapter = MAKE[name]().to(dtype)
    condition = {name: rows.to(dtype) for name, rows in adapter.condition(PROMPT).items()}
    time = torch.tensor([987.6, 501.2, 3.7])
    x = start_of(adapter).to(dtype)
    with torch.no_grad():
        got = adapter(x, condition, adapter.step_constants(time), compute_all)
        want = dense(adapter, x, time, condition)
    assert got.dtype == dtype and torch.equal(got, want)


def test_float16_stays_finite_where_diffusers_clips() -> None:
    adapter = make_flux().half()
    double, *singles = (*adapter.network.transformer_blocks, *adapter.network.single_transformer_blocks)
    for layer in (double.norm1_context.linear, *(block.norm.linear for block in singles)):
        layer.bias[-layer.in_features :] = 6e4  # the last gates take the streams beyond 65504
    x, time = start_of(adapter).half(), torch.tensor([500.0])
    condition = {name: rows.half() for name, rows in adapter.condition(PROMPT).items()}
    with torch.no_grad():
        got = adapter(x, condition, adapter.step_constants(time), compute_all)
        assert torch.equal(got, dense(adapter, x, time.expand(3), condition))
    assert got.isfinite().all()


def test_guidance_is_a_condition_with_a_default() -> None:
    adapter = make_flux(guidance_embeds=True)
    constants, start = adapter.step_constants(torch.tensor([500.0])), start_of(adapter)

    def output(**told: np.ndarray) -> torch.Tensor:
        return adapter(start, adapter.condition({**PROMPT, **told}), constants, compute_all)

    assert torch.equal(output(), output(guidance=np.array([3.5])))
    each = output(guidance=np.array([3.5, 1.0, 7.0]))
    assert torch.equal(each[0], output()[0]) and not torch.equal(each[1:], output()[1:])
    with pytest.raises(InputError, match=r"\(and guidance, null_embeds with pooled_null_embeds\), got"):
        adapter.condition({**PROMPT, "null_embeds": ASKED["null_embeds"]})
    with pytest.raises(InputError, match=r"guidance has shape \[3, 1\], but this model takes \[N\]$"):
        adapter.condition({**PROMPT, "guidance": np.ones((3, 1))})
    assert "guidance" not in make_flux().conditions


def test_true_guidance_of_flux_needs_a_null_prompt() -> None:
    adapter = make_flux(null=False)
    assert [*adapter.conditions] == [*PROMPT]
    condition, constants = adapter.condition(PROMPT), adapter.step_constants(torch.tensor([500.0]))
    adapter.guided(start_of(adapter), condition, constants, 1.0)
    with pytest.raises(
        ModelError, match=r"this model has none: pass --cfg 1 .* null_embeds and pooled_null_embeds into"
    ):
        adapter.guided(start_of(adapter), condition, constants, 1.5)


def test_a_network_that_is_told_of_another_picture_has_no_adapter() -> None:
    with pytest.raises(ModelError, match="FLUX with 24 channels in and 8 out"):
        make_flux(in_channels=24, out_channels=8)


def test_flux_has_95_branches_and_12_billion_parameters() -> None:
    """19 blocks of three branches and 38 of one."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
    adapter = Flux(network)
    assert (len(adapter.graph), round(adapter.graph.total_params / 1e8)) == (95, 119)
    assert adapter.sample_shape == (16, 128, 128) and adapter.graph.branches[-1].shape == (4096 + 512, 3072)


def save(adapter: Adapter, folder: Path, prompts: dict[str, np.ndarray] | None, **config: Any) -> Path:
    """`adapter` as a diffusers folder."""
    adapter.network.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(**config).save_pretrained(folder / "scheduler")
    if prompts:
        save_file(prompts, folder / "prompts.safetensors")
    return folder


def test_a_folder_of_flux_gives_the_model_its_resolution_and_its_solver(tmp_path: Path) -> None:
    save(make_flux(guidance_embeds=True), tmp_path, make_pooled_prompts(3) | {"guidance": np.array([2.0])}, **DEV_FLOW)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    model = load_model(str(tmp_path))
    assert config_hash(model.adapter.config()) != config_hash(make_flux(guidance_embeds=True).config())
    assert isinstance(model.adapter, Flux) and model.adapter.sample_shape == (2, 16, 16)
    assert (model.adapter.condition(model.adapter.even_conditions(4))["guidance"] == 2).all()
    assert model.scheduler_config["even_sigmas"] and not model.scheduler_config["use_dynamic_shifting"]
    (tmp_path / "prompts.safetensors").unlink()
    assert load_model(str(tmp_path)).adapter.conditions["prompt_embeds"].shape == (512, 10)


def test_a_router_is_trained_and_pictures_come_from_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(make_sd3(channels=1), tmp_path / "model", make_pooled_prompts(3), **SD3_FLOW)
    flags = {"model": str(folder), "solver.name": "flow-euler", "solver.steps": CALLS, "cfg": 4.5}
    sets = ["caching.trajectories=2", "caching.batch=2", f"caching.refresh={CALLS}"]
    schedule = train(resolve(None, flags | {"caching.beta": 1e-4}, sets), tmp_path / "run")
    assert schedule.names == ("0.attn", "0.mlp", "0.context_mlp", "1.attn", "1.mlp")
    assert schedule.logits is not None and np.ptp(schedule.logits[1:]) > 0
    save_file(PROMPT, tmp_path / "asked.safetensors")
    options = ("--schedule", tmp_path / "run" / "schedule.safetensors", "--solver", "flow-euler")
    ask = ("--prompts", tmp_path / "asked.safetensors", "--out", tmp_path / "grid.png", "--json")
    monkeypatch.setattr(sys, "argv", ["hcompress", *map(str, ("generate", folder, *options, *ask))])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code and json.loads(capsys.readouterr()[0])["backend"] == "torch"
    bare = save(make_sd3(own=False), tmp_path / "bare", None)
    with pytest.raises(ModelError, match=r"a file with prompt_embeds, pooled_prompt_embeds, null_embeds, pooled_null"):
        load_model(str(bare)).adapter.even_conditions(2)
    assert load_model(str(bare)).adapter.conditions["prompt_embeds"].shape == (333, 10)


@pytest.fixture(scope="module", params=MAKE)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A bundle whose calls reuse one half, the other half, everything, something; FLUX's is without guidance."""
    adapter = MAKE[request.param]()
    mask = random_mask(CALLS, len(adapter.graph))
    mask[1, ::2], mask[1, 1::2], mask[3] = True, False, False
    mask[2] = ~mask[1]
    folder = tmp_path_factory.mktemp("joint") / "bundle"
    cfg = 1.0 if request.param == "flux" else 1.5
    return export(folder, adapter, mask, solver="flow-euler", cfg=cfg, layout="per-mask")


def test_a_bundle_gives_the_samples_of_the_reference_sampler_in_batches_of_any_size(bundle: Exported) -> None:
    compute = bundle.schedule.compute
    with Runtime(bundle.path, threads=1) as runtime:
        for count in (1, 3):
            asked = {name: rows[:count] for name, rows in PROMPT.items()}
            assert parity(bundle.adapter, runtime, asked, compute, seed=1).max() <= CLOSE
            assert 0 < runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(count)
    for graph in map(ir.load, bundle.path.glob("graphs/*.onnx")):
        slots = [value for value in (*graph.graph.inputs, *graph.graph.outputs) if value.name.startswith("cache_")]
        assert all(len(value.shape) == 2 for value in slots)


def test_tensorrt_rtx_builds_an_engine_of_a_graph_that_reads_and_writes(bundle: Exported, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    opened = open_bundle(bundle.path)
    rows = {f"cache_in.{name}": shape[0] * opened.rows_per_sample for name, shape in opened.plan.slots.items()}
    graph, engine = opened.path / opened.graphs[1], tmp_path / "rtx.engine"
    built = build_engine(graph, engine, flavor="rtx", sm=89, batch=(1, 2, 4), per_sample=rows)
    assert opened.plan.steps[1].reads and opened.plan.steps[1].writes
    assert built.inputs["pooled_prompt_embeds"] == (-1, 6) and engine.stat().st_size == built.engine_bytes
