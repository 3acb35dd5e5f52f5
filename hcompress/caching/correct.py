"""Fitting the corrections of hcompress.corrections, from noise alone.

For a branch i that call t reuses, ridge least squares over samples, rows of guidance and tokens, a channel at a time:

    min  E (f - c - a c - d (c - p) - e (p - q) - b)^2
         + RIDGE (a^2 E c^2 + d^2 E (c - p)^2 + e^2 E (p - q)^2 + b^2)

without e of order 1 and where there is no q, and without d where there is no p. f is what the branch gives on the
*cached* trajectory, where each earlier call, and each earlier branch of this one, is corrected as it was just fitted.
So one pass over one batch of noise fits everything, call after call and branch after branch, and each fit sees what it
will be given when it runs. A ridge is relative to its regressor's own energy: c - p is small, and an absolute one would
drown it.

Memory: c and p, of order 2 q too, of every branch for all samples at once. Legend: T calls, N branches, D width, K
regressors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcompress.adapter import Route
from hcompress.caching.problem import Problem, Ranks
from hcompress.caching.settings import MethodSettings
from hcompress.caching.tune import tune
from hcompress.corrections import Corrections, computed_before, differences, taylor
from hcompress.sampling import Older, Slots, Terms, constants_of, corrected, solver_output, store

RIDGE = 1e-3
MEASURED = 16  # samples by which fitted vectors are compared with Taylor's and none
FITTING_STREAMS = 3 << 32  # sample numbers of fits, beside those of hcompress.caching.problem


@dataclass(frozen=True)
class Fit:
    """What a pass found.

    terms:      one mapping a call, branch -> vectors [D], of every entry that was fitted
    degenerate: channels, of all entries together, that fell to plain: constant, or not finite
    """

    terms: Sequence[Mapping[int, Terms]]
    degenerate: int

    def corrections(self, widths: Sequence[int]) -> Corrections:
        """As a schedule carries them; of a pass that fitted reused entries alone."""
        shape = len(self.terms), len(widths)
        vectors = {name: tuple(np.zeros((shape[0], width), np.float32) for width in widths) for name in Terms._fields}
        for call, fitted in enumerate(self.terms):
            for branch, terms in fitted.items():
                for name, term in terms._asdict().items():
                    if term is not None:
                        vectors[name][branch][call] = term.cpu().float().numpy()
        return Corrections("corrected", **vectors)


@dataclass(frozen=True)
class Corrected:
    """What a mask's reused branches yield, and what a schedule's `method` says of it."""

    corrections: Corrections | None = None
    history: Mapping[str, Any] = field(default_factory=dict)


def correct(problem: Problem, compute: NDArray[np.bool_], settings: MethodSettings) -> Corrected:
    """The corrections of the mask bool[T, N] by the rule that `settings` ask for.

    Fitted ones start from least squares, Taylor's rule (of either order, where order 2 is asked for) or plain reuse,
    whichever gives the best samples, and are tuned; the history says from which, and the signal-to-noise ratios of all.
    Where none gives finite samples, reuse is plain, and the problem's `notice` is told.
    """
    if settings.reuse == "plain":
        return Corrected()
    widths, order = problem.adapter.graph.widths, settings.order
    if settings.reuse == "taylor":
        corrections = taylor(compute, widths, order)
        return Corrected(corrections, _said(corrections, compute))
    fitted = fit(problem, compute, settings.fit_samples, order)
    zeros = tuple(np.zeros((len(compute), width), np.float32) for width in widths)
    starts = {"least squares": fitted.corrections(widths)}
    if order == 2:
        starts["taylor, order 2"] = replace(taylor(compute, widths, order), rule="corrected")
    starts["taylor"] = replace(taylor(compute, widths), rule="corrected")
    starts["plain"] = Corrections("corrected", zeros, zeros, zeros, zeros)
    scores = problem.scores_db(compute, starts, MEASURED)
    if not scores:
        problem.notice("reuse is plain, not corrected: fitted, Taylor's or plain, no samples of this mask are finite")
        return Corrected(history={"reuse": "plain"})
    start = next(iter(scores))
    tuned = settings.fit_steps and not compute.all()
    corrections = tune(problem, compute, starts[start], settings.fit_steps, order) if tuned else starts[start]
    counts = _said(corrections, compute) | {"degenerate_channels": fitted.degenerate}
    return Corrected(corrections, counts | {"start": start, "start_score_db": scores})


def _said(corrections: Corrections, compute: NDArray[np.bool_]) -> dict[str, Any]:
    """What came of rule and order; order 1 goes without saying."""
    order = {"order": corrections.order} if corrections.order > 1 else {}
    return order | {"fallbacks": corrections.fallbacks(compute)}


@torch.no_grad()
def fit(problem: Problem, compute: NDArray[np.bool_], samples: int, order: int = 1, *, everywhere: bool = False) -> Fit:
    """Fit every entry that the mask bool[T, N] reuses, on `samples` noises of each rank.

    everywhere: what the mask computes too, as if it were reused there, where c exists; the trajectory goes by the mask
    """
    adapter, table, ranks = problem.adapter, problem.table, problem.ranks
    condition, start, noises = problem.draw(FITTING_STREAMS + ranks.rank * samples, samples)
    found: list[dict[int, Terms]] = [{} for _ in range(table.num_calls)]
    degenerate = 0
    slots: Slots = {}
    older: Older = {}
    outputs: list[Tensor] = []

    def route_of(call: int) -> Route:
        def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
            nonlocal degenerate
            true, given = evaluate(), slots.get(branch)
            if given is not None and (everywhere or not compute[call, branch]):
                before = older.get(branch, ())
                terms, fell = solve(true, given, before, ranks)
                found[call][branch] = terms
                degenerate += fell
                if not compute[call, branch]:
                    return corrected(given, before, terms)
            store(slots, branch, true, older, order)
            return true

        return route

    for call, constants in enumerate(constants_of(adapter, table)):
        x = table.combine(call, start, outputs, noises)
        raw = adapter.guided(x, condition, constants, problem.cfg, route_of(call))
        outputs.append(solver_output(raw, constants, table.noise_of(call, noises), adapter.sample_shape[0]))
    return Fit(found, degenerate)


def taylor_terms(
    compute: NDArray[np.bool_], order: int, device: torch.device, dtype: torch.dtype
) -> list[dict[int, Terms]]:
    """Taylor's rule for every entry of the mask bool[T, N] that has a p, as if it were reused. One mapping a call."""
    d, e = (torch.from_numpy(weights).to(dtype).to(device) for weights in differences(compute, order))
    _, p, q = computed_before(compute)

    def terms(call: int, branch: int) -> Terms:
        at = call, slice(branch, branch + 1)
        return Terms(None, d[at], None, e[at] if order == 2 and q[call, branch] >= 0 else None)

    return [
        {branch: terms(call, branch) for branch in np.flatnonzero(p[call] >= 0).tolist()}
        for call in range(len(compute))
    ]


def solve(true: Tensor, c: Tensor, older: Sequence[Tensor], ranks: Ranks) -> tuple[Terms, int]:
    """The vectors [D] of one entry, in the dtype of c, and how many channels of them fell to plain.

    true, c, and p and q in `older`: [R, L, D]. d is None where there is no p, e where there is no q. Sums are float32,
    what is solved of them float64.
    """
    changes = [later.float() - earlier.float() for later, earlier in pairwise([c, *older])]
    regressors = torch.stack([c.float(), *changes, torch.ones_like(c, dtype=torch.float32)]).flatten(1, -2)  # [K, M, D]
    missing = (true.float() - c.float()).flatten(0, -2)
    sums = torch.cat(
        [
            torch.einsum("kmd,lmd->dkl", regressors, regressors),
            torch.einsum("kmd,md->dk", regressors, missing)[:, :, None],
        ],
        dim=2,
    )
    moments = ranks.mean(sums / len(missing)).double().cpu()  # [D, K, K + 1]
    energy = moments.diagonal(dim1=1, dim2=2)  # [D, K]
    sound = moments.isfinite().flatten(1).all(1) & (energy > 0).all(1)
    moments = torch.where(sound[:, None, None], moments, torch.eye(len(regressors), len(regressors) + 1).double())
    scale = moments.diagonal(dim1=1, dim2=2).sqrt()
    gram = moments[:, :, :-1] / (scale[:, :, None] * scale[:, None, :])  # ones on its diagonal
    ridge = RIDGE * torch.eye(gram.shape[1], dtype=gram.dtype)
    solved = torch.linalg.solve(gram + ridge, moments[:, :, -1] / scale) / scale
    vectors = (solved * sound[:, None]).to(c.device, c.dtype).unbind(1)
    d, e = (vectors[1 + index] if index < len(changes) else None for index in range(2))
    return Terms(vectors[0], d, vectors[-1], e), int((~sound).sum())
