"""SDT: step-wise denoising training, HarmoniCa's loop (train_router.py of the released code).

It walks the student's own trajectory. At each call the teacher, everything computed, is a one-step target on the
student's state, and the router's row takes one optimiser step; nothing is back-propagated across calls:

    L = lambda_k mean (teacher - student)^2 + beta sum_i r[k, i]

All noise comes from streams numbered by trajectory (hcompress_runtime.noise), so a resumed run draws what an
uninterrupted one would have drawn, and refreshing lambda cannot disturb the training noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hcompress.adapter import Adapter, Condition, Route, compute_all
from hcompress.caching.harmonica import iepo
from hcompress.caching.harmonica.router import Router, soft_route
from hcompress.caching.harmonica.steering import Steering
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.sampling import constants_of, fill_route, sample, solver_noises, start_noise
from hcompress_runtime.table import SolverTable

TRAINING_STREAMS, SCORING_STREAMS = 1 << 32, 1 << 33  # sample numbers that `generate` never reaches


class Ranks(Protocol):
    """What data-parallel training needs: this process's number, how many there are, and a mean over them."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def world(self) -> int:
        """How many processes there are."""

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all ranks."""


@dataclass(frozen=True)
class OneProcess:
    """Ranks of a run in a single process."""

    rank: int = 0
    world: int = 1

    def mean(self, tensor: Tensor) -> Tensor:
        """`tensor` itself."""
        return tensor


@dataclass(frozen=True)
class Progress:
    """What one trajectory did. CURs count T N entries; `unpolarised` is the share of r in (0.1, 0.9).

    score_db is the signal-to-noise ratio of the *hard* schedule's samples, the uncached ones being the signal, on
    held-out noise; None between scorings.
    """

    trajectory: int
    loss: float
    mse: float
    beta: float
    expected_cur: float
    hard_cur: float
    unpolarised: float
    score_db: float | None


class Training:
    """One run of HarmoniCa on one adapter, solver and guidance scale."""

    teacher_mode: Callable[[], AbstractContextManager[Any]] = torch.no_grad  # the released code builds a graph here

    def __init__(
        self,
        adapter: Adapter,
        table: SolverTable,
        cfg: float,
        settings: HarmoniCaSettings,
        seed: int,
        ranks: Ranks | None = None,
        *,
        teacher: Adapter | None = None,
        first: NDArray[np.float32] | None = None,
    ) -> None:
        """`teacher` defaults to `adapter`, which is then compared with itself; `first`: logits to start from."""
        self.adapter, self.table, self.cfg, self.settings, self.seed = adapter, table, cfg, settings, seed
        self.ranks = ranks or OneProcess()
        self.teacher = teacher or adapter
        self.constants, self.teacher_constants = constants_of(adapter, table), constants_of(self.teacher, table)
        self.channels = adapter.sample_shape[0]
        self.router = Router(table.num_calls, len(adapter.graph), settings, seed, first)
        self.steering = Steering(adapter.graph, table.num_calls, settings)
        self.needs = np.zeros((table.num_calls, len(adapter.graph)))  # -d(lambda MSE)/dr of each entry's last update

    def run(self) -> Iterator[Progress]:
        """Train until the last trajectory, yielding after each; between yields `router.state()` is a checkpoint."""
        period = max(1, self.settings.refresh // self.table.num_calls)
        while not self.steering.may_end(self.router):
            number = self.router.trajectory
            condition, start, noises = self.draw(number)
            if number % period == 0:
                self.refresh(condition, start, noises)
            loss, mse = self.walk(condition, start, noises)
            if number == 0:
                self.steering.start(self.router, self.needs[1:])
            self.steering.steer(self.router)
            self.router.trajectory = number + 1
            scored = (number + 1) % period == 0 or self.steering.may_end(self.router)
            yield self.progress(loss, mse, self.score() if scored else None)

    def draw(self, trajectory: int) -> tuple[Condition, Tensor, list[Tensor]]:
        """Conditions, x_T and solver noises of this rank's part of a trajectory."""
        return self.draw_from(
            TRAINING_STREAMS + (trajectory * self.ranks.world + self.ranks.rank) * self.settings.batch
        )

    def draw_from(self, first: int) -> tuple[Condition, Tensor, list[Tensor]]:
        """One batch from the streams `first`, `first` + 1, ...; what a sample draws does not depend on its batch."""
        streams = range(first, first + self.settings.batch)
        keys = [np.random.Philox(key=(self.seed, stream), counter=(0, 0, 1, 0)) for stream in streams]
        each = [self.adapter.random_condition(np.random.Generator(key), 1) for key in keys]
        condition = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        noises = solver_noises(self.adapter, self.table, self.seed, streams)
        return condition, start_noise(self.adapter, self.seed, streams), noises

    def walk(self, condition: Condition, start: Tensor, noises: list[Tensor]) -> tuple[float, float]:
        """SDT over one trajectory. Returns the mean loss and the mean squared error of its iterations."""
        losses, errors = zip(*self.steps(condition, start, noises), strict=True)
        return float(np.mean(losses)), float(np.mean(errors))

    def steps(self, condition: Condition, start: Tensor, noises: list[Tensor]) -> Iterator[tuple[float, float]]:
        """The T-1 iterations of one trajectory, one optimiser step each, yielding loss and mean squared error."""
        slots: dict[int, Tensor] = {}
        with torch.no_grad():
            outputs = [self.denoise(0, start, condition, fill_route(slots))]
        for call in range(1, self.table.num_calls):
            x = self.table.combine(call, start, outputs, noises)
            with self.teacher_mode():
                target = self.target(call, x, condition)
            theta = self.router.rows[call]
            r = torch.sigmoid(theta)
            scores = r.detach().numpy().astype(np.float64)
            keep = scores > self.settings.threshold
            student = self.denoise(call, x, condition, soft_route(r.to(x.device), keep, slots))
            mse = functional.mse_loss(student, target)
            loss = float(self.router.lambdas[call]) * mse
            self.update(call, theta, loss, scores)
            outputs.append(student.detach())
            yield loss.item() + self.router.beta * float(scores.sum()), mse.item()

    def update(self, call: int, theta: nn.Parameter, loss: Tensor, scores: NDArray[np.float64]) -> None:
        """One optimiser step of row `call`: the error's gradient by autograd, the penalty's by hand."""
        router = self.router
        router.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        assert theta.grad is not None
        slope = torch.from_numpy(scores * (1 - scores)).to(theta.dtype)  # dr/dtheta
        gradient = self.ranks.mean(theta.grad)
        self.needs[call] = -(gradient / slope).double().numpy()
        theta.grad = gradient + router.beta * slope
        router.optimizer.step()
        with torch.no_grad():
            theta.clamp_(-self.settings.clamp, self.settings.clamp)

    def denoise(self, call: int, x: Tensor, condition: Condition, route: Route) -> Tensor:
        """Guided output [B, C, H, W] at `call`; a learned variance is no part of the trajectory and is left out."""
        return self.adapter.guided(x, condition, self.constants[call], self.cfg, route)[:, : self.channels]

    def target(self, call: int, x: Tensor, condition: Condition) -> Tensor:
        """The teacher's guided output [B, C, H, W] at `call`, everything computed."""
        constants = self.teacher_constants[call]
        return self.teacher.guided(x, condition, constants, self.cfg, compute_all)[:, : self.channels]

    def refresh(self, condition: Condition, start: Tensor, noises: list[Tensor]) -> None:
        """IEPO: measure lambda anew on this trajectory's own noise, averaged over ranks."""
        router = self.router
        measured = iepo.measure(self.denoise, self.table, router.scores(), self.settings, condition, start, noises)
        fresh = self.ranks.mean(measured.cpu()).double().numpy()
        router.lambdas[1:] = iepo.blend(router.lambdas[1:], fresh, self.settings)

    def score(self) -> float:
        """Signal-to-noise ratio (dB) of the hard schedule's samples against the teacher's, on held-out noise."""
        condition, start, noises = self.draw_from(SCORING_STREAMS)
        dense = sample(self.teacher, self.table, condition, start, cfg=self.cfg, noises=noises)
        hard = self.router.hard(self.settings.threshold)
        cached = sample(self.adapter, self.table, condition, start, cfg=self.cfg, noises=noises, compute=hard)
        error = functional.mse_loss(cached, dense).item()
        return 10 * math.log10(dense.square().mean().item() / max(error, iepo.TINY))

    def progress(self, loss: float, mse: float, score_db: float | None) -> Progress:
        """This trajectory's figures, from the router as it stands."""
        scores = self.router.scores()
        return Progress(
            trajectory=self.router.trajectory,
            loss=loss,
            mse=mse,
            beta=self.router.beta,
            expected_cur=float(1 - scores[1:].sum() / scores.size - 1 / len(scores)),
            hard_cur=float(1 - self.router.hard(self.settings.threshold).mean()),
            unpolarised=float(((scores > 0.1) & (scores < 0.9)).mean()),
            score_db=score_db,
        )
