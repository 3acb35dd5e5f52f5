"""Teaching a pruned model what it lost: the training of diffusion models, on real images, from where pruning left it.

    L = mean (epsilon(x_t, t, y) - target)^2         t uniform over the training's steps

(Ho et al. 2020, eq. 14), some labels or captions dropped (Ho and Salimans 2022). A learned variance is nothing that
this loss teaches: it is held to that of the model as it was. The embedders of time and label are not pruned and stay as
they are: diffusers keeps a copy in each block, and copies that drift apart would no longer be one. Images without
captions teach a text model its null prompt alone.

All chance comes from streams numbered by update, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hcompress.adapter import Adapter, compute_all
from hcompress.errors import ModelError
from hcompress.process import Process
from hcompress.prune.parts import Batch, in_parts, parts_of
from hcompress.prune.settings import PruneSettings
from hcompress.sampling import sample, solver_noises, start_noise
from hcompress_runtime.noise import gaussian
from hcompress_runtime.table import SolverTable

STREAMS, SCORING_STREAMS = 1 << 37, 1 << 36  # sample numbers that nothing else reaches
STEP, LABEL = 1, 2  # uses of chance
ROUND, SCORING_PERIOD, SCORED = 20, 10, 4  # updates a round, rounds between scorings, samples of one
FROZEN = ".emb."  # in the names of the embedders' parameters
TINY = 1e-20


@dataclass(frozen=True)
class Progress:
    """What one round of 20 updates did.

    score_db is the signal-to-noise ratio of the pruned model's samples, those of the model as it was being the signal,
    from the same noise; None between scorings.
    """

    round: int
    loss: float
    rate: float
    score_db: float | None


@final
class FineTune:
    """One run: `pruned`, narrowed from `original`, is trained in place. process: at every timestep of the training."""

    def __init__(
        self,
        original: Adapter,
        pruned: Adapter,
        process: Process,
        images: Batch,
        settings: PruneSettings,
        table: SolverTable,
        cfg: float,
        seed: int,
    ) -> None:
        self.original, self.pruned, self.process, self.images = original, pruned, process, images
        self.settings, self.table, self.cfg, self.seed, self.round = settings, table, cfg, seed, 0
        for module in pruned.network.modules():  # those that pruning left alone are the original's own
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
        learned = {name: p for name, p in pruned.network.named_parameters() if FROZEN not in name}
        self.parameters = list(learned.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0, fused=True)

    @property
    def rounds(self) -> int:
        """How many there will be."""
        return math.ceil(self.settings.updates / ROUND)

    def run(self) -> Iterator[Progress]:
        """Train until the last round, yielding after each; between yields `state()` is a checkpoint."""
        while self.round < self.rounds:
            first = self.round * ROUND
            updates = range(first, min(first + ROUND, self.settings.updates))
            loss = float(np.mean([self.update(number) for number in updates]))
            if not math.isfinite(loss):
                raise ModelError(
                    f"the fine-tune diverged in round {self.round + 1}; lower prune.lr = {self.settings.lr}"
                )
            self.round += 1
            scored = self.round % SCORING_PERIOD == 0 or self.round == self.rounds
            yield Progress(self.round, loss, self.rate(updates[-1]), self.score_db() if scored else None)

    def update(self, number: int) -> float:
        """One optimiser step. Returns its loss."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer.param_groups[0]["lr"] = self.settings.lr * self.rate(number)
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in self.losses(number):
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        return loss

    def losses(self, number: int) -> Iterator[Tensor]:
        """The loss of update `number` in parts, one for each micro-batch, whose sum it is.

        Images of one update are at one timestep each, drawn apart. What is drawn does not depend on the parts.
        """
        batch, adapter = self.settings.batch, self.pruned
        x0, told = in_parts(self.images, number * batch, batch, self.settings.micro_batch)
        streams = range(STREAMS + number * batch, STREAMS + (number + 1) * batch)
        noise = torch.from_numpy(gaussian(self.seed, streams, tuple(x0.shape[1:]))).to(x0.device)
        rng = self.rng(streams[0], LABEL)
        condition = adapter.image_condition(told, rng.random(batch) < self.settings.label_dropout, rng)
        steps = self.rng(streams[0], STEP).integers(len(self.process.alpha), size=batch)
        rows = [self.process.noised(step, x0[i], noise[i]) for i, step in enumerate(steps)]
        targets = torch.stack([self.process.target(step, x0[i], noise[i]) for i, step in enumerate(steps)])
        timesteps = torch.from_numpy(steps).float().to(x0.device)
        whole, channels = torch.stack(rows), x0.shape[1]
        for part in parts_of(batch, self.settings.micro_batch):
            x, given = whole[part], {name: rows[part] for name, rows in condition.items()}
            constants = adapter.step_constants(timesteps[part])  # which learn, too
            output = adapter(x, given, constants, compute_all)
            loss = functional.mse_loss(output[:, :channels], targets[part])
            if output.shape[1] > channels:
                with torch.no_grad():
                    before = self.original(x, given, constants, compute_all)
                loss = loss + functional.mse_loss(output[:, channels:], before[:, channels:])
            yield loss * (len(x) / batch)

    def rate(self, number: int) -> float:
        """The share of its learning rate that update `number` is made at."""
        return 1 - number / self.settings.updates

    def score_db(self) -> float:
        """Of samples of the solver and guidance that the model is pruned for."""
        adapter, streams = self.original, range(SCORING_STREAMS, SCORING_STREAMS + SCORED)
        condition = adapter.condition(adapter.even_conditions(SCORED))
        noises = solver_noises(adapter, self.table, self.seed, streams)
        run = partial(sample, table=self.table, condition=condition, cfg=self.cfg, noises=noises)
        start = start_noise(adapter, self.seed, streams)
        before, after = run(adapter, start=start), run(self.pruned, start=start)
        return 10 * math.log10(before.square().mean().item() / max(functional.mse_loss(after, before).item(), TINY))

    def rng(self, stream: int, use: int) -> np.random.Generator:
        """Chance for anything but noise, as hcompress.caching.problem has it."""
        return np.random.Generator(np.random.Philox(key=(self.seed, stream), counter=(0, 0, use, 0)))

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, for torch.save; loads with `weights_only=True`."""
        return {
            "network": {name: value.detach() for name, value in self.pruned.network.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "round": self.round,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.pruned.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.round = state["round"]
