"""From a mask to a plan: which slots exist, and from when to when."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.corrections import Corrections
from hcompress.errors import ScheduleError
from hcompress_runtime.plan import Plan, Step, before

Mask = NDArray[np.bool_]
"""bool[T, N]"""


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
    corrects = older = np.zeros_like(compute)
    if corrections is not None:
        corrections.check_fits(compute, graph.names)
        corrects, older = corrections.changes, corrections.uses_older
    plan = _plan(graph, compute, corrects, older, widen)
    if not finish or widen or not corrects.any():
        return plan
    finished = _plan(graph, compute, *_finished(compute, corrects, older), widen)
    return finished if len(finished.patterns) <= len(plan.patterns) else plan


def _plan(graph: BranchGraph, compute: Mask, corrects: Mask, older: Mask, widen: bool) -> Plan:
    """corrects: where a value is corrected, as it is read or, where it is computed, as it is written; older: with p."""
    reuse = ~compute
    needs_p = _needs_p(compute, older)
    wanted = _next(reuse | needs_p)  # what a branch's own slot holds in the end: as c, or to be kept as p
    writes = compute & wanted
    frees, frees_p = (reuse | writes) & ~wanted, needs_p & ~_next(reuse & needs_p)
    enters, enters_p = corrects, older
    if widen:
        surplus = _of_equal(compute, writes) & ~writes
        writes, frees = writes | surplus, frees | surplus
        enters, enters_p = _of_equal(compute, corrects), _of_equal(compute, older)
    names = np.array(graph.names, object)
    names_p = np.array([before(name) for name in graph.names], object)
    steps = tuple(
        Step(
            computes=tuple(names[compute[t]]),
            reads=(*names[reuse[t]], *names_p[older[t]]),
            writes=tuple(names[writes[t]]),
            frees=(*names[frees[t]], *names_p[frees_p[t]]),
            keeps=tuple(names[(compute & needs_p)[t]]),
            corrects=(*names[enters[t]], *names_p[enters_p[t]]),
        )
        for t in range(len(compute))
    )
    slots = {}
    for n, branch in enumerate(graph.branches):
        if reuse[:, n].any():
            slots[branch.name] = branch.shape
        if needs_p[:, n].any():
            slots[before(branch.name)] = branch.shape
    return Plan(graph.names, slots, steps)


def _needs_p(compute: Mask, older: Mask) -> Mask:
    """Where, from a call on to the one before the branch is computed again, some call looks at p."""
    needs = older.copy()
    for t in reversed(range(len(compute) - 1)):
        needs[t] |= needs[t + 1] & ~compute[t + 1]
    return needs


def _finished(compute: Mask, corrects: Mask, older: Mask) -> tuple[Mask, Mask]:
    """The same two, where a value that only the next call reads, and corrects, is corrected as it is written."""
    wanted = _next(~compute | _needs_p(compute, older))
    early = compute & _next(corrects & ~wanted)
    late = np.roll(early, 1, axis=0)  # the last call computes nothing early
    return corrects & ~late | early, older & ~late | early & _next(older)


def _next(mask: Mask) -> Mask:
    """What holds at the next call; nothing does after the last."""
    return np.vstack([mask[1:], np.zeros_like(mask[:1])])


def _of_equal(compute: Mask, wanted: Mask) -> Mask:
    """What is wanted at any call of the same row of `compute`."""
    united = wanted.copy()
    for row in np.unique(compute, axis=0):
        equal = (compute == row).all(axis=1)
        united[equal] = wanted[equal].any(axis=0)
    return united
