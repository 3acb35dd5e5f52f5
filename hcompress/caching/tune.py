"""Tuning corrections: gradient descent on the error of the finished image.

Least squares (hcompress.caching.correct) makes each branch's error small, one call at a time. The image's error is what
all calls add up to, and the network answers on the way: on zoo:fashion-dit, every third call computed, it has smaller
errors than Taylor's rule at nearly every call and images that are 2 dB worse. So what counts is descended on itself,

    L = mean over samples of log mean (x_cached - x_dense)^2          a PSNR but for its factor

back-propagated through all T calls into a, d and b, of order 2 e too. The network stays as it is. Each call is run
again on the way back, so that memory holds what lies between calls and the activations of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hcompress.adapter import Condition
from hcompress.caching.problem import TINY, Problem
from hcompress.corrections import TERMS, Corrections, history
from hcompress.sampling import Older, Slots, Terms, constants_of, hard_route, sample, solver_output, trajectory

TUNING_STREAMS = 5 << 32  # sample numbers, beside those of hcompress.caching.problem
RATES = {"a": 6e-3, "d": 2e-2, "b": 2e-3, "e": 2e-2}  # of Adam; b counts in units of its branch's root mean square
BETAS, WARM_UP, BATCH = (0.9, 0.95), 5, 8  # steps; noises a step and rank

Vectors = Mapping[str, list[Tensor]]
"""A name of TERMS -> [T, D] of each of the N branches. Those of order 1 lack "e"."""


def tune(problem: Problem, compute: NDArray[np.bool_], start: Corrections, steps: int, order: int = 1) -> Corrections:
    """Corrections of the mask bool[T, N] after `steps` steps from `start`: of both, those of the better samples.

    order: of what comes of it; `start` may be of a lower one
    """
    sizes = _sizes(problem)
    vectors: Vectors = {
        name: [
            torch.from_numpy(rows / (size if name == "b" else 1.0)).float().to(problem.adapter.device).requires_grad_()
            for rows, size in zip(getattr(start, name), sizes, strict=True)
        ]
        for name in TERMS[: order + 2]
    }
    optimizer = torch.optim.Adam([{"params": rows} for rows in vectors.values()], lr=1.0, betas=BETAS)
    for step in range(steps):
        pace = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, name in zip(optimizer.param_groups, vectors, strict=True):
            group["lr"] = RATES[name] * pace
        first = TUNING_STREAMS + (step * problem.ranks.world + problem.ranks.rank) * BATCH
        condition, noise, noises = problem.draw(first, BATCH)
        run: dict[str, Any] = {"cfg": problem.cfg, "noises": noises}
        dense = sample(problem.teacher or problem.adapter, problem.table, condition, noise, **run)
        cached = _sample(problem, compute, vectors, sizes, condition, noise, noises)
        error = (cached - dense).square().flatten(1).mean(dim=1)
        optimizer.zero_grad(set_to_none=False)
        (error + TINY).log().mean().backward()
        for rows in [tensor for group in vectors.values() for tensor in group]:
            rows.grad = None if rows.grad is None else problem.ranks.mean(rows.grad).nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
    tuned = _corrections(vectors, sizes, compute)
    scores = problem.scores_db(compute, {"start": start, "tuned": tuned}, 2 * BATCH)
    return tuned if next(iter(scores), "start") == "tuned" else start


def _sample(
    problem: Problem,
    compute: NDArray[np.bool_],
    vectors: Vectors,
    sizes: list[float],
    condition: Condition,
    start: Tensor,
    noises: list[Tensor],
) -> Tensor:
    """As hcompress.sampling.sample, with gradient with regard to `vectors`."""
    adapter, table, order = problem.adapter, problem.table, 2 if "e" in vectors else 1
    allowed = _allowed(compute)
    slots: Slots = {}
    older: Older = {}
    outputs: list[Tensor] = []

    def term(name: str, call: int, branch: int) -> Tensor | None:
        if name not in vectors or not allowed[name][call, branch]:
            return None
        row = vectors[name][branch][call]
        return (row * sizes[branch] if name == "b" else row).to(adapter.dtype)

    def terms_at(call: int) -> dict[int, Terms]:
        reused = np.flatnonzero(~compute[call]).tolist()
        return {branch: Terms(*(term(name, call, branch) for name in TERMS)) for branch in reused}

    def run(call: int, constants: Any, x: Tensor, slots: Slots, older: Older) -> tuple[Tensor, Slots, Older]:
        slots, older = dict(slots), dict(older)
        route = hard_route(compute[call], slots, terms_at(call), older, order)
        raw = adapter.guided(x, condition, constants, problem.cfg, route)
        return solver_output(raw, constants, table.noise_of(call, noises), adapter.sample_shape[0]), slots, older

    for call, constants in enumerate(constants_of(adapter, table)):
        x = table.combine(call, start, outputs, noises)
        output, slots, older = checkpoint(run, call, constants, x, slots, older, use_reentrant=False)
        outputs.append(output)
    return table.combine(table.num_calls, start, outputs, noises)


def _sizes(problem: Problem) -> list[float]:
    """Root mean square of what each branch gives, over the calls of a few dense samples."""
    condition, start, noises = problem.draw(TUNING_STREAMS, BATCH)
    everything = np.ones(problem.shape, np.bool_)
    run: dict[str, Any] = {"cfg": problem.cfg, "compute": everything, "noises": noises}
    squares = [
        [float(slots[branch].float().square().mean()) for branch in range(problem.shape[1])]
        for _, _, slots in trajectory(problem.adapter, problem.table, condition, start, **run)
    ]
    return np.maximum(problem.ranks.mean(torch.tensor(squares)).mean(dim=0).sqrt().numpy(), TINY).tolist()


def _corrections(vectors: Vectors, sizes: list[float], compute: NDArray[np.bool_]) -> Corrections:
    """As a schedule carries them; what diverged falls to plain."""
    allowed = _allowed(compute)

    def rows(name: str) -> tuple[NDArray[np.float32], ...]:
        each = []
        for branch, size in enumerate(sizes):
            values = vectors[name][branch].detach().cpu().numpy() * (size if name == "b" else 1.0)
            each.append(np.nan_to_num(values * allowed[name][:, [branch]], posinf=0.0, neginf=0.0).astype(np.float32))
        return tuple(each)

    found = {name: rows(name) for name in vectors}
    return Corrections("corrected", **{"e": tuple(map(np.zeros_like, found["a"]))} | found)


def _allowed(compute: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """A name of TERMS -> bool[T, N], where it may be other than zero."""
    return {"a": ~compute, "d": history(compute), "b": ~compute, "e": history(compute, 2)}
