"""HarmoniCa (Huang et al., ICML 2025, arXiv 2410.01723): learn when and where to reuse, without images.

A router is a table of T x N free logits theta; r = sigmoid(theta). Training mixes softly, deployment switches hard:

    training    h = r f(x) + (1 - r) c        and the slot takes detach(h) where r > tau
    deployment  computed where r > tau, reused elsewhere

SDT walks the student's own denoising trajectory. At each call the teacher (everything computed) is a one-step target
on the student's state, and the router's row takes one optimiser step; nothing is back-propagated across calls:

    L = lambda_k mean (teacher - student)^2 + beta sum_i r[k, i]

IEPO's lambda_k says how much the call matters for the finished image. It is refreshed every C iterations:

    leave_one_out  mean (x0 - x0 with call k fully computed)^2, the others routed      (the paper's formula)
    cumulative     mean (z_k - z_{k-1})^2, z_k having calls 1..k routed, the rest full  (the released code)

    sensitivity    leave_one_out / mean (o_k routed - o_k full)^2                      (ours; see below)

Both generations share their calls before k, so each is forked from one running generation: T + T (T - 1) / 2 calls.
The paper's lambda is the error that call k causes, not how much a unit of its error costs: a call that hardly reuses
gets lambda near 0 and with it no say. `sensitivity` divides the call's own one-step error out, which makes
lambda_k MSE_k the image error that call k causes, to first order.

beta is fixed, or steered to a target. Steering uses that the loss is nearly quadratic in r: with need = -dL/dr and
need ~ a (1 - r), an entry settles at r <= tau once beta >= a (1 - tau). So beta is set to the wanted quantile of
a (1 - tau); an integral term removes what the approximation leaves.

All noise comes from streams numbered by trajectory (hcompress_runtime.noise), so a resumed run draws what an
uninterrupted one would have drawn, and the proxy cannot disturb the training noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hcompress.adapter import Adapter, Condition, Route, compute_all
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.sampling import Slots, constants_of, sample, solver_noises, start_noise
from hcompress_runtime.table import SolverTable

TRAINING_STREAMS, SCORING_STREAMS = 1 << 32, 1 << 33  # sample numbers that `generate` never reaches
SENSITIVITY_MOMENTUM = 0.9  # of the running mean of each entry's curvature, in trajectories
CURVATURE_FLOOR = 0.05  # least 1 - r by which a need is divided: above r = 0.95 it says little
PAPER_EPS = 1e-8  # AdamW's default, as in the released code; a beta of 7e-8 feels it: gradients are no larger
STEERED_EPS = 1e-16  # steering finds beta at any scale of lambda, so no gradient may drown in eps
TINY = 1e-20  # least mean squared error by which anything is divided
INTEGRAL_GAIN = 0.25  # log beta a trajectory and unit of CUR error, once logits have had time to travel
LANDED, EXTENSION = 0.01, 1.25  # a steered run goes on to this multiple of its length until it is this near its goal


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


class Router:
    """The logits with all that training them has to remember. T rows, one parameter each; row 0 is pinned.

    need_curvature: float64[T, N]  running mean of -dMSE/dr / (1 - r), lambda left out since it jumps at a refresh
    lambdas:        float64[T]     IEPO's weights; row 0 has no loss
    """

    def __init__(self, num_calls: int, num_branches: int, settings: HarmoniCaSettings, seed: int) -> None:
        rng = np.random.default_rng(seed)
        first = rng.standard_normal((num_calls, num_branches)) if settings.init == "normal" else settings.init
        table = np.broadcast_to(np.asarray(first, np.float32), (num_calls, num_branches)).copy()
        table[0] = settings.clamp
        self.rows = nn.ParameterList([nn.Parameter(torch.from_numpy(row)) for row in table])
        self.rows[0].requires_grad_(False)
        eps = PAPER_EPS if settings.beta is not None else STEERED_EPS
        self.optimizer = torch.optim.AdamW(list(self.rows)[1:], lr=settings.lr, weight_decay=0.0, eps=eps)
        self.trajectory = 0
        self.beta = settings.beta or 0.0
        self.integral = 0.0
        self.lambdas = np.zeros(num_calls)
        self.need_curvature = np.zeros((num_calls, num_branches))

    def logits(self) -> NDArray[np.float32]:
        """float32[T, N]."""
        return np.stack([row.detach().numpy() for row in self.rows])

    def scores(self) -> NDArray[np.float64]:
        """r = sigmoid(theta), float64[T, N]."""
        return np.asarray(1.0 / (1.0 + np.exp(-self.logits().astype(np.float64))))

    def hard(self, threshold: float) -> NDArray[np.bool_]:
        """bool[T, N], computed where r > tau: the schedule that is deployed."""
        return np.asarray(self.scores() > threshold)

    def state(self) -> dict[str, Any]:
        """All of it, for torch.save; load with `weights_only=True`."""
        return {
            "rows": self.rows.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trajectory": self.trajectory,
            "beta": self.beta,
            "integral": self.integral,
            "lambdas": torch.from_numpy(self.lambdas),
            "need_curvature": torch.from_numpy(self.need_curvature),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.rows.load_state_dict(state["rows"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.trajectory, self.beta, self.integral = state["trajectory"], state["beta"], state["integral"]
        self.lambdas = state["lambdas"].numpy().copy()
        self.need_curvature = state["need_curvature"].numpy().copy()


def soft_route(scores: Tensor, keep: NDArray[np.bool_], slots: Slots) -> Route:
    """The training mix of one call. scores: r, [N], with gradient; keep: bool[N], where the slot takes the mixture."""

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        mixed = torch.lerp(slots[branch], evaluate(), scores[branch])
        if keep[branch]:
            slots[branch] = mixed.detach()
        return mixed

    return route


def fill_route(slots: Slots) -> Route:
    """Compute everything and store it: the first call of a trajectory, and a forced full call."""

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        slots[branch] = evaluate()
        return slots[branch]

    return route


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
    ) -> None:
        self.adapter, self.table, self.cfg, self.settings, self.seed = adapter, table, cfg, settings, seed
        self.ranks = ranks or OneProcess()
        self.constants = constants_of(adapter, table)
        self.channels = adapter.sample_shape[0]
        self.router = Router(table.num_calls, len(adapter.graph), settings, seed)

    def run(self) -> Iterator[Progress]:
        """Train until the last trajectory, yielding after each; between yields `router.state()` is a checkpoint."""
        period = max(1, self.settings.refresh // self.table.num_calls)
        while not self.finished():
            number = self.router.trajectory
            condition, start, noises = self.draw(number)
            if number % period == 0:
                self.refresh(condition, start, noises)
            loss, mse = self.walk(condition, start, noises)
            self.steer()
            self.router.trajectory = number + 1
            scored = (number + 1) % period == 0 or self.finished()
            yield self.progress(loss, mse, self.score() if scored else None)

    def finished(self) -> bool:
        """Whether the wanted trajectories are done and, if steered, the hard schedule is where it was to land."""
        done, wanted = self.router.trajectory, self.settings.trajectories
        return done >= wanted and (self.settings.beta is not None or self.landed() or done >= EXTENSION * wanted)

    def landed(self) -> bool:
        """Whether the hard schedule meets the goal to one entry or LANDED, whichever is coarser."""
        weights, wanted = self.goal()
        return abs(self.reused(weights) - wanted) <= max(LANDED, weights.max() / 2)

    def reused(self, weights: NDArray[np.float64]) -> float:
        """What the hard schedule reuses, in the units of the goal."""
        return float((weights * ~self.router.hard(self.settings.threshold)).sum())

    def draw(self, trajectory: int) -> tuple[Condition, Tensor, list[Tensor]]:
        """Conditions, x_T and solver noises of this rank's part of a trajectory."""
        return self.draw_from(TRAINING_STREAMS + (trajectory * self.ranks.world + self.ranks.rank) * self.settings.batch)

    def draw_from(self, first: int) -> tuple[Condition, Tensor, list[Tensor]]:
        """One batch from the streams `first`, `first` + 1, ...; a sample's draw does not depend on the batch it is in."""
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
                target = self.denoise(call, x, condition, compute_all)
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
        weight = max(float(router.lambdas[call]), TINY)
        curvature = -(gradient / slope).numpy() / weight / np.maximum(1 - scores, CURVATURE_FLOOR)
        momentum = SENSITIVITY_MOMENTUM if router.trajectory else 0.0
        router.need_curvature[call] = momentum * router.need_curvature[call] + (1 - momentum) * curvature
        theta.grad = gradient + router.beta * slope
        router.optimizer.step()
        with torch.no_grad():
            theta.clamp_(-self.settings.clamp, self.settings.clamp)

    def denoise(self, call: int, x: Tensor, condition: Condition, route: Route) -> Tensor:
        """Guided output [B, C, H, W] at `call`; a learned variance is no part of the trajectory and is left out."""
        return self.adapter.guided(x, condition, self.constants[call], self.cfg, route)[:, : self.channels]

    @torch.no_grad()
    def refresh(self, condition: Condition, start: Tensor, noises: list[Tensor]) -> None:
        """IEPO: measure lambda anew on this trajectory's own noise, by forks of one running generation."""
        rows = torch.from_numpy(self.router.scores()).float().to(start.device)
        keep = self.router.hard(self.settings.threshold)
        leave_one_out = self.settings.proxy != "cumulative"

        def advance(call: int, outputs: list[Tensor], slots: Slots, *, routed: bool) -> list[Tensor]:
            x = self.table.combine(call, start, outputs, noises)
            route = soft_route(rows[call], keep[call], slots) if routed else fill_route(slots)
            return [*outputs, self.denoise(call, x, condition, route)]

        def finish(call: int, outputs: list[Tensor], slots: Slots, *, routed: bool) -> Tensor:
            for later in range(call, self.table.num_calls):
                outputs = advance(later, outputs, slots, routed=routed)
            return self.table.combine(self.table.num_calls, start, outputs, noises)

        slots: dict[int, Tensor] = {}
        outputs = advance(0, [], slots, routed=False)
        finished = [] if leave_one_out else [finish(1, outputs, dict(slots), routed=False)]
        one_step: list[Tensor] = []
        for call in range(1, self.table.num_calls):
            if leave_one_out:
                fork = dict(slots)
                full = advance(call, outputs, fork, routed=False)
                finished.append(finish(call + 1, full, fork, routed=True))
            outputs = advance(call, outputs, slots, routed=True)
            if leave_one_out:
                one_step.append(functional.mse_loss(outputs[-1], full[-1]))
            if not leave_one_out:
                finished.append(finish(call + 1, outputs, dict(slots), routed=False))
        final = self.table.combine(self.table.num_calls, start, outputs, noises)
        others = [final] * len(finished) if leave_one_out else finished[:-1]
        compared = finished if leave_one_out else finished[1:]
        distances = torch.stack([functional.mse_loss(a, b) for a, b in zip(compared, others, strict=False)])
        if self.settings.proxy == "sensitivity":
            distances = distances / torch.stack(one_step).clamp(min=TINY)
        if self.settings.reduction == "sum":
            distances = distances * final[0].numel()
        self.blend(self.ranks.mean(distances.cpu()).double().numpy())

    def blend(self, measured: NDArray[np.float64]) -> None:
        """Take new lambdas of calls 1 .. T-1, with momentum and floor where the recipe asks for them."""
        momentum = self.settings.lambda_momentum if self.router.lambdas.any() else 0.0
        blended = momentum * self.router.lambdas[1:] + (1 - momentum) * measured
        self.router.lambdas[1:] = np.maximum(blended, self.settings.lambda_floor * blended.mean())

    def steer(self) -> None:
        """Set beta so that the wanted share of entries (or of MACs) settles at r <= tau."""
        settings, router = self.settings, self.router
        if settings.beta is not None:
            return
        weights, wanted = self.goal()
        travel = 2 * math.log(1 / settings.threshold - 1)  # from the other side to the threshold, in units of lr
        if router.trajectory * settings.lr > travel:
            router.integral += INTEGRAL_GAIN * (wanted - self.reused(weights))
        needs = router.lambdas[1:, None] * np.maximum(router.need_curvature[1:], 0.0)
        settled = needs.ravel() * (1 - settings.threshold)
        order = np.argsort(settled)
        filled = np.cumsum(weights[1:].ravel()[order])
        last = int(np.argmin(np.abs(filled - wanted)))  # the last entry to be reused; beta goes between it and the next
        between = settled[order[last : last + 2]]
        router.beta = math.sqrt(float(between[0] * between[-1])) * math.exp(router.integral)

    def goal(self) -> tuple[NDArray[np.float64], float]:
        """Weight of each entry in the target, float64[T, N], and the sum of weights to be reused."""
        shape = (self.table.num_calls, len(self.adapter.graph))
        if self.settings.target_cur is not None:
            return np.full(shape, 1 / np.prod(shape)), self.settings.target_cur
        assert self.settings.target_speedup is not None
        total = self.adapter.graph.total_macs(np.ones(shape, bool))
        return np.tile(self.adapter.graph.macs / total, (shape[0], 1)), 1 - 1 / self.settings.target_speedup

    def score(self) -> float:
        """Signal-to-noise ratio (dB) of the hard schedule's samples against uncached ones, on held-out noise."""
        condition, start, noises = self.draw_from(SCORING_STREAMS)
        dense = sample(self.adapter, self.table, condition, start, cfg=self.cfg, noises=noises)
        hard = self.router.hard(self.settings.threshold)
        cached = sample(self.adapter, self.table, condition, start, cfg=self.cfg, noises=noises, compute=hard)
        error = functional.mse_loss(cached, dense).item()
        return 10 * math.log10(dense.square().mean().item() / max(error, TINY))

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
