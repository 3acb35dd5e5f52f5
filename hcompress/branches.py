"""The cacheable branches of a network: what they are called, what they cost, what a slot of each holds.

A branch is a residual branch (attention, MLP, ...) whose output may be kept and reused at a later model call.
Order is execution order; it is the column order of every schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import ScheduleError


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    name:   "<layer>.<branch>", such as "3.attn"
    macs:   multiply-accumulates of one evaluation for one sample (one row of the network's batch)
    shape:  of its output for one sample, such as (tokens, width)
    params: parameters that nothing but this branch uses, so that a call which reuses it does not need them
    """

    name: str
    macs: int
    shape: tuple[int, ...]
    params: int


@dataclass(frozen=True)
class BranchGraph:
    """The N branches of a network in execution order, and what lies outside all of them.

    other_macs:   of one call, for one row of the network's batch
    other_params: parameters that belong to no branch alone; equal copies of a module count once
    """

    branches: tuple[Branch, ...]
    other_macs: int
    other_params: int

    def __len__(self) -> int:
        return len(self.branches)

    @property
    def names(self) -> tuple[str, ...]:
        """The N branch names in column order."""
        return tuple(branch.name for branch in self.branches)

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each branch, the last axis of what it gives: channels, which corrections tell apart."""
        return tuple(branch.shape[-1] for branch in self.branches)

    @property
    def macs(self) -> NDArray[np.int64]:
        """int64[N], MACs of each branch for one row of the network's batch."""
        return np.array([branch.macs for branch in self.branches], np.int64)

    @property
    def call_macs(self) -> int:
        """MACs of one call that computes everything, for one row of the network's batch."""
        return self.other_macs + int(self.macs.sum())

    @property
    def total_params(self) -> int:
        """Parameters of the network; equal copies of a module count once."""
        return self.other_params + sum(branch.params for branch in self.branches)

    def total_macs(self, compute: NDArray[np.bool_]) -> int:
        """MACs of one generation of one row under `compute`, bool[T, N]."""
        self._check(compute)
        return int(len(compute) * self.other_macs + (compute @ self.macs).sum())

    def mac_ratio(self, compute: NDArray[np.bool_]) -> float:
        """MACs of the dense model over MACs under `compute`, bool[T, N]: the speed-up that arithmetic allows."""
        return self.total_macs(np.ones_like(compute)) / self.total_macs(compute)

    def _check(self, compute: NDArray[np.bool_]) -> None:
        if compute.ndim != 2 or compute.shape[1] != len(self):
            raise ScheduleError(f"a mask of shape {compute.shape} does not fit a model of {len(self)} branches")
