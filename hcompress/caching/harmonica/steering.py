"""Steering: beta such that the hard schedule lands on a wanted CUR or speed-up. Not in the paper, which fixes beta.

beta is multiplied, once a trajectory, by exp(GAIN x (wanted - heading)). `heading` is what will be reused if every
logit goes on for a while as it has been going: a logit takes many trajectories to cross over, and a controller that
only looked at what is reused now would overshoot by all that is already on its way.

The target rises linearly over the first part of the run, as in gradual pruning (Zhu and Gupta 2017): while every r is
near 1/2 all branches look more needed than they will be (recipes/LOG.md).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.caching.harmonica.router import Router
from hcompress.caching.settings import HarmoniCaSettings

GAIN = 0.5  # log beta, a trajectory and unit of CUR error
MOMENTUM = 0.8  # of the running mean of each logit's velocity, in trajectories
NEAR, EXTENSION = 0.01, 1.25  # a steered run goes on to this multiple of its length until it is this near its goal


class Steering:
    """What beta is to reach. Where beta is fixed it does nothing.

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

    def start(self, router: Router, needs: NDArray[np.float64]) -> None:
        """Give beta its scale: the median of the needs -d(lambda MSE)/dr, [T - 1, N], of the first trajectory."""
        if self.settings.beta is None:
            positive = needs[needs > 0]
            router.beta = float(np.median(positive)) if positive.size else 1.0

    def steer(self, router: Router) -> None:
        """Move `router.beta`, once a trajectory, from how far the logits moved in it."""
        if self.settings.beta is not None:
            return
        settings, logits = self.settings, router.logits().astype(np.float64)
        momentum = MOMENTUM if router.trajectory else 0.0
        router.velocity = momentum * router.velocity + (1 - momentum) * (logits - router.previous)
        router.previous = logits
        to_come = settings.trajectories - router.trajectory
        horizon = max(0.0, min(settings.clamp / settings.lr, to_come))  # trajectories from a clamp to 0 at full speed
        ahead = np.clip(logits + horizon * router.velocity, -settings.clamp, settings.clamp)
        heading = float((self.weights * (ahead <= self.edge)).sum())
        risen = min(1.0, (router.trajectory + 1) / (settings.ramp * settings.trajectories))
        router.beta *= math.exp(GAIN * (self.wanted * risen - heading))

    @property
    def edge(self) -> float:
        """The logit of tau."""
        return math.log(self.settings.threshold / (1 - self.settings.threshold))

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
