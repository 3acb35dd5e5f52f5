"""An adapter whose network has layers in few bits. It offers the same branches, so every caching method works on it.

The step sizes of the layers' inputs are step constants, like all else that derives from the model call alone: so
sampling, training, tracing and the exported graphs hand them on without knowing what they are.

Legend: T model calls, K inputs that are rounded; layers that read the same tensor count as one input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, final

import numpy as np
from torch import Tensor, nn

from hcompress.adapter import Adapter, Condition, Route
from hcompress.lowbit.linear import Scales
from hcompress_runtime.bundle import SCALES
from hcompress_runtime.conditions import Given

SomeAdapter = TypeVar("SomeAdapter", bound=Adapter)


@final
class QuantizedAdapter(Adapter):
    """`original` with its network's linears replaced.

    log_scales: Parameter float32[T, K], logarithms of the step sizes; row k belongs to `timesteps`[k]
    timesteps:  float32[T], the deployment grid: what the solver hands the network at each call
    plan:       what was done to which layer, JSON-able; part of the model's identity

    Step sizes are no part of the network's weights, hence not of its identity: refreshing them on a cached trajectory
    leaves the schedule valid. `.to(dtype)` leaves them and the grid in float32.
    """

    log_scales: nn.Parameter
    timesteps: Tensor

    def __init__(
        self, original: Adapter, log_scales: Tensor, timesteps: Tensor, scales: Scales, plan: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.original, self.scales, self.plan = original, scales, dict(plan)
        self.network = original.network
        self.graph, self.sample_shape = original.graph, original.sample_shape
        self.guided_channels, self.conditions = original.guided_channels, original.conditions
        self.log_scales = nn.Parameter(log_scales.float(), requires_grad=False)
        self.register_buffer("timesteps", timesteps.float())

    def config(self) -> dict[str, Any]:
        """The original's, and what was quantized how."""
        return self.original.config() | {"quantization": self.plan}

    def scheduler_config(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The original's."""
        return self.original.scheduler_config(stored)

    def step_constants(self, timesteps: Tensor) -> dict[str, Tensor]:
        """The original's, and `activation_scales` [len(timesteps), K], those of the nearest timestep of the grid."""
        constants = self.original.step_constants(timesteps)
        if not self.log_scales.shape[1]:
            return constants
        at = (timesteps.to(self.timesteps)[:, None] - self.timesteps).abs().argmin(dim=1)
        return constants | {SCALES: self.log_scales[at].exp()}

    def forward(self, x: Tensor, condition: Condition, constants: Mapping[str, Tensor], route: Route) -> Tensor:
        """As the original's; all rows of a batch are at one call."""
        current = constants[SCALES][0].split(1) if SCALES in constants else ()
        with self.scales.during(current):
            return self.original(x, condition, constants, route)

    def null_condition(self, condition: Condition) -> Condition:
        """The original's."""
        return self.original.null_condition(condition)

    def random_condition(self, rng: np.random.Generator, count: int) -> Condition:
        """The original's."""
        return self.original.random_condition(rng, count)

    def even_conditions(self, count: int, first: int = 0) -> Given:
        """The original's."""
        return self.original.even_conditions(count, first)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedAdapter:
        scales, timesteps = self.log_scales.data, self.timesteps
        super()._apply(fn, recurse)
        self.log_scales.data, self.timesteps = scales.to(self.log_scales.device), timesteps.to(self.timesteps.device)
        return self


def twin(adapter: SomeAdapter) -> SomeAdapter:
    """A copy whose modules may be replaced while `adapter` stays as it is; weights are shared, not copied."""
    shared = [*adapter.parameters(), *adapter.buffers()]
    return copy.deepcopy(adapter, {id(tensor): tensor for tensor in shared})


def replace_modules(network: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Put `replaced`[id] in the place of each module with that id, wherever a parent holds it: it may be shared."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
