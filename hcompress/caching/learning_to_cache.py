"""Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733): one call in two is full, the other learns to reuse.

An iteration puts real images at an even call by forward diffusion. There the network runs in full and fills the slots;
one DDIM step leads to the odd call, whose row takes one optimiser step, teacher and student starting from the same x:

    L = mean (teacher - student)^2 + beta sum_i r[k, i]        (gaussian_diffusion.py, router_training_losses)

As in the released code: no guidance, some labels or captions dropped (the same in all three runs), the loss over all
channels, a learned variance included, and slots that hold what the full call computed, since none is older than a call.
Rows that do not learn compute everything; the code counts rows from the other end, where the full ones are odd.

The step is DDIM's whatever the solver: a solver with a memory would need images of the calls before. Where the solver
makes two calls a step, the released code for U-ViT has its full calls at the midpoints; here they are the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hcompress.adapter import Condition, compute_all
from hcompress.caching.problem import TRAINING_STREAMS, Found, Problem, Progress, check_loss
from hcompress.caching.router import Router, soft_route
from hcompress.caching.settings import LearningToCacheSettings
from hcompress.caching.steering import Steering
from hcompress.sampling import constants_of, fill_route
from hcompress_runtime.noise import gaussian

SCORE_EVERY = 20  # sweeps
CALL, DROPOUT = 3, 4  # uses of chance, beside those of Problem and of images


@final
class LearningToCache:
    """One run of Learning-to-Cache. A round is a sweep: as many iterations as rows learn, each of a random row."""

    def __init__(self, problem: Problem, settings: LearningToCacheSettings) -> None:
        self.problem, self.settings = problem, settings
        self.adapter, self.table, self.ranks = problem.adapter, problem.table, problem.ranks
        self.process, self.images = problem.process(), problem.images(settings.images)
        self.constants = constants_of(self.adapter, self.table)
        self.channels = self.adapter.sample_shape[0]
        self.rounds = settings.sweeps
        self.router = Router(*problem.shape, settings, problem.seed, range(1, self.table.num_calls, 2))
        self.steering = Steering(self.adapter.graph, self.router, settings, self.rounds)
        self.needs = np.zeros(problem.shape)  # -d MSE/dr of each entry's last update
        self.frozen = np.zeros(len(self.adapter.graph), np.bool_)  # slots that a student overwrites: none

    @property
    def done(self) -> int:
        """Sweeps done."""
        return self.router.round

    def run(self) -> Iterator[Progress]:
        """Train until the last sweep, yielding after each; between yields `state()` is a checkpoint."""
        sweep = len(self.router.learned)
        while not self.steering.may_end(self.router):
            number = self.router.round
            losses, errors = zip(*map(self.iterate, range(number * sweep, (number + 1) * sweep)), strict=True)
            if number == 0:
                self.steering.start(self.router, self.needs)
            self.steering.steer(self.router)
            self.router.round = number + 1
            scored = self.router.round % SCORE_EVERY == 0 or self.steering.may_end(self.router)
            score_db = self.problem.score_db(self.router.hard()) if scored else None
            yield self.router.progress(float(np.mean(losses)), float(np.mean(errors)), score_db)

    def iterate(self, number: int) -> tuple[float, float]:
        """One iteration, one optimiser step. Returns its loss and mean squared error."""
        call = int(self.problem.rng(TRAINING_STREAMS + number, CALL).choice(self.router.learned))
        x, condition = self.images_at(call - 1, number)
        run = partial(self.adapter, condition=condition)
        slots: dict[int, Tensor] = {}
        with torch.no_grad():
            output = run(x, constants=self.constants[call - 1], route=fill_route(slots))
            x = self.process.next(call - 1, x, output[:, : self.channels])
            teacher = run(x, constants=self.constants[call], route=compute_all)
        r = torch.sigmoid(self.router.rows[call])
        student = run(x, constants=self.constants[call], route=soft_route(r.to(x.device), self.frozen, slots))
        mse = functional.mse_loss(student, teacher)
        check_loss(mse.item(), call, {call - 1: output, call: teacher})
        self.needs[call] = self.router.update(call, mse, self.ranks)
        return mse.item() + self.router.beta * float(r.detach().sum()), mse.item()

    def images_at(self, call: int, number: int) -> tuple[Tensor, Condition]:
        """This rank's images of iteration `number`, noised to `call`, and their conditions, some dropped."""
        batch = self.settings.batch
        first = (number * self.ranks.world + self.ranks.rank) * batch
        x0, told = self.images.batch(first, batch, flip=self.settings.flip)
        streams = range(TRAINING_STREAMS + first, TRAINING_STREAMS + first + batch)
        noise = torch.from_numpy(gaussian(self.problem.seed, streams, self.adapter.sample_shape)).to(x0.device)
        chances = [self.problem.rng(stream, DROPOUT).random() for stream in streams]
        dropped = np.array(chances) < self.settings.label_dropout
        kept = self.adapter.image_condition(told, dropped, self.problem.rng(streams[0], DROPOUT))
        return self.process.noised(call, x0, noise), kept

    def state(self) -> dict[str, Any]:
        """The router's, and which images could not be read."""
        return self.router.state() | {"broken": self.images.broken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.router.restore(state)
        self.images.broken[:] = state["broken"]

    def found(self) -> Found:
        """The hard schedule, and how many images it took."""
        found = self.router.found()
        shown = self.router.round * len(self.router.learned) * self.ranks.world * self.settings.batch
        counts = {"images_used": min(shown, self.images.count), "images_skipped": len(self.images.broken)}
        return Found(found.compute, {**found.history, **counts}, found.logits)
