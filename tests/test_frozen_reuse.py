"""Corrected reuse, frozen: plans hold just what corrections ask for, graphs yield what the sampler does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import (
    CALLS,
    CFG,
    export,
    make_dit,
    make_pixart,
    make_pooled_prompts,
    make_prompts,
    make_sd3,
    make_uvit,
    random_corrections,
    random_mask,
)
from hypothesis import given
from hypothesis import strategies as st
from test_plan import graph_of, masks

from hcompress.adapter import Adapter
from hcompress.corrections import Corrections
from hcompress_export.freeze import freeze
from hcompress_export.parity import drifts
from hcompress_export.trace import trace
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import LAYOUTS
from hcompress_runtime.conditions import complete
from hcompress_runtime.plan import Plan, before

CLOSE = 1e-5  # as in test_export: float32 rounding between libraries, over 5 calls
LABELS = [0, 1, 2, 4, 3]


@st.composite
def corrected(draw: st.DrawFn) -> tuple[np.ndarray, Corrections]:
    mask = draw(masks())
    return mask, random_corrections(mask, (3,) * mask.shape[1], seed=draw(st.integers(0, 99)))


def yields(mask: np.ndarray, corrections: Corrections, t: int, n: int) -> tuple[int, int | None, int | None]:
    """What branch n, reused at t, yields: the calls of c and p, and of the vectors; None for what has no part in it."""
    *_, p, c = [-1, *np.flatnonzero(mask[:t, n]).tolist()]
    return c, p if corrections.uses_older[t, n] else None, t if corrections.changes[t, n] else None


@pytest.mark.parametrize(("widen", "finish"), [(False, True), (False, False), (True, False)])
@given(problem=corrected())
def test_running_the_plan_gives_what_the_corrections_mean(
    problem: tuple[np.ndarray, Corrections], widen: bool, finish: bool
) -> None:
    """An interpreter whose slots hold what they stand for. Nothing is read that is not there, nothing is left."""
    mask, corrections = problem
    graph = graph_of(mask.shape[1])
    plan = freeze(graph, mask, corrections, widen=widen, finish=finish)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    slots: dict[str, tuple[int, int | None, int | None]] = {}
    for t, step in enumerate(plan.steps):
        for name in step.keeps:
            assert before(name) not in slots
            slots[before(name)] = slots.pop(name)
        for n, name in enumerate(graph.names):
            is_corrected, by_p = name in step.corrects, before(name) in step.reads
            assert not by_p or before(name) in step.corrects
            p = slots[before(name)] if by_p else None
            assert p is None or p[1:] == (None, None)  # was computed, never corrected
            if not mask[t, n]:
                vectors = t if is_corrected and (not widen or corrections.changes[t, n]) else None
                got = (slots[name][0], p and p[0], vectors) if is_corrected else slots[name]
                assert got == yields(mask, corrections, t, n)
            elif name in step.writes:
                assert name not in slots
                slots[name] = (t, p and p[0], t + 1 if is_corrected else None)
        for name in step.frees:
            del slots[name]
    assert not slots


@given(corrected())
def test_a_slot_lives_from_its_writer_to_its_last_reader_and_the_peak_is_exact(
    problem: tuple[np.ndarray, Corrections],
) -> None:
    """Counted from who reads what; kept a call longer than that, or a call shorter, the figures would differ."""
    mask, corrections = problem
    graph = graph_of(mask.shape[1])
    lives: dict[tuple[int, int], int] = {}  # (call, branch) that computed a value -> the last call that looks at it
    for t, n in np.argwhere(~mask).tolist():
        c, p, _ = yields(mask, corrections, t, n)
        lives |= {(call, n): t for call in (c, p) if call is not None}
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
    assert finished.peak_cache_bytes(1) <= plan.peak_cache_bytes(1) or len(finished.patterns) < len(plan.patterns)


@given(masks(), st.integers(0, 99), st.booleans())
def test_without_p_slots_are_those_of_plain_reuse(mask: np.ndarray, seed: int, widen: bool) -> None:
    graph = graph_of(mask.shape[1])
    corrections = random_corrections(mask, (3,) * len(graph), seed=seed, older=False)
    plain, plan = freeze(graph, mask, widen=widen), freeze(graph, mask, corrections, widen=widen)
    assert plan.slots == plain.slots and plan.peak_cache_bytes(1) == plain.peak_cache_bytes(1)
    for ours, theirs in zip(plan.steps, plain.steps, strict=True):
        assert (ours.reads, ours.writes, ours.frees, ours.keeps) == (theirs.reads, theirs.writes, theirs.frees, ())


@given(corrected())
def test_a_wide_plan_has_one_pattern_a_mask(problem: tuple[np.ndarray, Corrections]) -> None:
    mask, corrections = problem
    exact, wide = (freeze(graph_of(mask.shape[1]), mask, corrections, widen=widen) for widen in (False, True))
    assert len(wide.patterns) == len({row.tobytes() for row in mask})
    assert wide.slots == exact.slots


FAMILIES = {
    "dit": (lambda: make_dit(), "ddim", LABELS),
    "pixart": (lambda: make_pixart(), "ddim", make_prompts(3, seed=1)),
    "uvit": (lambda: make_uvit(), "dpmsolver", LABELS),
    "sd3": (lambda: make_sd3(), "flow-euler", make_pooled_prompts(3, seed=1)),  # slots of unequal length
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Adapter, ir.Model, str, object]:
    """A tiny model, its trace, a solver and conditions."""
    make, solver, conditions = FAMILIES[request.param]
    adapter = make()
    return adapter, trace(adapter, CFG), solver, conditions


def problem_of(adapter: Adapter, seed: int = 0) -> tuple[np.ndarray, Corrections]:
    """A mask with corrections by p, one of which is finished as it is written."""
    mask = random_mask(CALLS, len(adapter.graph), seed=seed)
    mask[:, 0], mask[:, 1] = [True, True, False, True, False], [True, True, False, False, True]
    corrections = random_corrections(mask, adapter.graph.widths, seed=seed)
    for call, branch in ((2, 0), (4, 0), (2, 1), (3, 1)):
        for term in (corrections.a, corrections.d, corrections.b):
            term[branch][call] = 0.3
    return mask, corrections


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_families_and_layouts_equal_the_reference_sampler(
    family: tuple[Adapter, ir.Model, str, object], layout: str, tmp_path: Path
) -> None:
    adapter, traced, solver, conditions = family
    mask, corrections = problem_of(adapter)
    exported = export(
        tmp_path / "b", adapter, mask, solver=solver, layout=layout, corrections=corrections, traced=traced
    )
    with Runtime(exported.path, threads=1) as runtime:
        found = drifts(adapter, runtime, conditions, mask, corrections, seed=1)
        assert max(drift.error for drift in found) <= CLOSE
        rows = len(next(iter(complete(adapter.conditions, conditions).values())))
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(rows) > 0
