"""IEPO: lambda_k, how much the error of model call k matters for the finished image. Slides p. 4 of the paper.

    leave_one_out  mean (x0 - x0 with call k fully computed)^2, the others routed      (the paper's formula)
    cumulative     mean (z_k - z_{k-1})^2, z_k having calls 1..k routed, the rest full  (the released code)
    sensitivity    leave_one_out / mean (o_k routed - o_k full)^2                      (ours; see below)
    none           1, not measured                                                      (SDT alone, an ablation)

All generations share their calls before k, so each is forked from one running generation: T + T (T - 1) / 2 calls.

The paper's lambda is the error that call k causes, not what a unit of its error costs: a call that hardly reuses gets
a lambda near 0, and one whose small error is blown up on the way to x0 gets too little. `sensitivity` divides the
call's own one-step error out, so that lambda_k MSE_k is, to first order, the image error that call k causes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hcompress.adapter import Condition, Route
from hcompress.caching.problem import TINY
from hcompress.caching.router import soft_route
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.sampling import NOTHING, Older, Slots, Terms, fill_route
from hcompress_runtime.table import SolverTable

Cache = tuple[Slots, Older | None]
"""Slots, and `older` where corrections need it."""


class Denoiser(Protocol):
    """The guided network at one call."""

    def __call__(self, call: int, x: Tensor, condition: Condition, route: Route, noises: list[Tensor]) -> Tensor:
        """Output [B, C, H, W]."""


@torch.no_grad()
def measure(
    denoise: Denoiser,
    table: SolverTable,
    scores: NDArray[np.float64],
    settings: HarmoniCaSettings,
    condition: Condition,
    start: Tensor,
    noises: list[Tensor],
    terms: Sequence[Mapping[int, Terms]] | None = None,
) -> Tensor:
    """lambda of calls 1 .. T-1, float32[T - 1], for r = `scores` [T, N] on one batch of noise.

    terms: the corrections of each call. They belong to what is in the slots, so a full call then leaves its outputs
    there only where the schedule computes; None is plain reuse, whose full calls fill all slots.
    """
    rows = torch.from_numpy(scores).float().to(start.device)
    keep = scores > settings.threshold
    calls = table.num_calls

    def advance(call: int, outputs: list[Tensor], cache: Cache, *, routed: bool) -> list[Tensor]:
        x = table.combine(call, start, outputs, noises)
        slots, older = cache
        if call == 0 or (terms is None and not routed):
            route = fill_route(slots)
        else:
            r = rows[call] if routed else torch.ones_like(rows[call])  # at 1 the mix is what was computed, to the bit
            route = soft_route(r, keep[call], slots, terms[call] if terms else NOTHING, older, settings.order)
        return [*outputs, denoise(call, x, condition, route, noises)]

    def finish(call: int, outputs: list[Tensor], cache: Cache, *, routed: bool) -> Tensor:
        for later in range(call, calls):
            outputs = advance(later, outputs, cache, routed=routed)
        return table.combine(calls, start, outputs, noises)

    cumulative = settings.proxy == "cumulative"
    cache: Cache = {}, None if terms is None else {}
    outputs = advance(0, [], cache, routed=False)
    forked = [finish(1, outputs, _fork(cache), routed=False)] if cumulative else []
    own_errors = []
    for call in range(1, calls):
        fork = _fork(cache)
        full = [] if cumulative else advance(call, outputs, fork, routed=False)
        outputs = advance(call, outputs, cache, routed=True)
        if cumulative:
            forked.append(finish(call + 1, outputs, _fork(cache), routed=False))
        else:
            forked.append(finish(call + 1, full, fork, routed=True))
            own_errors.append(functional.mse_loss(outputs[-1], full[-1]))
    finished = table.combine(calls, start, outputs, noises)
    pairs = pairwise(forked) if cumulative else ((image, finished) for image in forked)
    lambdas = torch.stack([functional.mse_loss(a, b) for a, b in pairs])
    if settings.proxy == "sensitivity":
        lambdas = lambdas / torch.stack(own_errors).clamp(min=TINY)
    return lambdas * finished[0].numel() if settings.reduction == "sum" else lambdas


def _fork(cache: Cache) -> Cache:
    slots, older = cache
    return dict(slots), None if older is None else dict(older)


def blend(old: NDArray[np.float64], measured: NDArray[np.float64], settings: HarmoniCaSettings) -> NDArray[np.float64]:
    """`measured` with momentum on `old` and a floor, where the recipe asks for them; the paper asks for neither."""
    momentum = settings.lambda_momentum if old.any() else 0.0
    blended = momentum * old + (1 - momentum) * measured
    return np.maximum(blended, settings.lambda_floor * blended.mean())
