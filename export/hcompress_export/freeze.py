"""From a mask to a plan: which slots exist, and from when to when."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.errors import ScheduleError
from hcompress_runtime.plan import Plan, Step


def freeze(graph: BranchGraph, compute: NDArray[np.bool_]) -> Plan:
    """The plan of `compute`, bool[T, N]: exact liveness, as hcompress_runtime.plan defines it.

    A mask that computes everything gives the dense plan, which has no slots.
    Raises ScheduleError for a mask that does not fit the graph, or whose first row reuses.
    """
    if compute.ndim != 2 or compute.shape[1] != len(graph):
        raise ScheduleError(f"a mask of shape {compute.shape} does not fit a model of {len(graph)} branches")
    if not len(compute) or not compute[0].all():
        raise ScheduleError("the first call must compute every branch; nothing is cached before it")
    names = np.array(graph.names, object)
    next_reuses = np.vstack([~compute[1:], np.zeros_like(compute[:1])])  # after the last call nothing is read
    steps = tuple(
        Step(
            computes=tuple(names[computed]),
            reads=tuple(names[~computed]),
            writes=tuple(names[computed & kept]),
            frees=tuple(names[~computed & ~kept]),
        )
        for computed, kept in zip(compute, next_reuses, strict=True)
    )
    slots = {
        branch.name: branch.shape for branch, reused in zip(graph.branches, ~compute.T, strict=True) if any(reused)
    }
    return Plan(graph.names, slots, steps)
