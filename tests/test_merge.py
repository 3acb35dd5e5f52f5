"""Merging masks only ever adds computation, as much as it says, and the least there is where one merge is needed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hcompress.branches import Branch, BranchGraph
from hcompress.errors import ScheduleError
from hcompress_export.freeze import freeze
from hcompress_export.merge import merge


@st.composite
def problems(draw: st.DrawFn, calls: int = 8, branches: int = 6) -> tuple[BranchGraph, np.ndarray]:
    """Branches of unequal MACs, and a mask with a full first row."""
    shape = draw(st.integers(1, calls)), draw(st.integers(1, branches))
    mask = draw(arrays(np.bool_, shape))
    mask[0] = True
    macs = draw(st.lists(st.integers(1, 10**12), min_size=shape[1], max_size=shape[1]))
    made = tuple(Branch(f"{n}.b", each, (2, 3), params=1) for n, each in enumerate(macs))
    return BranchGraph(made, other_macs=5, other_params=1), mask


def distinct(mask: np.ndarray) -> int:
    return len({row.tobytes() for row in mask})


@given(problems(), st.integers(1, 9))
def test_it_only_adds_computation_and_says_how_much(problem: tuple[BranchGraph, np.ndarray], max_graphs: int) -> None:
    graph, mask = problem
    before = mask.copy()
    merged, macs = merge(graph, mask, max_graphs)
    assert (mask == before).all()
    assert merged.dtype == np.bool_ and merged.shape == mask.shape
    assert (merged >= mask).all() and merged[0].all()
    assert distinct(merged) <= max_graphs
    assert macs == graph.total_macs(merged) - graph.total_macs(mask) >= 0
    assert len(freeze(graph, merged, widen=True).patterns) <= max_graphs


@given(problems())
def test_equal_masks_stay_equal(problem: tuple[BranchGraph, np.ndarray]) -> None:
    graph, mask = problem
    merged, _ = merge(graph, mask, max(1, distinct(mask) // 2))
    for row, united in zip(mask, merged, strict=True):
        assert (merged[(mask == row).all(axis=1)] == united).all()


@given(problems(), st.integers(0, 3))
def test_enough_graphs_change_nothing(problem: tuple[BranchGraph, np.ndarray], more: int) -> None:
    graph, mask = problem
    merged, macs = merge(graph, mask, distinct(mask) + more)
    assert (merged == mask).all() and macs == 0


@given(problems())
def test_one_graph_computes_everything(problem: tuple[BranchGraph, np.ndarray]) -> None:
    graph, mask = problem
    merged, macs = merge(graph, mask, 1)
    assert merged.all() and macs == graph.total_macs(np.ones_like(mask)) - graph.total_macs(mask)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put `items` into groups."""
    if not items:
        yield []
        return
    first, *others = items
    for groups in partitions(others):
        yield [[first], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [first, *group], *groups[index + 1 :]]


@given(problems(calls=5, branches=4), st.integers(1, 5))
def test_it_is_never_better_than_the_best_and_equals_it_when_one_merge_is_needed(
    problem: tuple[BranchGraph, np.ndarray], max_graphs: int
) -> None:
    """The best of all ways to group the calls: a group computes what any of its calls does."""
    graph, mask = problem

    def united(groups: list[list[int]]) -> np.ndarray:
        rows = mask.copy()
        for group in groups:
            rows[group] = mask[group].any(axis=0)
        return rows

    grouped = [united(groups) for groups in partitions([*range(len(mask))])]
    best = min(graph.total_macs(rows) for rows in grouped if distinct(rows) <= max_graphs) - graph.total_macs(mask)
    _, macs = merge(graph, mask, max_graphs)
    assert macs >= best
    if distinct(mask) - max_graphs <= 1:
        assert macs == best


def test_a_call_that_comes_once_is_united_with_what_it_is_part_of_not_what_comes_twice() -> None:
    made = tuple(Branch(f"{n}.b", 1, (2, 3), params=1) for n in range(2))
    merged, macs = merge(BranchGraph(made, 5, 1), np.array([[1, 1], [1, 0], [0, 0], [0, 0]], bool), 2)
    assert macs == 1 and (merged == [[1, 1], [1, 1], [0, 0], [0, 0]]).all()


def test_calls_count_as_often_as_they_come() -> None:
    """Uniting two rare masks of dear branches is cheaper than uniting two frequent ones of cheap branches."""
    made = tuple(Branch(f"{n}.b", macs, (2, 3), params=1) for n, macs in enumerate((10, 10, 13, 13)))
    graph = BranchGraph(made, other_macs=5, other_params=1)
    rows = [[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    merged, macs = merge(graph, np.array(rows, bool), 4)
    assert macs == 26 and merged[5:].tolist() == [[False, False, True, True]] * 2
    assert merged[:5].tolist() == np.array(rows[:5], bool).tolist()


def test_what_cannot_be_merged_is_one_line() -> None:
    graph = BranchGraph((Branch("0.b", 1, (2, 3), params=1),), other_macs=5, other_params=1)
    for max_graphs in (0, -3):
        with pytest.raises(ScheduleError, match=f"at most {max_graphs} graphs .* pass --max-graphs 1 or more"):
            merge(graph, np.ones((3, 1), bool), max_graphs)
    with pytest.raises(ScheduleError, match=r"\(3, 2\) does not fit a model of 1 branches"):
        merge(graph, np.ones((3, 2), bool), 2)
