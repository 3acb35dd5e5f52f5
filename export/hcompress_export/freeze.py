"""From a mask to a plan: which slots exist, and from when to when."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.corrections import Corrections
from hcompress.errors import ScheduleError
from hcompress_runtime.plan import Plan, Step, before

Mask = NDArray[np.bool_]
"""bool[T, N]"""
Depth = NDArray[np.int64]
"""int[T, N], of Corrections: how many values before c a correction looks at."""
Array = TypeVar("Array", Mask, Depth)


def freeze(
    graph: BranchGraph,
    compute: Mask,
    corrections: Corrections | None = None,
    *,
    widen: bool = False,
    finish: bool = True,
) -> Plan:
    """The plan of `compute`, bool[T, N]: exact liveness, as hcompress_runtime.plan defines it.

    corrections: of what is reused; without any, every slot is yielded as it is
    widen:  steps with equal masks write what any of them has to, and free at once what the next call does not read;
            they correct what any of them has to. They then share one graph, for some needless writes; what is kept
            from call to call stays the same.
    finish: where a value has one reader, which is corrected, the call that computes it writes what that reader yields;
            not where this makes more graphs, as it does where only some values have one reader, nor with `widen`

    A mask that computes everything gives the dense plan, which has no slots.
    Raises ScheduleError for a mask that does not fit the graph, or whose first row reuses, and for corrections that do
    not fit the mask.
    """
    if compute.ndim != 2 or compute.shape[1] != len(graph):
        raise ScheduleError(f"a mask of shape {compute.shape} does not fit a model of {len(graph)} branches")
    if not len(compute) or not compute[0].all():
        raise ScheduleError("the first call must compute every branch; nothing is cached before it")
    corrects, depth = np.zeros_like(compute), np.zeros(compute.shape, int)
    if corrections is not None:
        corrections.check_fits(compute, graph.names)
        corrects, depth = corrections.changes, corrections.depth
    plan = _plan(graph, compute, corrects, depth, widen)
    if not finish or widen or not corrects.any():
        return plan
    finished = _plan(graph, compute, *_finished(compute, corrects, depth), widen)
    return finished if len(finished.patterns) <= len(plan.patterns) else plan


def _plan(graph: BranchGraph, compute: Mask, corrects: Mask, depth: Depth, widen: bool) -> Plan:
    """corrects: where a value is corrected, as it is read or, where it is computed, as it is written; depth: how."""
    reuse = ~compute
    holds_p, holds_q = _holds(compute, depth)
    stays_c, stays_p, stays_q = (
        _next(reuse | holds_p),
        _next(reuse & holds_p | compute & holds_q),
        _next(reuse & holds_q),
    )
    writes = compute & stays_c
    frees = (reuse | writes) & ~stays_c
    enters, entering = corrects, depth
    if widen:
        surplus = _of_equal(compute, writes) & ~writes
        writes, frees = writes | surplus, frees | surplus
        enters, entering = _of_equal(compute, corrects), _of_equal(compute, depth)
    names = np.array(graph.names, object)
    names_p = np.array([before(name) for name in graph.names], object)
    names_q = np.array([before(name) for name in names_p], object)
    steps = tuple(
        Step(
            computes=tuple(names[compute[t]]),
            reads=(*names[reuse[t]], *names_p[depth[t] >= 1], *names_q[depth[t] == 2]),
            writes=tuple(names[writes[t]]),
            frees=(*names[frees[t]], *names_p[(holds_p & ~stays_p)[t]], *names_q[(holds_q & ~stays_q)[t]]),
            keeps=(*names_p[(compute & holds_q)[t]], *names[(compute & holds_p)[t]]),
            corrects=(*names[enters[t]], *names_p[entering[t] >= 1], *names_q[entering[t] == 2]),
        )
        for t in range(len(compute))
    )
    slots = {}
    for n, branch in enumerate(graph.branches):
        for name, held in ((names[n], reuse), (names_p[n], holds_p), (names_q[n], holds_q)):
            if held[:, n].any():
                slots[name] = branch.shape
    return Plan(graph.names, slots, steps)


def _holds(compute: Mask, depth: Depth) -> tuple[Mask, Mask]:
    """Where p's slot holds something, and where q's: what this or a later call looks at, p as it is or as q by then."""
    holds_p, holds_q = depth >= 1, depth == 2
    for t in reversed(range(len(compute) - 1)):
        same = ~compute[t + 1]  # p and q of the next call are those of this one
        holds_p[t] |= np.where(same, holds_p[t + 1], holds_q[t + 1])
        holds_q[t] |= same & holds_q[t + 1]
    return holds_p, holds_q


def _finished(compute: Mask, corrects: Mask, depth: Depth) -> tuple[Mask, Depth]:
    """The same two, where a value that only the next call reads, and corrects, is corrected as it is written."""
    stays = _next(~compute | _holds(compute, depth)[0])
    early = compute & _next(corrects & ~stays)
    late = np.roll(early, 1, axis=0)  # the last call computes nothing early
    return corrects & ~late | early, np.where(early, _next(depth), np.where(late, 0, depth))


def _next(rows: Array) -> Array:
    """What is so at the next call; nothing is after the last."""
    return np.vstack([rows[1:], np.zeros_like(rows[:1])])


def _of_equal(compute: Mask, wanted: Array) -> Array:
    """The most that is wanted at any call of the same row of `compute`."""
    united = wanted.copy()
    for row in np.unique(compute, axis=0):
        equal = (compute == row).all(axis=1)
        united[equal] = wanted[equal].max(axis=0)
    return united
