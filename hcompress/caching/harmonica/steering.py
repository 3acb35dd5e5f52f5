"""Steering: beta such that the hard schedule lands on a wanted CUR or speed-up. Not in the paper, which fixes beta.

The loss is nearly quadratic in r: need = -d(lambda MSE)/dr ~ a (1 - r), so an entry settles at r <= tau once
beta >= a (1 - tau). Steering therefore puts beta between the last entry that is to be reused and the next, in the
order of a (1 - tau); an integral term removes what the approximation leaves. A quantile of the needs themselves would
stall: they shrink as r rises, and beta with them (recipes/LOG.md).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.caching.harmonica.router import Router
from hcompress.caching.settings import HarmoniCaSettings

MOMENTUM = 0.9  # of the running mean of each entry's curvature, in trajectories
LEAST_REUSE = 0.05  # least 1 - r by which a need is divided: above r = 0.95 it says little
LEAST_LAMBDA = 1e-20
GAIN = 0.25  # log beta a trajectory and unit of CUR error, once logits have had time to travel
NEAR, EXTENSION = 0.01, 1.25  # a steered run goes on to this multiple of its length until it is this near its goal


class Steering:
    """What beta is to reach. Without a target it leaves beta alone.

    weights: float64[T, N], what reusing each entry counts towards `wanted`: 1 / (T N) for a CUR, MACs for a speed-up
    """

    def __init__(self, graph: BranchGraph, num_calls: int, settings: HarmoniCaSettings) -> None:
        shape = (num_calls, len(graph))
        self.settings = settings
        if settings.target_speedup is not None:
            total = graph.total_macs(np.ones(shape, bool))
            self.weights, self.wanted = np.tile(graph.macs / total, (num_calls, 1)), 1 - 1 / settings.target_speedup
        else:
            self.weights, self.wanted = np.full(shape, 1 / np.prod(shape)), settings.target_cur or 0.0

    def observe(self, router: Router, call: int, gradient: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
        """Take in d(lambda MSE)/dtheta of row `call`, [N], at r = `scores`, [N]."""
        need = -gradient / (scores * (1 - scores)) / max(router.lambdas[call], LEAST_LAMBDA)
        curvature = need / np.maximum(1 - scores, LEAST_REUSE)
        momentum = MOMENTUM if router.trajectory else 0.0
        router.curvature[call] = momentum * router.curvature[call] + (1 - momentum) * curvature

    def steer(self, router: Router) -> None:
        """Set `router.beta`, once a trajectory."""
        if self.settings.beta is not None:
            return
        travel = 2 * math.log(1 / self.settings.threshold - 1)  # from the other side to the threshold
        if router.trajectory * self.settings.lr > travel:
            router.integral += GAIN * (self.wanted - self.reused(router))
        needs = router.lambdas[1:, None] * np.maximum(router.curvature[1:], 0.0)
        settled = needs.ravel() * (1 - self.settings.threshold)
        order = np.argsort(settled)
        filled = np.cumsum(self.weights[1:].ravel()[order])
        last = int(np.argmin(np.abs(filled - self.wanted)))  # the last entry to be reused
        between = settled[order[last : last + 2]]
        router.beta = math.sqrt(float(between[0] * between[-1])) * math.exp(router.integral)

    def reused(self, router: Router) -> float:
        """What the hard schedule reuses, in the units of `wanted`."""
        return float((self.weights * ~router.hard(self.settings.threshold)).sum())

    def may_end(self, router: Router) -> bool:
        """Whether the wanted trajectories are done and, where beta is steered, the goal is met.

        Met is to NEAR or to half an entry, whichever is coarser; at EXTENSION times the wanted length it ends anyway.
        """
        done, wanted = router.trajectory, self.settings.trajectories
        if done < wanted or self.settings.beta is not None:
            return done >= wanted
        near = abs(self.reused(router) - self.wanted) <= max(NEAR, self.weights.max() / 2)
        return near or done >= EXTENSION * wanted
