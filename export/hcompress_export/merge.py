"""Fewer distinct masks, for fewer graphs: reuse is turned into compute, never compute into reuse."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.errors import ScheduleError


def merge(graph: BranchGraph, compute: NDArray[np.bool_], max_graphs: int) -> tuple[NDArray[np.bool_], int]:
    """bool[T, N] with at most `max_graphs` distinct rows, and the MACs that this gives up.

    Calls with equal masks are a class. The two classes that cost least to unite are united, until few enough are left;
    both then compute what either did. What that costs is counted over all their calls. One union is the best there is;
    several in a row need not be, as in all agglomerative clustering (Ward 1963).

    The MACs are those of one generation, for one row of the network's batch. Equal masks are one graph where the plan
    is frozen with `widen`; exact liveness may make several of them. Row 0 computes everything and goes on doing so.
    Raises ScheduleError for `max_graphs` below 1 and for a mask that does not fit the graph.
    """
    if max_graphs < 1:
        raise ScheduleError(f"at most {max_graphs} graphs can run nothing; pass --max-graphs 1 or more")
    before = graph.total_macs(compute)
    masks, class_of, calls = np.unique(compute, axis=0, return_inverse=True, return_counts=True)
    class_of = class_of.reshape(-1)  # NumPy 2.0 gives it a second axis
    while len(masks) > max_graphs:
        costs = _union_costs(masks, calls, graph.macs)
        kept, gone = divmod(int(costs.argmin()), len(masks))
        masks[kept] |= masks[gone]
        calls[kept] += calls[gone]
        class_of[class_of == gone] = kept
        class_of[class_of > gone] -= 1
        masks, calls = np.delete(masks, gone, axis=0), np.delete(calls, gone)
    merged = masks[class_of]
    return merged, graph.total_macs(merged) - before


def _union_costs(masks: NDArray[np.bool_], calls: NDArray[np.int64], macs: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[K, K], the MACs that uniting classes i < j adds over all their calls; elsewhere the largest integer.

    masks bool[K, N] of K classes, calls int64[K] in each, macs int64[N] of each branch.
    """
    common = (masks * macs) @ masks.T.astype(np.int64)  # [K, K]
    own = common.diagonal()
    extra = own[:, None] - common  # [i, j]: what i adds to each call of j
    costs = calls * extra + (calls * extra).T
    costs[np.tril_indices(len(masks))] = np.iinfo(np.int64).max
    return costs
