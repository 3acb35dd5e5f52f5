"""Corrected reuse, frozen: plans hold just what corrections ask for, graphs yield what the sampler does."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import (
    CALLS,
    CFG,
    Exported,
    export,
    make_pixart,
    make_pooled_prompts,
    make_prompts,
    make_sd3,
    make_uvit,
    random_corrections,
    random_mask,
)
from diffusers import DiTTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bundle import change_constant
from test_plan import graph_of, masks
from typer.testing import CliRunner

from hcompress.adapter import Adapter
from hcompress.cli.main import app, main
from hcompress.corrections import Corrections, taylor
from hcompress.deploy import decide, open_source
from hcompress.errors import BundleError, ScheduleError
from hcompress.report.proof import prove_all
from hcompress.sampling import sample_seeded
from hcompress.schedule import Schedule
from hcompress_export.bundle import SCHEDULE, export_bundle
from hcompress_export.freeze import freeze
from hcompress_export.parity import TOLERANCE, drifts, parity
from hcompress_export.planner import estimate
from hcompress_export.trace import trace
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import CORRECTION, FORMATS, LAYOUTS, open_bundle
from hcompress_runtime.conditions import Given, complete
from hcompress_runtime.ort import OnnxRuntime
from hcompress_runtime.plan import Plan, Step, before
from hcompress_runtime.trt_build import build_engine

CLOSE = 1e-5  # as in test_export: float32 rounding between libraries, over 5 calls
LABELS = [0, 1, 2, 4, 3]
SOME = settings(max_examples=50)


@st.composite
def corrected(draw: st.DrawFn) -> tuple[np.ndarray, Corrections]:
    mask = draw(masks())
    return mask, random_corrections(mask, (3,) * mask.shape[1], seed=draw(st.integers(0, 99)))


Value = tuple[int, tuple[int, ...], int | None]
"""The calls of c, of what is looked at beside it (p, or p and q) and of the vectors, None where none have a part."""


def yields(mask: np.ndarray, corrections: Corrections, t: int, n: int) -> Value:
    """What branch n, reused at t, yields."""
    c, *older = np.flatnonzero(mask[:t, n]).tolist()[::-1]
    return c, tuple(older[: corrections.depth[t, n]]), t if corrections.changes[t, n] else None


@pytest.mark.parametrize(("widen", "finish"), [(False, True), (False, False), (True, False)])
@SOME
@given(problem=corrected())
def test_running_the_plan_gives_what_the_corrections_mean(
    problem: tuple[np.ndarray, Corrections], widen: bool, finish: bool
) -> None:
    """An interpreter whose slots hold what they stand for. Nothing is read that is not there, nothing is left."""
    mask, corrections = problem
    graph = graph_of(mask.shape[1])
    plan = freeze(graph, mask, corrections, widen=widen, finish=finish)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    slots: dict[str, Value] = {}
    for t, step in enumerate(plan.steps):
        for name in step.keeps:  # in this order one after the other is as good as all at once
            assert before(name) not in slots
            slots[before(name)] = slots.pop(name)
        for n, name in enumerate(graph.names):
            is_corrected, olders = name in step.corrects, [before(name), before(before(name))]
            read = [slot for slot in olders if slot in step.reads]
            assert read == olders[: len(read)] and {*read} <= {*step.corrects}
            older = tuple(slots[slot][0] for slot in read)
            assert all(slots[slot][1:] == ((), None) for slot in read)  # was computed, never corrected
            if not mask[t, n]:
                vectors = t if is_corrected and (not widen or corrections.changes[t, n]) else None
                got = (slots[name][0], older, vectors) if is_corrected else slots[name]
                assert got == yields(mask, corrections, t, n)
            elif name in step.writes:
                assert name not in slots
                slots[name] = (t, older, t + 1 if is_corrected else None)
        for name in step.frees:
            del slots[name]
    assert not slots


@SOME
@given(corrected())
def test_a_slot_lives_from_its_writer_to_its_last_reader_and_the_peak_is_exact(
    problem: tuple[np.ndarray, Corrections],
) -> None:
    """Counted from who reads what; kept a call longer than that, or a call shorter, the figures would differ."""
    mask, corrections = problem
    graph = graph_of(mask.shape[1])
    lives: dict[tuple[int, int], int] = {}  # (call, branch) that computed a value -> the last call that looks at it
    for t, n in np.argwhere(~mask).tolist():
        c, older, _ = yields(mask, corrections, t, n)
        lives |= {(call, n): t for call in (c, *older)}
    held = [sorted(n for (first, n), last in lives.items() if first <= t <= last) for t in range(len(mask))]
    plan, live = freeze(graph, mask, corrections, finish=False), set[str]()
    for step, want in zip(plan.steps, held, strict=True):
        live = live - {*step.keeps} | {before(name) for name in step.keeps} | {*step.writes}
        assert sorted(int(name.partition(".")[0]) for name in live) == want
        live -= {*step.frees}
    sizes = [3 * branch.shape[0] for branch in graph.branches]
    assert plan.peak_slots == max(map(len, held))
    assert plan.peak_cache_bytes(2, itemsize=4) == max(8 * sum(sizes[n] for n in names) for names in held)
    finished = freeze(graph, mask, corrections)
    assert finished.peak_cache_bytes(1) <= plan.peak_cache_bytes(1) and len(finished.patterns) <= len(plan.patterns)


@SOME
@given(masks(), st.integers(0, 99), st.booleans())
def test_without_p_slots_are_those_of_plain_reuse(mask: np.ndarray, seed: int, widen: bool) -> None:
    graph = graph_of(mask.shape[1])
    corrections = random_corrections(mask, (3,) * len(graph), seed=seed, depth=0)
    plain, plan = freeze(graph, mask, widen=widen), freeze(graph, mask, corrections, widen=widen)
    assert plan.slots == plain.slots and plan.peak_cache_bytes(1) == plain.peak_cache_bytes(1)
    for ours, theirs in zip(plan.steps, plain.steps, strict=True):
        assert (ours.reads, ours.writes, ours.frees, ours.keeps) == (theirs.reads, theirs.writes, theirs.frees, ())


@SOME
@given(corrected())
def test_a_wide_plan_has_one_pattern_a_mask(problem: tuple[np.ndarray, Corrections]) -> None:
    mask, corrections = problem
    exact, wide = (freeze(graph_of(mask.shape[1]), mask, corrections, widen=widen) for widen in (False, True))
    assert len(wide.patterns) == len({row.tobytes() for row in mask})
    assert wide.slots == exact.slots


@SOME
@given(masks(), st.integers(0, 99), st.booleans())
def test_a_slot_for_q_is_there_only_where_a_correction_looks_at_it(mask: np.ndarray, seed: int, widen: bool) -> None:
    graph = graph_of(mask.shape[1])
    for depth in (1, 2):
        corrections = random_corrections(mask, (3,) * len(graph), seed=seed, depth=depth)
        plan = freeze(graph, mask, corrections, widen=widen)
        by_q = {before(before(name)) for n, name in enumerate(graph.names) if (corrections.depth[:, n] == 2).any()}
        assert {slot for slot in plan.slots if slot.endswith(before(before("")))} == by_q
        assert depth == 2 or not by_q


P, Q = "a.before", "a.before.before"
WRITES, KEEPS = Step(("a",), (), ("a",), ()), Step(("a",), (), ("a",), (), keeps=("a",))
BOTH, BOTH_AGAIN = (Step(("a",), (), ("a",), (), keeps=keeps) for keeps in ((P, "a"), (P, "a")))
BROKEN = {
    "step 0 corrects 'a', which it neither reads nor writes": [Step(("a",), (), (), (), corrects=("a",))],
    "step 1 corrects 'a.before', which": [WRITES, Step((), ("a",), (), ("a",), corrects=("a.before",))],
    "step 2 reads slot 'a.before' but corrects nothing by it": [WRITES, KEEPS, Step((), ("a", "a.before"), (), ())],
    "step 0 keeps slot 'a', which holds nothing": [KEEPS],
    "step 2 writes slot 'a.before' over what it holds": [WRITES, KEEPS, KEEPS],
    "step 1 keeps slot 'a.before', which holds nothing": [WRITES, BOTH],
    "step 3 writes slot 'a.before.before' over what it holds": [WRITES, KEEPS, BOTH, BOTH_AGAIN],
    "step 3 corrects 'a.before.before', which": [WRITES, KEEPS, BOTH, Step((), ("a",), (), (), corrects=("a", Q))],
    "step 3 reads slot 'a.before.before' but corrects nothing": [WRITES, KEEPS, BOTH, Step((), ("a", Q), (), ("a",))],
    "step 1 writes slot 'a.before' but does not compute it": [WRITES, Step((), (), (), (), keeps=("a.before",))],
    "slot 'a.before.before' is never freed": [WRITES, KEEPS, Step(("a",), (), (), (P,), keeps=(P, "a"))],
    "step 1 writes slot 'a' but does not compute it": [WRITES, Step((), (), (), (), keeps=("a",))],
    "step 1 writes slot 'a' over what it holds": [WRITES, WRITES],
    "slot 'a.before' is never freed": [WRITES, Step(("a",), (), (), (), keeps=("a",))],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_plan_that_cannot_run_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(("a",), {"a": (2,), P: (2,), Q: (2,)}, tuple(BROKEN[message]))


def problem_of(adapter: Adapter, seed: int = 0) -> tuple[np.ndarray, Corrections]:
    """A mask under which call 3 yields branch 1 by p and q, and computes branch 0, finished by both as it is written.

    Call 2 yields branch 0 by p, when there is no q yet; calls 2 and 3 yield branch 2 by p, of which there is never one.
    """
    mask = random_mask(CALLS, len(adapter.graph), seed=seed)
    mask[:, :3] = np.array([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]], bool).T
    corrections = random_corrections(mask, adapter.graph.widths, seed=seed)
    by_q, by_p = ((4, 0, "adbe"), (3, 1, "adbe"), (4, 1, "e")), ((2, 0, "adb"), (2, 2, "adb"), (3, 2, "adb"))
    for call, branch, terms in (*by_q, *by_p):
        for term in corrections.terms:
            term[branch][call] = 0
        for name in terms:
            getattr(corrections, name)[branch][call] = 0.3
    return mask, corrections


@pytest.fixture(scope="module")
def traced(tiny_dit: Adapter) -> ir.Model:
    return trace(tiny_dit, CFG)


FAMILIES = {
    "pixart": (partial(make_pixart, 1), "ddim", make_prompts(3, seed=1)),
    "uvit": (make_uvit, "dpmsolver", LABELS),
    "sd3": (make_sd3, "flow-euler", make_pooled_prompts(3, seed=1)),  # slots of unequal length
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Adapter, ir.Model, str, Given]:
    """A tiny model, its trace, a solver and conditions; the DiT has tests of its own."""
    make, solver, conditions = FAMILIES[request.param]
    adapter = make()
    return adapter, trace(adapter, CFG), solver, conditions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_families_and_layouts_equal_the_reference_sampler(
    family: tuple[Adapter, ir.Model, str, Given], layout: str, tmp_path: Path
) -> None:
    adapter, traced, solver, conditions = family
    mask, corrections = problem_of(adapter)
    path = export(
        tmp_path / "b", adapter, mask, solver=solver, layout=layout, corrections=corrections, traced=traced
    ).path
    with Runtime(path, threads=1) as runtime:
        found = drifts(adapter, runtime, conditions, mask, corrections, seed=1)
        assert max(drift.error for drift in found) <= CLOSE
        rows = len(next(iter(complete(adapter.conditions, conditions).values())))
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(rows) > 0


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.floats(0.2, 0.9), st.sampled_from(LAYOUTS), st.booleans())
def test_any_mask_and_any_corrections_equal_the_reference_sampler(
    tiny_dit: Adapter, traced: ir.Model, tmp_path: Path, seed: int, reuse: float, layout: str, widen: bool
) -> None:
    mask = random_mask(CALLS, len(tiny_dit.graph), reuse=reuse, seed=seed)
    mask[4] = mask[2]  # calls of one mask, of which only the later may have a p
    corrections = random_corrections(mask, tiny_dit.graph.widths, seed=seed)
    options = {"layout": layout, "corrections": corrections, "traced": traced, "widen": widen}
    with Runtime(export(tmp_path / "b", tiny_dit, mask, **options).path, threads=1) as runtime:
        assert parity(tiny_dit, runtime, LABELS, mask, corrections, seed=seed).max() <= CLOSE
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(len(LABELS))


@pytest.mark.parametrize(("layout", "widen"), [("switch", False), ("embedded", True)])
def test_calls_that_share_a_graph_may_have_neither_p_nor_q(
    tiny_dit: Adapter, traced: ir.Model, tmp_path: Path, layout: str, widen: bool
) -> None:
    """Branch 0 looks at q at call 4; at call 1, of the same graph, there is c alone."""
    mask = np.ones((CALLS, 4), bool)
    mask[[1, 4], 0] = False
    corrections = random_corrections(mask, tiny_dit.graph.widths, depth=0)
    corrections.e[0][4] = 0.3
    options = {"layout": layout, "corrections": corrections, "traced": traced, "widen": widen}
    with Runtime(export(tmp_path / "b", tiny_dit, mask, **options).path, threads=1) as runtime:
        assert runtime.bundle.graphs[1] == runtime.bundle.graphs[4]
        assert parity(tiny_dit, runtime, LABELS, mask, corrections).max() <= CLOSE


@pytest.fixture(scope="module")
def bundle(tiny_dit: Adapter, traced: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of the tiny model, weights as inputs. Do not change its files; copy them."""
    mask, corrections = problem_of(tiny_dit)
    path = tmp_path_factory.mktemp("corrected") / "b"
    return export(path, tiny_dit, mask, layout="per-mask", corrections=corrections, traced=traced)


def test_corrections_matter_here_and_batches_may_have_any_size(bundle: Exported) -> None:
    mask, corrections = bundle.schedule.compute, bundle.schedule.corrections
    options = {"seed": 3, "cfg": CFG, "compute": mask}
    want, plain = (
        sample_seeded(bundle.adapter, bundle.table, LABELS, **options, corrections=rule).numpy()
        for rule in (corrections, None)
    )
    with Runtime(bundle.path, threads=1) as runtime:
        got = runtime.generate(LABELS, seed=3, batch=2)
    assert np.abs(got - want).max() <= CLOSE and np.abs(got - plain).max() > 100 * CLOSE


def test_the_planner_counts_slots_and_vectors_as_they_are(bundle: Exported) -> None:
    opened, mask, corrections = open_bundle(bundle.path), bundle.schedule.compute, bundle.schedule.corrections
    options = {"rows": 10, "itemsize": 4, "backend": "ort-cpu"}
    plain = estimate(bundle.adapter.graph, mask, **options)
    vectors = sum(rows.nbytes for name, rows in opened.constants.items() if name.startswith(CORRECTION))
    stored = sum(rows.nbytes for rows in corrections.tensors().values())
    for ours, theirs in zip(estimate(bundle.adapter.graph, mask, corrections, **options), plain, strict=True):
        assert ours.weight_bytes - theirs.weight_bytes == vectors
        assert ours.disk_bytes - theirs.disk_bytes == vectors + stored
        if ours.layout != "switch":
            assert ours.cache_bytes == opened.peak_cache_bytes(5) > theirs.cache_bytes


def test_what_is_captured_has_the_same_samples_and_the_same_addresses_again(bundle: Exported) -> None:
    """Slots that are kept for a later call are not overwritten, and what is recorded is found again."""
    with Runtime(bundle.path, threads=1) as plain, Runtime(bundle.path, threads=1, capture=3) as runtime:
        counts = []
        for seed in range(3):
            want = plain.generate(LABELS[:3], seed)
            assert np.abs(runtime.generate(LABELS[:3], seed) - want).max() <= CLOSE
            engines = runtime.engines.values()
            counts.append(sum(len(engine.recordings) for engine in engines if isinstance(engine, OnnxRuntime)))
        assert counts[1:] == [counts[1]] * 2


def test_tensorrt_rtx_builds_an_engine_that_corrects_what_it_reads_and_what_it_writes(
    bundle: Exported, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    opened = open_bundle(bundle.path)
    step, branches = opened.plan.steps[3], opened.plan.branches
    older = {before(branch) for branch in branches[:2]}
    assert {*step.corrects} >= {*branches[:2]} | older | {*map(before, older)}
    assert branches[0] in step.computes and branches[1] in step.reads
    rows = {f"cache_in.{name}": shape[0] * opened.rows_per_sample for name, shape in opened.plan.slots.items()}
    graph, engine = opened.path / opened.graphs[3], tmp_path / "rtx.engine"
    built = build_engine(graph, engine, flavor="rtx", sm=89, batch=(1, 2, 4), per_sample=rows)
    width = opened.plan.slots[branches[1]][1]
    assert built.inputs[f"step.{CORRECTION}{branches[1]}"] == (1, 3 * width)
    assert built.inputs[f"step.{CORRECTION}{before(before(branches[1]))}"] == (1, width)
    assert built.inputs[f"cache_in.{before(branches[0])}"] == (-1, width)
    assert built.inputs[f"cache_in.{before(before(branches[0]))}"] == (-1, width)


def test_graphs_of_plain_reuse_know_nothing_of_corrections(tiny_dit: Adapter, traced: ir.Model, tmp_path: Path) -> None:
    """And a bundle says which it is, so that a reader that knows only the one does not misread the other."""
    mask, _ = problem_of(tiny_dit)
    zeros = random_corrections(np.ones_like(mask), tiny_dit.graph.widths)  # of a mask that reuses nothing: all zero
    one, other = (
        open_bundle(export(tmp_path / name, tiny_dit, mask, corrections=rule, traced=traced).path)
        for name, rule in (("one", None), ("other", zeros))
    )
    assert one.plan == other.plan and one.graphs == other.graphs  # named by what they hold
    assert one.manifest["format"] == other.manifest["format"] == FORMATS[0]
    assert {key for step in one.manifest["steps"] for key in step} == {"graph", "computes", "reads", "writes", "frees"}


def test_a_corrected_bundle_is_of_another_format_and_holds_its_vectors(bundle: Exported, tmp_path: Path) -> None:
    assert open_bundle(bundle.path).manifest["format"] == FORMATS[1]
    for name, found, wanted in (("0.attn", 95, 96), ("0.attn.before.before", 31, 32)):
        broken = Path(shutil.copytree(bundle.path, tmp_path / name))
        change_constant(broken, f"step.{CORRECTION}{name}", lambda rows: rows[:, :-1].copy())
        message = rf"the correction of {name} is \[{found}\] instead of \[{wanted}\]; export or copy"
        with pytest.raises(BundleError, match=message):
            open_bundle(broken)


MISFITS = {
    "another width": (
        lambda one: replace(one, corrections=random_corrections(one.compute, (32, 32, 32, 16))),
        r"corrections of '1\.mlp' are 16 wide, but in tiny that branch is 32 wide",
    ),
    "another model": (
        lambda one: replace(one, identity=replace(one.identity, weight_hash="0" * 64)),
        r"learned on tiny \(weight_hash 0{12}\), not on tiny",
    ),
    "another solver": (
        lambda one: replace(one, identity=replace(one.identity, solver=one.identity.solver | {"steps": 7})),
        "learned for solver DDIMScheduler with 7 steps",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_corrections_of_something_else_are_refused(bundle: Exported, tmp_path: Path, name: str) -> None:
    change, message = MISFITS[name]
    with pytest.raises(ScheduleError, match=message) as caught:
        export_bundle(
            bundle.adapter, bundle.table, bundle.identity, tmp_path / "b", cfg=CFG, schedule=change(bundle.schedule)
        )
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_merging_masks_takes_differences_anew_and_refuses_what_was_fitted(tiny_run: Path) -> None:
    source = {"dense": False, "solver": "ddim", "steps": CALLS, "cfg": CFG}
    setting, schedule = open_source(str(tiny_run), None, **source, reuse="taylor")
    widths = setting.adapter.graph.widths
    for order in (1, 2):
        one = replace(schedule, corrections=taylor(schedule.compute, widths, order))
        merged = decide(setting, one, max_graphs=2).schedule
        assert (merged.compute != schedule.compute).any() and merged.reuse == "taylor"
        assert merged.corrections.fingerprint == taylor(merged.compute, widths, one.order).fingerprint
    fitted = replace(schedule, corrections=random_corrections(schedule.compute, setting.adapter.graph.widths))
    assert decide(setting, fitted, max_graphs=CALLS).schedule.corrections is fitted.corrections
    with pytest.raises(ScheduleError, match=r"--max-graphs 2 computes \d+ values that this schedule reuses.*--reuse"):
        decide(setting, fitted, max_graphs=2)


WRONG = {
    "--reuse corrected": "this schedule holds no fitted corrections, its rule is plain",
    "--reuse magic": "there is no rule of reuse 'magic'; choose from: plain, taylor, corrected",
    "--dense --reuse taylor": "nothing is reused without a schedule; leave out --reuse taylor, or --dense",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_rule_that_a_schedule_does_not_have_is_one_line(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    command = ["hcompress", "export", str(tiny_run), "--out", str(tmp_path / "b"), *flags.split()]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (1, "") and not [*tmp_path.iterdir()]
    assert said.err.startswith("error: ") and WRONG[flags] in said.err and said.err.count("\n") == 1


def test_train_and_inspect_say_what_fell_to_plain_reuse(hcompress: Any, tiny_run: Path, tmp_path: Path) -> None:
    """The last branch gives nothing, so its channels are constant; one reused at call 1 has no p."""
    shutil.copytree(tiny_run.parent / "model", tmp_path / "model")
    network = DiTTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer")
    for parameter in network.transformer_blocks[1].ff.net[2].parameters():
        parameter.data.zero_()
    network.save_pretrained(tmp_path / "model" / "transformer")
    fitting = ("--method", "interval", "--set", "caching.every=2", "--reuse", "corrected", "--set")
    flags = ("--steps", CALLS, *fitting, "caching.fit_samples=8", "--set", "caching.fit_steps=0")
    code, out, err = hcompress("train", tmp_path / "model", *flags, "--out", tmp_path / "run")
    assert code == 0, err
    method = Schedule.load(tmp_path / "run").method
    assert method["fallbacks"] > 0 < method["degenerate_channels"]
    for said in (out, hcompress("inspect", tmp_path / "run")[1]):
        told = " ".join(said.split())
        assert f"{method['fallbacks']} entries without" in told, said
        assert f"{method['degenerate_channels']} channels that fell to plain" in told, said


def test_a_schedule_whose_corrections_are_broken_runs_under_another_rule(
    hcompress: Any, tiny_run: Path, tmp_path: Path
) -> None:
    schedule, model = Schedule.load(tiny_run), tiny_run.parent / "model"
    widths, file = open_source(str(tiny_run), None, dense=True)[0].adapter.graph.widths, tmp_path / "s.safetensors"
    fitted = replace(schedule, corrections=random_corrections(schedule.compute, widths))
    fitted.corrections.a[0][1] = np.nan  # after it was checked
    fitted.save(file)
    code, _, err = hcompress("eval", model, "--schedule", file)
    assert code == 1 and "holds NaN or infinity" in err and "with --reuse plain" in err
    for rule in ("plain", "taylor"):
        assert hcompress("eval", model, "--schedule", file, "--samples", 2, "--reuse", rule)[0] == 0
        assert hcompress("export", model, "--schedule", file, "--dry-run", "--reuse", rule)[0] == 0


@pytest.mark.parametrize(("dtype", "order"), [("float16", 1), ("float16", 2), ("float32", 2)])
def test_what_is_exported_with_another_rule_is_verified_with_it(
    tiny_run: Path, tmp_path: Path, dtype: str, order: int
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    if order == 2:  # of which the rule is the schedule's own
        schedule, widths = Schedule.load(run), open_source(str(run), None, dense=True)[0].adapter.graph.widths
        compute = np.array([[1] * 4, [1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0]], bool)
        replace(schedule, compute=compute, corrections=taylor(compute, widths, 2)).save(run / "schedule.safetensors")
    command = ["export", str(run), "--reuse", "taylor", "--dtype", dtype, "--out", str(tmp_path / "b"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert 0 < max(json.loads(done.stdout)["parity"]) <= TOLERANCE[dtype]
    exported = Schedule.load(tmp_path / "b" / SCHEDULE)
    assert (exported.reuse, exported.order) == ("taylor", order)
    (proof, *_) = prove_all(tmp_path / "b", samples=2)
    assert proof.holds and proof.worst <= TOLERANCE[dtype]
    assert open_bundle(tmp_path / "b").manifest["format"] == FORMATS[1]
