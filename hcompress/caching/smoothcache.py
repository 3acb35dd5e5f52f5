"""SmoothCache (Liu et al. 2024, arXiv 2411.10510): skip calls while the outputs of a kind of branch change little.

One uncached pass over a few samples measures, for each kind of branch (attention, MLP, ...) and each gap g,

    e[g, k] = mean over the branches of this kind of |f(k + g) - f(k)|_1 / |f(k + g)|_1

and the schedule follows greedily: from call k on, the largest g <= lookahead with e[g, k] <= alpha is skipped, and the
call after those computes. First and last call compute (calibration_helper.py of the released code, 54ebe11). All
branches of a kind share one decision, so a schedule has as many different columns as there are kinds.

A target is met by looking at every alpha that makes a difference: there is one for each measured error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcompress.caching.problem import TRAINING_STREAMS, Found, Problem
from hcompress.caching.rules import FAR
from hcompress.caching.settings import SmoothCacheSettings
from hcompress.errors import NoSchedule
from hcompress.sampling import trajectory

Errors = Mapping[str, NDArray[np.float64]]
"""Kind of branch -> float64[lookahead, T]: row g - 1 is e[g, k] at call k, inf where k + g is past the last call."""


def smoothcache(problem: Problem, settings: SmoothCacheSettings) -> Found:
    """Calibrate and schedule. Raises NoSchedule where no alpha comes near the target."""
    errors = measure(problem, settings.lookahead, settings.samples)
    names, graph = problem.adapter.graph.names, problem.adapter.graph
    alpha = settings.alpha
    if alpha is None:
        candidates = [0.0, *np.unique([error for table in errors.values() for error in table.ravel()])[:-1].tolist()]
        masks = {alpha: schedule(errors, names, alpha) for alpha in candidates}
        if settings.target_cur is not None:
            wanted, reached = settings.target_cur, _cur
        else:  # in MACs saved, which like a CUR are a share
            assert settings.target_speedup is not None
            wanted, reached = 1 - 1 / settings.target_speedup, lambda mask: 1 - 1 / graph.mac_ratio(mask)
        alpha = nearest(masks, wanted, reached)
        if abs(reached(masks[alpha]) - wanted) > FAR:
            raise NoSchedule(
                f"no alpha saves {100 * wanted:.0f} %: the nearest is {alpha:.3g} with "
                f"{100 * reached(masks[alpha]):.0f} %; raise caching.lookahead = {settings.lookahead}, "
                "or change the target"
            )
    mask = schedule(errors, names, alpha)
    records = [
        {"branches": kind, "gap": gap + 1, "errors": [round(error, 6) for error in row[: -gap - 1].tolist()]}
        for kind, table in errors.items()
        for gap, row in enumerate(table)
    ]
    return Found(mask, {"alpha": alpha}, records=records)


@torch.no_grad()
def measure(problem: Problem, lookahead: int, samples: int) -> Errors:
    """Relative L1 errors of `samples` uncached generations, averaged over branches of a kind and over ranks."""
    calls, branches = problem.shape
    lookahead = min(lookahead, calls - 1)
    condition, start, noises = problem.draw(TRAINING_STREAMS + problem.ranks.rank * samples, samples)
    errors = torch.full((lookahead, calls, branches), torch.inf, dtype=torch.float64)
    everything = np.ones((calls, branches), np.bool_)
    walked = trajectory(
        problem.adapter, problem.table, condition, start, cfg=problem.cfg, compute=everything, noises=noises
    )
    before: list[dict[int, Tensor]] = []  # the outputs of the last calls, the latest first
    for call, (_, _, slots) in enumerate(walked):
        for gap, past in enumerate(before, start=1):
            for branch, output in slots.items():
                change = (output.float() - past[branch].float()).abs().sum() / output.float().abs().sum()
                errors[gap - 1, call - gap, branch] = change.double()
        before = [dict(slots), *before][:lookahead]
    averaged = problem.ranks.mean(errors).numpy()
    kinds = _kinds(problem.adapter.graph.names)
    return {kind: averaged[:, :, columns].mean(axis=2) for kind, columns in kinds.items()}


def schedule(errors: Errors, names: tuple[str, ...], alpha: float) -> NDArray[np.bool_]:
    """bool[T, N] of the branches `names` for one alpha."""
    compute = np.ones((next(iter(errors.values())).shape[1], len(names)), np.bool_)
    for kind, columns in _kinds(names).items():
        compute[:, columns] = scan(errors[kind], alpha)[:, None]
    return compute


def scan(errors: NDArray[np.float64], alpha: float) -> NDArray[np.bool_]:
    """bool[T] of one kind of branch, from its errors [lookahead, T]."""
    lookahead, calls = errors.shape
    compute = np.zeros(calls, np.bool_)
    call = 0
    while call < calls:
        compute[call] = True
        call += 1 + max((gap for gap in range(1, lookahead + 1) if errors[gap - 1, call] <= alpha), default=0)
    compute[-1] = True
    return compute


def nearest(
    masks: Mapping[float, NDArray[np.bool_]], wanted: float, reached: Callable[[NDArray[np.bool_]], float]
) -> float:
    """The key whose mask comes nearest to `wanted`; of equally near ones the smallest."""
    return min(masks, key=lambda alpha: (round(abs(reached(masks[alpha]) - wanted), 9), alpha))


def _kinds(names: tuple[str, ...]) -> dict[str, list[int]]:
    """Columns of each kind of branch: what stands after the last dot of its name."""
    kinds: dict[str, list[int]] = {}
    for column, name in enumerate(names):
        kinds.setdefault(name.rpartition(".")[2], []).append(column)
    return kinds


def _cur(mask: NDArray[np.bool_]) -> float:
    return float(1 - mask.mean())
