"""Steering: beta such that the hard schedule lands on a wanted CUR or speed-up. Not in the papers, which fix beta.

beta is multiplied, once a round, by exp(GAIN x (wanted - heading)). `heading` is what will be reused if every logit
goes on for a while as it has been going: a logit takes many rounds to cross over, and a controller that only looked at
what is reused now would overshoot by all that is already on its way.

The target rises linearly over the first part of the run, as in gradual pruning (Zhu and Gupta 2017): while every r is
near 1/2 all branches look more needed than they will be (recipes/LOG.md).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.caching.router import Router
from hcompress.caching.settings import RouterSettings
from hcompress.errors import RecipeError

GAIN = 0.5  # log beta, a round and unit of CUR error
MOMENTUM = 0.8  # of the running mean of each logit's velocity, in rounds
NEAR, EXTENSION = 0.01, 1.25  # a steered run goes on to this multiple of its length until it is this near its goal


class Steering:
    """What beta is to reach within `rounds`. Where beta is fixed it does nothing.

    weights: float64[T, N], what reusing each entry counts towards `wanted`: 1 / (T N) for a CUR, MACs for a speed-up

    Raises RecipeError for a speed-up beyond that of reusing every row that learns.
    """

    def __init__(self, graph: BranchGraph, router: Router, settings: RouterSettings, rounds: int) -> None:
        shape = router.previous.shape
        self.settings, self.rounds = settings, rounds
        if settings.target_speedup is not None:
            total = graph.total_macs(np.ones(shape, bool))
            self.weights, self.wanted = np.tile(graph.macs / total, (shape[0], 1)), 1 - 1 / settings.target_speedup
            most = float(self.weights[router.learned].sum())
            if self.wanted > most:
                raise RecipeError(
                    f"caching.target_speedup = {settings.target_speedup} is out of reach: reusing all that "
                    f"{settings.method} may reuse divides MACs by {1 / (1 - most):.2f}"
                )
        else:
            self.weights, self.wanted = np.full(shape, 1 / np.prod(shape)), settings.target_cur or 0.0

    def start(self, router: Router, needs: NDArray[np.float64]) -> None:
        """Give beta its scale: the median of the needs -d error/dr, float64[rows, N], of the first round."""
        if self.settings.beta is None:
            positive = needs[needs > 0]
            router.beta = float(np.median(positive)) if positive.size else 1.0

    def steer(self, router: Router) -> None:
        """Move `router.beta`, once a round, from how far the logits moved in it."""
        if self.settings.beta is not None:
            return
        settings, logits = self.settings, router.logits().astype(np.float64)
        momentum = MOMENTUM if router.round else 0.0
        router.velocity = momentum * router.velocity + (1 - momentum) * (logits - router.previous)
        router.previous = logits
        to_come = self.rounds - router.round
        horizon = max(0.0, min(settings.clamp / settings.lr, to_come))  # rounds from a clamp to 0 at full speed
        ahead = np.clip(logits + horizon * router.velocity, -settings.clamp, settings.clamp)
        heading = float((self.weights * (ahead <= self.edge)).sum())
        risen = min(1.0, (router.round + 1) / (settings.ramp * self.rounds))
        router.beta *= math.exp(GAIN * (self.wanted * risen - heading))

    @property
    def edge(self) -> float:
        """The logit of tau."""
        return math.log(self.settings.threshold / (1 - self.settings.threshold))

    def reused(self, router: Router) -> float:
        """What the hard schedule reuses, in the units of `wanted`."""
        return float((self.weights * ~router.hard()).sum())

    def may_end(self, router: Router) -> bool:
        """Whether the wanted rounds are done and, where beta is steered, the goal is met.

        Met is to NEAR or to half an entry, whichever is coarser; at EXTENSION times the wanted length it ends anyway.
        """
        if router.round < self.rounds or self.settings.beta is not None:
            return router.round >= self.rounds
        near = abs(self.reused(router) - self.wanted) <= max(NEAR, self.weights.max() / 2)
        return near or router.round >= EXTENSION * self.rounds
