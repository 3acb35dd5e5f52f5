"""Plans of random masks: liveness is exact, and what a plan promises is what a naive interpreter sees."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hcompress.branches import Branch, BranchGraph
from hcompress.errors import ScheduleError
from hcompress_export.freeze import freeze
from hcompress_runtime.plan import Plan, Step


def graph_of(num_branches: int) -> BranchGraph:
    """Branches whose slots all have different sizes."""
    branches = tuple(Branch(f"{n}.b", macs=10, shape=(n + 1, 3), params=5) for n in range(num_branches))
    return BranchGraph(branches, other_macs=1, other_params=1)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    calls, branches = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    mask = draw(arrays(np.bool_, (calls, branches)))
    mask[0] = True
    return mask


@pytest.mark.parametrize("widen", [False, True])
@given(mask=masks())
def test_running_the_plan_gives_what_the_mask_means(mask: np.ndarray, widen: bool) -> None:
    """The plan's slots always hold what the reference rule (a dict that every computation overwrites) would yield."""
    graph = graph_of(mask.shape[1])
    plan = freeze(graph, mask, widen=widen)
    last: dict[str, int] = {}
    slots: dict[str, int] = {}
    for t, step in enumerate(plan.steps):
        last |= dict.fromkeys(step.computes, t)
        assert [*step.computes] == [name for name, computed in zip(graph.names, mask[t], strict=True) if computed]
        assert {*step.computes} | {*step.reads} == {*graph.names}
        for name in step.reads:
            assert slots[name] == last[name]
        slots |= dict.fromkeys(step.writes, t)
        for name in step.frees:
            del slots[name]
    assert not slots


@given(masks())
def test_nothing_is_kept_that_is_not_read_and_the_peak_is_exact(mask: np.ndarray) -> None:
    graph = graph_of(mask.shape[1])
    plan = freeze(graph, mask)
    reads = [{name for name, computed in zip(graph.names, row, strict=True) if not computed} for row in mask]
    held = [now | later for now, later in zip(reads, [*reads[1:], set()], strict=True)]  # during each step
    assert plan.peak_slots == max(map(len, held))
    sizes = {branch.name: 3 * branch.shape[0] for branch in graph.branches}
    assert plan.peak_cache_bytes(2, itemsize=4) == max(8 * sum(sizes[name] for name in names) for names in held)
    assert {*plan.slots} == set().union(*held)


@given(masks())
def test_equal_steps_share_a_pattern_and_json_keeps_everything(mask: np.ndarray) -> None:
    plan = freeze(graph_of(mask.shape[1]), mask)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert len(plan.patterns) == len({step.pattern for step in plan.steps}) <= len(mask)


@given(masks())
def test_a_wide_plan_has_one_pattern_a_mask_and_keeps_what_the_exact_one_keeps(mask: np.ndarray) -> None:
    graph = graph_of(mask.shape[1])
    exact, wide = freeze(graph, mask), freeze(graph, mask, widen=True)
    assert len(wide.patterns) == len({row.tobytes() for row in mask}) <= len(exact.patterns)
    assert wide.slots == exact.slots
    for few, many in zip(exact.steps, wide.steps, strict=True):
        assert (few.computes, few.reads) == (many.computes, many.reads)
        surplus = {*many.writes} - {*few.writes}
        assert {*many.writes} == {*few.writes} | surplus
        assert {*many.frees} == {*few.frees} | surplus
        equal = [step.writes for step in exact.steps if step.computes == few.computes]
        assert {*many.writes} == {name for writes in equal for name in writes}


@pytest.mark.parametrize("widen", [False, True])
def test_a_dense_mask_has_one_pattern_and_no_slots(widen: bool) -> None:
    plan = freeze(graph_of(3), np.ones((4, 3), bool), widen=widen)
    assert (len(plan.patterns), plan.peak_slots, plan.peak_cache_bytes(64), dict(plan.slots)) == (1, 0, 0, {})


def test_a_mask_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ScheduleError, match="first call must compute every branch"):
        freeze(graph_of(2), np.array([[True, False], [True, True]]))
    with pytest.raises(ScheduleError, match=r"\(2, 3\) does not fit a model of 2 branches"):
        freeze(graph_of(2), np.ones((2, 3), bool))


BROKEN = {
    "reads slot 'a', which nothing has written": [Step(("a",), (), (), ()), Step((), ("a",), (), ())],
    "reads slot 'a', which nothing": [Step(("a",), (), ("a",), ("a",)), Step((), ("a",), (), ())],
    "frees slot 'a', which holds nothing": [Step(("a",), (), (), ("a",))],
    "slot 'a' is never freed": [Step(("a",), (), ("a",), ())],
    "writes slot 'a' but does not compute it": [Step((), (), ("a",), ("a",))],
    "uses slot 'b', which has no shape": [Step(("a",), ("b",), (), ())],
    "computes 'b', which is no branch": [Step(("b",), (), (), ())],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_plan_that_cannot_run_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(("a",), {"a": (2,)}, tuple(BROKEN[message]))


def test_json_that_is_no_plan_is_refused() -> None:
    plain = freeze(graph_of(1), np.ones((2, 1), bool)).to_json()
    for broken in ({**plain, "branches": "0.b"}, {**plain, "steps": [{"computes": [1]}]}, {"branches": []}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Plan.from_json(broken)


def test_plans_compare_by_value() -> None:
    plan = freeze(graph_of(2), np.ones((2, 2), bool))
    assert plan == replace(plan) != replace(plan, steps=plan.steps[:1])
