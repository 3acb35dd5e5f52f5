"""EfficientDM (He et al., ICLR 2024, arXiv 2310.03270): distil a model into few bits along its own trajectory, no data.

At each call the float model is the target of the quantized one on the same state, and all that is learnable takes one
optimiser step; nothing is back-propagated across calls:

    L = w_k mean (teacher - student)^2            of the guided output that the solver sees, at call k

What learns are A and B inside the rounding (hcompress.quant.qalora), the weights' step sizes, and of the inputs' step
sizes [T, K] (TALSQ) the row of the call. Step sizes are learned as logarithms: they stay above 0, and a learning rate
of theirs is a relative one.

Other than the paper, which has T = 100, eta = 1 and asymmetric grids: the trajectory is that which will be deployed,
the error is a mean, grids are symmetric, W0 stays in float, no step size is decayed, and w_k is one over the call's
error before training. Without that the last call, whose error is a thousand times that of the others and hardly reaches
the sample, drives A and B: 32.5 against 33.6 dB in W4A8 (recipes/LOG.md).

Where a schedule is given the student runs under it: what it reuses is what it computed itself, and the state advances
by the student's own output, which is where its errors, rounding and reuse alike, will meet again. The teacher never
caches.

All noise comes from streams numbered by trajectory, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hcompress.adapter import Adapter, Route, compute_all
from hcompress.errors import ModelError
from hcompress.lowbit.adapter import QuantizedAdapter, replace_modules, twin
from hcompress.lowbit.grid import ACTIVATION_GRIDS
from hcompress.lowbit.linear import QuantLinear, Scales, absmax_scale
from hcompress.quant.build import step_log_scales
from hcompress.quant.calibration import Draw, Seen, Walk, draw, least_error
from hcompress.quant.qalora import QALoRALinear
from hcompress.quant.selection import Selection
from hcompress.quant.settings import EfficientDMSettings
from hcompress.sampling import Slots, constants_of, sample, solver_output
from hcompress_runtime.bundle import SCALES

DISTILLATION_STREAMS, SCORING_STREAMS = 1 << 35, 1 << 36  # sample numbers that nothing else reaches
SCORING_PERIOD = 20  # trajectories
EIGHT_BITS = 127  # the last value of int8
EPS = 1e-12  # Adam's: gradients of a mean squared error of 1e-6 are far below the default of 1e-8
LEAST_ERROR = 1e-6  # of a call, as a share of the largest: one that makes none may not become all that counts
TINY = 1e-20  # least mean squared error by which anything is divided


@dataclass(frozen=True)
class Progress:
    """What one round, a trajectory, did.

    loss is the mean of its calls; where they are weighted, the share of the error before training. score_db is the
    signal-to-noise ratio of the quantized model's samples, under the schedule where there is one, the float model's
    uncached ones being the signal, on held-out noise; None between scorings.
    """

    round: int
    loss: float
    rate: float
    score_db: float | None


class Distillation:
    """One run of EfficientDM: `student` is trained in place; `finish` folds it.

    teacher: the float adapter, never changed
    student: from `student_of`; of one that is folded already only the inputs' step sizes learn
    walk:    the trajectory: table, guidance and seed, and the schedule's mask where the student is to run under one
    """

    def __init__(self, teacher: Adapter, student: QuantizedAdapter, walk: Walk, settings: EfficientDMSettings) -> None:
        self.teacher, self.student, self.settings = teacher, student, settings
        self.walk, self.table = replace(walk, batch=settings.batch), walk.table
        self.channels = teacher.sample_shape[0]
        self.layers = [layer for layer in self.student.network.modules() if isinstance(layer, QALoRALinear)]
        grid = self.student.timesteps
        self.row_of_call = (grid[:, None] == grid).int().argmax(dim=1).tolist()  # calls at one timestep share a row
        self.rows = nn.ParameterList([nn.Parameter(row) for row in self.student.log_scales.detach().clone()])
        self.constants = constants_of(teacher, walk.table)
        self.optimizer = torch.optim.AdamW(self.groups(), eps=EPS, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.weights = [1.0] * walk.table.num_calls
        self.trajectory = 0

    def groups(self) -> list[dict[str, Any]]:
        """What learns how fast: design rates of the paper's code, per layer for A and B, relative for step sizes.

        One parameter a row of the inputs' step sizes: Adam's momentum must not move rows whose gradient is absent.
        """
        settings = self.settings
        lora = [
            {"params": [layer.down, layer.up], "lr": settings.lr_lora * layer.log_scale.detach().exp().mean().item()}
            for layer in self.layers
        ]
        steps = [
            {"params": [layer.log_scale for layer in self.layers], "lr": settings.lr_weight, "weight_decay": 0.0},
            {"params": list(self.rows), "lr": settings.lr_activation, "weight_decay": 0.0},
        ]
        return [*lora, *(group for group in steps if group["params"])]

    @property
    def trajectories(self) -> int:
        """How many there will be: the budget of updates in whole trajectories."""
        return max(1, round(self.settings.updates / self.table.num_calls))

    def run(self) -> Iterator[Progress]:
        """Train until the budget is spent, yielding after each trajectory; between yields `state()` is a checkpoint."""
        if self.trajectory == 0 and self.settings.weighting == "relative":
            self.weigh()
        while self.trajectory < self.trajectories:
            first = DISTILLATION_STREAMS + self.trajectory * self.settings.batch
            losses = list(self.steps(draw(self.teacher, self.walk, first, self.settings.batch), self.update))
            if not np.isfinite(losses).all():
                raise ModelError(
                    f"distillation diverged in trajectory {self.trajectory + 1}: the loss is not finite; "
                    "lower quant.lr_lora or lr_activation"
                )
            rate, self.trajectory = self.rate(0), self.trajectory + 1
            scored = self.trajectory % SCORING_PERIOD == 0 or self.trajectory == self.trajectories
            yield Progress(self.trajectory, float(np.mean(losses)), rate, self.score() if scored else None)

    def weigh(self) -> None:
        """Weigh each call by one over its error as it is now."""
        batch = draw(self.teacher, self.walk, SCORING_STREAMS, self.settings.batch)
        with torch.no_grad():
            errors = np.array(list(self.steps(batch, lambda call, loss: None)))
        self.weights = (1 / np.maximum(errors, LEAST_ERROR * errors.max() + TINY)).tolist()

    def steps(self, batch: Draw, update: Callable[[int, Tensor], None]) -> Iterator[float]:
        """The T calls of one trajectory, each followed by its `update`, yielding the loss before it."""
        slots: dict[int, Tensor] = {}
        outputs: list[Tensor] = []
        for call in range(self.table.num_calls):
            x = self.table.combine(call, batch.start, outputs, batch.noises)
            with torch.no_grad():
                target = self.denoise(self.teacher, call, x, batch, compute_all)
            route = compute_all if self.walk.compute is None else own_route(self.walk.compute[call], slots)
            student = self.denoise(self.student, call, x, batch, route)
            loss = functional.mse_loss(student, target)
            update(call, loss)
            outputs.append(target if self.walk.compute is None else student.detach())
            yield self.weights[call] * loss.item()

    def update(self, call: int, loss: Tensor) -> None:
        """One optimiser step, at a rate that falls linearly to 0 over the run."""
        if not loss.requires_grad:  # a schedule may reuse everything
            return
        rate = self.rate(call)
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.zero_grad(set_to_none=True)
        (self.weights[call] * loss).backward()
        self.optimizer.step()

    def rate(self, call: int) -> float:
        """The share of its learning rate that `call` of the trajectory under way is trained at."""
        calls = self.table.num_calls
        return 1 - (self.trajectory * calls + call) / (self.trajectories * calls)

    def denoise(self, adapter: Adapter, call: int, x: Tensor, batch: Draw, route: Route) -> Tensor:
        """What the solver goes by at `call`, [B, C, H, W]; a learned variance counts only where the solver uses it."""
        constants: Mapping[str, Tensor] = self.constants[call]
        if adapter is self.student:
            constants = {**constants, SCALES: self.rows[self.row_of_call[call]].exp()[None]}
        raw = adapter.guided(x, batch.condition, constants, self.walk.cfg, route)
        return solver_output(raw, constants, self.table.noise_of(call, batch.noises), self.channels)

    def score(self) -> float:
        """Signal-to-noise ratio (dB) of the student's samples, the teacher's being the signal, on held-out noise."""
        self.settle()
        held = draw(self.teacher, self.walk, SCORING_STREAMS, self.settings.batch)
        run = partial(sample, table=self.table, condition=held.condition, start=held.start, noises=held.noises)
        dense = run(self.teacher, cfg=self.walk.cfg)
        own = run(self.student, cfg=self.walk.cfg, compute=self.walk.compute)
        error = functional.mse_loss(own, dense).item()
        return 10 * math.log10(dense.square().mean().item() / max(error, TINY))

    def settle(self) -> None:
        """Hand the learned rows to the student."""
        with torch.no_grad():
            self.student.log_scales.copy_(torch.stack([self.rows[row] for row in self.row_of_call]))

    def finish(self) -> QuantizedAdapter:
        """The student with A and B folded into its integers: nothing of the training is left in it."""
        self.settle()
        replace_modules(self.student.network, {id(layer): layer.fold() for layer in self.layers})
        return self.student

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, for torch.save; load with `weights_only=True`."""
        return {
            "layers": [{name: p.detach() for name, p in layer.named_parameters()} for layer in self.layers],
            "rows": [row.detach() for row in self.rows],
            "optimizer": self.optimizer.state_dict(),
            "weights": self.weights,
            "trajectory": self.trajectory,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            for name, parameter in layer.named_parameters():
                parameter.copy_(saved[name])
        for row, saved in zip(self.rows, state["rows"], strict=True):
            row.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.weights = list(state["weights"])
        self.trajectory = state["trajectory"]


def student_of(
    teacher: Adapter, selection: Selection, amax: Tensor, walk: Walk, settings: EfficientDMSettings
) -> QuantizedAdapter:
    """The teacher with its selected layers ready to be trained; those of the modulation are rounded and done with."""
    copy, scales = twin(teacher), Scales()
    generator = torch.Generator().manual_seed(walk.seed)
    replaced: dict[int, nn.Module] = {}
    for name, format in selection.formats.items():
        linear = teacher.network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        step, column = absmax_scale(linear.weight, format), selection.columns.get(name)
        replaced[id(copy.network.get_submodule(name))] = (
            QuantLinear.of(linear, step, format, scales, None)
            if column is None
            else QALoRALinear(
                linear, step, format, scales, column, rank=settings.rank, w0=settings.w0, generator=generator
            )
        )
    replace_modules(copy.network, replaced)
    timesteps = torch.from_numpy(walk.table.timesteps)
    log_scales = step_log_scales(selection, amax, timesteps)
    plan = {"method": settings.told(), "layers": selection.plan()}
    return QuantizedAdapter(copy, log_scales, timesteps, scales, plan).to(teacher.device).eval()


def start_amax(seen: Seen, selection: Selection) -> Tensor:
    """Ranges [T, K] to start from: the largest value for 8 bits, the search of 80 points for fewer.

    The paper's code searches throughout. At 8 bits that gains nothing: 44.5 against 45.4 dB (recipes/LOG.md).
    """
    columns = []
    for column in range(selection.num_inputs):
        grid, amax = ACTIVATION_GRIDS[selection.activation(column)], seen.amax[:, column]
        if grid.high < EIGHT_BITS:
            amax = least_error(seen.values[column], seen.weights[column], amax, grid)
        columns.append(amax)
    return torch.stack(columns, dim=1)


def own_route(compute: NDArray[np.bool_], slots: Slots) -> Route:
    """Compute-or-reuse for one call of the student; what it reuses carries no gradient into the call that made it."""

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        if not compute[branch]:
            return slots[branch]
        output = evaluate()
        slots[branch] = output.detach()
        return output

    return route
