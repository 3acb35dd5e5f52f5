"""SDT: step-wise denoising training, HarmoniCa's loop (train_router.py of the released code).

It walks the student's own trajectory. At each call the teacher, everything computed, is a one-step target on the
student's state, and the router's row takes one optimiser step; nothing is back-propagated across calls:

    L = lambda_k mean (teacher - student)^2 + beta sum_i r[k, i]

Where a reused branch is corrected (hcompress.corrections) the student mixes with the corrected value in place of its
slot. Corrections are fitted at every refresh of lambda, for every entry as if it were reused. Until the next refresh an
entry whose slots are of other calls by now, as the hard schedule changed before it, is continued by Taylor's rule.

All noise comes from streams numbered by trajectory (hcompress_runtime.noise), so a resumed run draws what an
uninterrupted one would have drawn, and refreshing lambda cannot disturb the training noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hcompress.adapter import Condition, Route, compute_all
from hcompress.caching.correct import correct, fit, taylor_terms
from hcompress.caching.harmonica import iepo
from hcompress.caching.problem import TRAINING_STREAMS, Found, Problem, Progress, check_loss
from hcompress.caching.router import Router, soft_route
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.caching.steering import Steering
from hcompress.corrections import computed_before
from hcompress.sampling import NOTHING, Older, Terms, constants_of, fill_route, sample, solver_output


@final
class Training:
    """One run of HarmoniCa. A round is a trajectory."""

    teacher_mode: Callable[[], AbstractContextManager[Any]] = torch.no_grad  # the released code builds a graph here

    def __init__(self, problem: Problem, settings: HarmoniCaSettings) -> None:
        self.problem, self.settings = problem, settings
        self.adapter, self.table, self.ranks = problem.adapter, problem.table, problem.ranks
        self.teacher = problem.teacher or problem.adapter
        self.constants, self.teacher_constants = (constants_of(a, self.table) for a in (self.adapter, self.teacher))
        self.channels = self.adapter.sample_shape[0]
        self.rounds = settings.trajectories
        self.router = Router(*problem.shape, settings, problem.seed, range(1, self.table.num_calls), problem.first)
        self.steering = Steering(self.adapter.graph, self.router, settings, self.rounds)
        self.needs = np.zeros(problem.shape)  # -d(lambda MSE)/dr of each entry's last update
        self.fitted_for: NDArray[np.bool_] | None = None  # the hard schedule that `fitted` belongs to, bool[T, N]
        self.fitted: Sequence[Mapping[int, Terms]] = ()

    @property
    def done(self) -> int:
        """Trajectories walked."""
        return self.router.round

    def run(self) -> Iterator[Progress]:
        """Train until the last trajectory, yielding after each; between yields `state()` is a checkpoint."""
        period = max(1, self.settings.refresh // self.table.num_calls)
        while not self.steering.may_end(self.router):
            number = self.router.round
            condition, start, noises = self.draw(number)
            if number % period == 0:
                self.refresh(condition, start, noises)
            loss, mse = self.walk(condition, start, noises)
            if number == 0:
                self.steering.start(self.router, self.needs[1:])
            self.steering.steer(self.router)
            self.router.round = number + 1
            scored = (number + 1) % period == 0 or self.steering.may_end(self.router)
            yield self.router.progress(loss, mse, self.score_db() if scored else None)

    def score_db(self) -> float:
        """Of the hard schedule as it would be left now, but for tuning, which waits for the end."""
        hard, untuned = self.router.hard(), self.settings.model_copy(update={"fit_steps": 0})
        corrections = correct(self.problem, hard, untuned).corrections
        return self.problem.score_db(hard, corrections, self.settings.batch)

    def draw(self, trajectory: int) -> tuple[Condition, Tensor, list[Tensor]]:
        """Conditions, x_T and solver noises of this rank's part of a trajectory."""
        batch = self.settings.batch
        return self.problem.draw(TRAINING_STREAMS + (trajectory * self.ranks.world + self.ranks.rank) * batch, batch)

    def walk(self, condition: Condition, start: Tensor, noises: list[Tensor]) -> tuple[float, float]:
        """SDT over one trajectory. Returns the mean loss and the mean squared error of its iterations."""
        losses, errors = zip(*self.steps(condition, start, noises), strict=True)
        return float(np.mean(losses)), float(np.mean(errors))

    def steps(self, condition: Condition, start: Tensor, noises: list[Tensor]) -> Iterator[tuple[float, float]]:
        """The T-1 iterations of one trajectory, one optimiser step each, yielding loss and mean squared error."""
        slots: dict[int, Tensor] = {}
        terms = self.terms()
        older: Older | None = None if terms is None else {}
        with torch.no_grad():
            outputs = [self.denoise(0, start, condition, fill_route(slots), noises)]
        for call in range(1, self.table.num_calls):
            x = self.table.combine(call, start, outputs, noises)
            with self.teacher_mode():
                target = self.target(call, x, condition, noises)
            r = torch.sigmoid(self.router.rows[call])
            scores = r.detach().numpy().astype(np.float64)
            keep = scores > self.settings.threshold
            if self.settings.score == "hard":
                r = r + (torch.from_numpy(keep).to(r.dtype) - r).detach()
            reuse = terms[call] if terms else NOTHING
            route = soft_route(r.to(x.device), keep, slots, reuse, older, self.settings.order)
            student = self.denoise(call, x, condition, route, noises)
            mse = functional.mse_loss(student, target)
            loss = float(self.router.lambdas[call]) * mse
            self.needs[call] = self.router.update(call, loss, self.ranks)
            outputs.append(student.detach())
            total = loss.item() + self.router.beta * float(scores.sum())
            check_loss(total, call, {0: outputs[0], call: target})
            yield total, mse.item()

    def denoise(
        self, call: int, x: Tensor, condition: Condition, route: Route, noises: Sequence[Tensor] = ()
    ) -> Tensor:
        """What the solver goes by at `call`, [B, C, H, W]; a learned variance counts only where the solver uses it."""
        raw = self.adapter.guided(x, condition, self.constants[call], self.problem.cfg, route)
        return solver_output(raw, self.constants[call], self.table.noise_of(call, noises), self.channels)

    def target(self, call: int, x: Tensor, condition: Condition, noises: Sequence[Tensor] = ()) -> Tensor:
        """The teacher's at `call`, [B, C, H, W], everything computed."""
        constants = self.teacher_constants[call]
        raw = self.teacher.guided(x, condition, constants, self.problem.cfg, compute_all)
        return solver_output(raw, constants, self.table.noise_of(call, noises), self.channels)

    def refresh(self, condition: Condition, start: Tensor, noises: list[Tensor]) -> None:
        """IEPO: measure lambda anew on this trajectory's own noise, averaged over ranks; first fit what it goes by."""
        router = self.router
        if self.settings.reuse == "corrected":
            self.fit(router.hard())
        if self.settings.proxy == "none":
            router.lambdas[1:] = 1.0
            return
        scores = router.scores() if self.settings.score == "soft" else router.hard().astype(np.float64)
        measured = iepo.measure(self.denoise, self.table, scores, self.settings, condition, start, noises, self.terms())
        fresh = self.ranks.mean(measured.cpu()).double().numpy()
        if not np.isfinite(fresh).all():  # of the model itself, or of reuse alone, which the first loss will say
            sample(self.adapter, self.table, condition, start, cfg=self.problem.cfg, noises=noises)
        router.lambdas[1:] = iepo.blend(router.lambdas[1:], fresh, self.settings)

    def fit(self, hard: NDArray[np.bool_]) -> None:
        """Corrections of every entry on the trajectory of `hard` [T, N]; the same again for the same mask."""
        self.fitted_for = hard
        samples, order = self.settings.fit_samples, self.settings.order
        self.fitted = fit(self.problem, hard, samples, order, everywhere=True).terms

    def terms(self) -> list[dict[int, Terms]] | None:
        """How each entry of each call is corrected under the hard schedule as it is; None where reuse is plain."""
        if self.settings.reuse == "plain":
            return None
        hard, order = self.router.hard(), self.settings.order
        every = taylor_terms(hard, order, self.adapter.device, self.adapter.dtype)
        if self.fitted_for is not None:
            now, then = (computed_before(mask)[: order + 1] for mask in (hard, self.fitted_for))
            alike = (now == then).all(axis=0)
            for call, fitted in enumerate(self.fitted):
                every[call] |= {branch: terms for branch, terms in fitted.items() if alike[call, branch]}
        return every

    def state(self) -> dict[str, Any]:
        """The router's, and the mask from which corrections can be fitted again."""
        mask = None if self.fitted_for is None else torch.from_numpy(self.fitted_for)
        return self.router.state() | ({} if mask is None else {"fitted_for": mask})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.router.restore(state)
        if "fitted_for" in state:
            self.fit(state["fitted_for"].numpy())

    def found(self) -> Found:
        """The hard schedule."""
        return self.router.found()
