"""A patched diffusers pipeline gives the reference sampler's pictures, refuses what does not fit, and can be undone."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from test_corrections import drawn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import hcompress
from hcompress.corrections import Corrections
from hcompress.errors import ModelError, ScheduleError
from hcompress.models.dit import DiT
from hcompress.sampling import sample
from hcompress.schedule import Schedule
from hcompress.solver import probe, solver_identity

STEPS, CFG, LABELS = 6, 1.5, [3, 999]
NUM_CLASSES = 1000  # DiTPipeline's null class is 1000, whatever the model


def network(seed: int = 0) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # with a learned variance, as DiT-XL/2
        sample_size=8,
        num_embeds_ada_norm=NUM_CLASSES,
    ).eval()


@pytest.fixture
def pipe() -> DiTPipeline:
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = DiTPipeline(network(), vae.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mask(num_calls: int = STEPS, seed: int = 0) -> np.ndarray:
    compute = np.random.default_rng(seed).random((num_calls, 4)) < 0.5
    compute[0] = True
    return compute


def schedule_for(
    pipe: DiTPipeline, compute: np.ndarray, steps: int = STEPS, corrections: Corrections | None = None
) -> Schedule:
    adapter = DiT(network())
    identity = adapter.identity("tiny", dict(solver_identity(pipe.scheduler, steps)), CFG)
    return Schedule(compute, adapter.graph.names, identity, corrections=corrections)


def pictures(pipe: DiTPipeline, *, steps: int = STEPS, cfg: float = CFG, labels: list[int] = LABELS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return pipe(
        labels, guidance_scale=cfg, generator=generator, num_inference_steps=steps, output_type="pt", return_dict=False
    )[0]


def reference(
    pipe: DiTPipeline, compute: np.ndarray | None, cfg: float = CFG, corrections: Corrections | None = None
) -> torch.Tensor:
    """The same pictures by hcompress.sampling, from the noise that the pipeline draws."""
    adapter = DiT(network())
    start = torch.randn((len(LABELS), *adapter.sample_shape), generator=torch.Generator().manual_seed(7))
    table = probe(pipe.scheduler, STEPS)
    how = {"cfg": cfg, "compute": compute, "corrections": corrections}
    latents = sample(adapter, table, adapter.label_condition(LABELS), start, **how)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("cfg", [1.0, CFG, 4.0])
def test_pictures_are_those_of_the_reference_sampler(pipe, tmp_path, cfg):
    compute = mask()
    schedule_for(pipe, compute).save(tmp_path / "schedule.safetensors")
    dense = pictures(pipe, cfg=cfg)
    hcompress.apply_schedule(pipe, tmp_path / "schedule.safetensors")
    cached = pictures(pipe, cfg=cfg)
    # The solver's table is float64, the scheduler float32 (eps 6e-8), and the sampler broadcasts one row of the time
    # embedding where the pipeline multiplies all: some rounding errors over 6 steps, amplified by an untrained decoder.
    assert (cached - reference(pipe, compute, cfg)).abs().max() <= 1e-5
    assert (cached - dense).abs().max() > 1e-3


def test_a_respaced_scheduler_takes_its_place_in_a_pipeline(pipe):
    plain = pictures(pipe)
    pipe.scheduler = hcompress.make_scheduler("ddim-respaced", pipe.scheduler.config)
    assert (pictures(pipe) - plain).abs().max() > 1e-3
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    assert (pictures(pipe) - reference(pipe, mask())).abs().max() <= 1e-5  # as for DDIM, above


@pytest.mark.parametrize("order", [1, 2])
def test_corrected_pictures_are_those_of_the_reference_sampler(pipe, order):
    compute = mask()
    vectors = drawn(compute, DiT(network()).graph.widths, order=order)
    assert vectors.order == order
    plain, want = reference(pipe, compute), reference(pipe, compute, corrections=vectors)
    hcompress.apply_schedule(pipe, schedule_for(pipe, compute, corrections=vectors))
    for _ in range(2):  # what the first generation left is forgotten
        assert (pictures(pipe) - want).abs().max() <= 1e-5  # as for plain reuse, above
    assert (want - plain).abs().max() > 1e-3


def test_a_pipeline_holds_what_its_corrections_look_at_and_no_more(pipe):
    """Branch by branch: what was computed last where it is ever reused, what before that as far as any call looks."""
    compute = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
    vectors = drawn(compute, DiT(network()).graph.widths)
    for branch, names in enumerate(("", "e", "de")):
        for name in names:
            getattr(vectors, name)[branch][:] = 0
    held = []
    pipe.transformer.proj_out_2.register_forward_hook(lambda *_: held.append(vars(pipe)["_hcompress"].older.copy()))
    hcompress.apply_schedule(pipe, schedule_for(pipe, compute, corrections=vectors))
    pictures(pipe)
    depths = [{branch: len(older) for branch, older in one.items() if older} for one in held]
    assert depths == [{}, {}, {0: 1, 1: 1}, *[{0: 2, 1: 1}] * 3]


def test_corrections_at_another_guidance_scale_are_warned_of_and_run(pipe):
    compute = mask()
    schedule = schedule_for(pipe, compute, corrections=drawn(compute, DiT(network()).graph.widths))
    hcompress.apply_schedule(pipe, schedule)
    for cfg, said in ((4.0, "fitted at guidance 1.5, not 4.0"), (0.5, "fitted at guidance 1.5, not 1.0")):
        with pytest.warns(UserWarning, match=said):
            assert (pictures(pipe, cfg=cfg) - pictures(pipe)).abs().max() > 1e-3
    with pytest.warns(UserWarning, match=r"not 4\.0"):
        pipe(LABELS, num_inference_steps=STEPS, output_type="np")  # the pipeline's own scale
    assert isinstance(pipe, DiTPipeline) and type(pipe).__name__ == "DiTPipeline"
    hcompress.remove_schedule(pipe)
    assert type(pipe) is DiTPipeline


def test_an_all_true_schedule_gives_exactly_the_pictures_of_the_unpatched_pipeline(pipe):
    dense = pictures(pipe)
    hcompress.apply_schedule(pipe, schedule_for(pipe, np.ones((STEPS, 4), bool)))
    assert torch.equal(pictures(pipe), dense)


def test_remove_restores_the_pipeline_exactly(pipe):
    def everything() -> list[object]:
        flags = [module.training for module in pipe.transformer.modules()]
        flags += [parameter.requires_grad for parameter in pipe.transformer.parameters()]
        return [flags, *(sorted(vars(owner)) for owner in (pipe, pipe.transformer, pipe.scheduler))]

    pipe.transformer.train()
    pipe.transformer.proj_out_1.eval()
    pipe.transformer.proj_out_2.requires_grad_(False)
    hcompress.remove_schedule(pipe)
    before, dense = everything(), pictures(pipe)
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask(seed=0)))
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask(seed=1)))
    pictures(pipe)
    assert everything() != before
    for _ in range(2):
        hcompress.remove_schedule(pipe)
        assert everything() == before
    pipe.transformer.eval()  # in training mode diffusers drops labels at random
    dense = pictures(pipe)
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    hcompress.remove_schedule(pipe)
    assert torch.equal(pictures(pipe), dense)


def test_applying_twice_replaces(pipe):
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask(seed=1)))
    want = pictures(pipe)
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask(seed=0)))
    assert not torch.equal(pictures(pipe), want)
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask(seed=1)))
    assert torch.equal(pictures(pipe), want)


def test_a_refused_schedule_leaves_the_one_before(pipe):
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    want = pictures(pipe)
    wrong = schedule_for(pipe, mask())
    pipe.scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    with pytest.raises(ScheduleError, match="config_hash differs"):
        hcompress.apply_schedule(pipe, wrong)
    with pytest.raises(ScheduleError, match="scheduler was replaced"):
        pictures(pipe)
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    hcompress.apply_schedule(pipe, wrong)
    assert torch.equal(pictures(pipe), want)


def test_nothing_leaks_from_call_to_call_even_interrupted_or_of_another_batch(pipe):
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    want = pictures(pipe)
    assert torch.equal(pictures(pipe), want)
    assert torch.equal(pictures(pipe, labels=LABELS[:1]), pictures(pipe, labels=LABELS[:1]))
    assert torch.equal(pictures(pipe), want)

    calls = 0

    def interrupt(module: object, inputs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    hook = pipe.transformer.proj_out_2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pictures(pipe)
    hook.remove()
    assert torch.equal(pictures(pipe), want)


CALLS = {
    DDPMScheduler(clip_sample=False): STEPS,
    DPMSolverMultistepScheduler(): STEPS,
    HeunDiscreteScheduler(): 2 * STEPS - 1,
    PNDMScheduler(): STEPS + 9,  # its Runge-Kutta start
}


@pytest.mark.parametrize("scheduler", CALLS, ids=lambda scheduler: type(scheduler).__name__)
def test_each_row_runs_at_its_own_call_with_any_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler
    compute = mask(CALLS[scheduler])
    seen: list[int] = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn1.register_forward_pre_hook(lambda *_, branch=2 * index: seen.append(branch))
        block.ff.register_forward_pre_hook(lambda *_, branch=2 * index + 1: seen.append(branch))
    hcompress.apply_schedule(pipe, schedule_for(pipe, compute))
    for _ in range(2):
        seen.clear()
        pictures(pipe)
        assert seen == [branch for row in compute for branch in np.flatnonzero(row)]


def test_other_steps_are_refused_when_the_pipeline_is_called(pipe):
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    with pytest.raises(ScheduleError, match=f"with {STEPS} steps, but this run uses DDIMScheduler with {STEPS + 1}"):
        pictures(pipe, steps=STEPS + 1)
    assert torch.isfinite(pictures(pipe)).all()


def test_a_schedule_that_records_no_steps_is_still_refused_at_others(pipe):
    schedule = schedule_for(pipe, mask())
    schedule.identity.solver.clear()
    hcompress.apply_schedule(pipe, schedule)
    with pytest.raises(ScheduleError, match=f"schedule has {STEPS} calls, but DDIMScheduler makes {STEPS + 1}"):
        pictures(pipe, steps=STEPS + 1)


def test_another_model_solver_or_family_is_refused(pipe):
    schedule = schedule_for(pipe, mask())
    pipe.transformer = network(seed=5)
    with pytest.raises(ScheduleError, match="weight_hash"):
        hcompress.apply_schedule(pipe, schedule)
    pipe.transformer = network().to(torch.bfloat16)  # hashes are of float32 values, so nothing is compared
    hcompress.apply_schedule(pipe, schedule)
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    with pytest.raises(ScheduleError, match="solver DDIMScheduler with 6 steps, but this run uses DDPMScheduler"):
        hcompress.apply_schedule(pipe, schedule)
    pipe.transformer = pipe.vae
    with pytest.raises(ModelError, match="AutoencoderKL; schedules apply to a DiTPipeline"):
        hcompress.apply_schedule(pipe, schedule)
    with pytest.raises(ScheduleError, match="no schedule at"):
        hcompress.apply_schedule(pipe, "absent.safetensors")


def test_the_transformer_alone_is_refused_while_a_schedule_is_applied(pipe):
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    x, t, labels = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ScheduleError, match="without its pipeline"):
        pipe.transformer(x, timestep=t, class_labels=labels)
    pipe.scheduler.set_timesteps(STEPS)
    pipe.scheduler.scale_model_input(x, pipe.scheduler.timesteps[0])
    pipe.transformer(x, timestep=t, class_labels=labels)
    with pytest.raises(ScheduleError, match="from call 0 to call 3"):
        pipe.scheduler.scale_model_input(x, pipe.scheduler.timesteps[3])


@pytest.mark.parametrize("shared", ["transformer", "scheduler"])
def test_two_pipelines_that_share_a_part_take_turns(pipe, shared):
    parts = {"transformer": network(), "vae": pipe.vae, "scheduler": DDIMScheduler(clip_sample=False)}
    other = DiTPipeline(**parts | {shared: getattr(pipe, shared)})
    other.set_progress_bar_config(disable=True)
    dense = pictures(pipe)
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    want = pictures(pipe)
    hcompress.apply_schedule(other, schedule_for(other, mask()))
    assert torch.equal(pictures(other), want)
    hcompress.remove_schedule(pipe)
    assert torch.equal(pictures(pipe), dense)
    assert torch.equal(pictures(other), dense)


def test_half_precision(pipe):
    schedule = schedule_for(pipe, mask())
    pipe.to(torch.bfloat16)
    hcompress.apply_schedule(pipe, schedule)
    assert pictures(pipe).dtype == torch.bfloat16


def test_hooks_of_accelerate_stay_in_place(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    dense, hook = pictures(pipe), Count()
    add_hook_to_module(pipe.transformer, hook)
    hcompress.apply_schedule(pipe, schedule_for(pipe, mask()))
    assert not torch.equal(pictures(pipe), dense)
    assert hook.calls == STEPS
    hcompress.remove_schedule(pipe)
    assert torch.equal(pictures(pipe), dense)


def compile_wrapped(pipe: DiTPipeline, backend: object) -> None:
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)


def compile_in_place(pipe: DiTPipeline, backend: object) -> None:
    pipe.transformer.compile(fullgraph=True, backend=backend)


@pytest.mark.parametrize("order", [1, 2])
def test_compiled_rows_are_corrected_as_uncompiled_ones(pipe, order):
    """A graph for each distinct row and depth of its corrections."""
    compute = np.array([[1] * 4, [1] * 4, [1, 0, 1, 0], [1] * 4, [1, 0, 1, 0]], bool)
    vectors = drawn(compute, DiT(network()).graph.widths, order=order)
    hcompress.apply_schedule(pipe, schedule_for(pipe, compute, steps=5, corrections=vectors))
    want = pictures(pipe, steps=5)
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    compile_wrapped(pipe, counter)
    for _ in range(2):
        assert torch.equal(pictures(pipe, steps=5), want)  # this backend runs torch's own operators
    assert counter.frame_count == 1 + order and not counters["graph_break"]


@pytest.mark.parametrize("first", ["apply", "compile"])
@pytest.mark.parametrize("compile", [compile_wrapped, compile_in_place])
def test_compiled_is_one_graph_for_each_distinct_row(pipe, compile, first):
    """In any order, and with more distinct rows than torch.compile allows variants of one function."""
    compute = mask(5)
    compute[1], compute[4] = compute[0], compute[3]
    schedule = schedule_for(pipe, compute, steps=5)
    dense = pictures(pipe, steps=5)
    hcompress.apply_schedule(pipe, schedule)
    want = pictures(pipe, steps=5)
    hcompress.remove_schedule(pipe)

    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    with torch._dynamo.config.patch(recompile_limit=2):
        if first == "compile":
            compile(pipe, counter)
        hcompress.apply_schedule(pipe, schedule)
        if first == "apply":
            compile(pipe, counter)
        for _ in range(2):
            assert torch.equal(pictures(pipe, steps=5), want)  # this backend runs torch's own operators
        assert counter.frame_count == len(np.unique(compute, axis=0)) == 3
        for labels in ([1], [1, 2, 3]):
            pictures(pipe, steps=5, labels=labels)
        assert counter.frame_count == 6  # once more a row, then the batch is symbolic
        assert not counters["graph_break"]
        hcompress.remove_schedule(pipe)
        assert torch.equal(pictures(pipe, steps=5), dense)


@pytest.mark.slow  # half a minute, for the C++ compiler
def test_compiled_with_inductor_gives_the_same_pictures(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    compute = np.ones((2, 4), bool)
    compute[1, 1:3] = False
    hcompress.apply_schedule(pipe, schedule_for(pipe, compute, steps=2))
    want = pictures(pipe, steps=2)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        got = pictures(pipe, steps=2)
    assert (got - want).abs().max() <= 1e-5  # fused operators round differently, float32 (eps 6e-8)


def test_the_functions_are_lazy_and_the_version_is_a_literal():
    source = Path(hcompress.__file__).read_text()
    assert f'__version__ = "{hcompress.__version__}"' in source
    with pytest.raises(AttributeError, match="no attribute 'aply_schedule'"):
        _ = hcompress.aply_schedule
