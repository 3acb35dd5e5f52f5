"""From a mask to a plan: which slots exist, and from when to when."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.errors import ScheduleError
from hcompress_runtime.plan import Plan, Step


def freeze(graph: BranchGraph, compute: NDArray[np.bool_], *, widen: bool = False) -> Plan:
    """The plan of `compute`, bool[T, N]: exact liveness, as hcompress_runtime.plan defines it.

    widen: steps with equal masks write what any of them has to, and free at once what the next call does not read.
           They then share one graph, for some needless writes; what is kept from call to call stays the same.

    A mask that computes everything gives the dense plan, which has no slots.
    Raises ScheduleError for a mask that does not fit the graph, or whose first row reuses.
    """
    if compute.ndim != 2 or compute.shape[1] != len(graph):
        raise ScheduleError(f"a mask of shape {compute.shape} does not fit a model of {len(graph)} branches")
    if not len(compute) or not compute[0].all():
        raise ScheduleError("the first call must compute every branch; nothing is cached before it")
    names = np.array(graph.names, object)
    next_reuses = np.vstack([~compute[1:], np.zeros_like(compute[:1])])  # after the last call nothing is read
    writes = compute & next_reuses
    if widen:
        for row in np.unique(compute, axis=0):
            equal = (compute == row).all(axis=1)
            writes[equal] = writes[equal].any(axis=0)
    frees = (~compute | writes) & ~next_reuses
    steps = tuple(
        Step(
            computes=tuple(names[compute[t]]),
            reads=tuple(names[~compute[t]]),
            writes=tuple(names[writes[t]]),
            frees=tuple(names[frees[t]]),
        )
        for t in range(len(compute))
    )
    slots = {
        branch.name: branch.shape for branch, reused in zip(graph.branches, ~compute.T, strict=True) if any(reused)
    }
    return Plan(graph.names, slots, steps)
