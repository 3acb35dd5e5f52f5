"""A diffusion solver as a table of numbers.

Every step of DDIM, DPM-Solver++, Euler, flow matching, ... is affine in (the start noise, the model outputs so far,
the noises drawn so far) as long as nothing is clipped or thresholded. So the input of model call k is

    x_k = start[k] x_T + sum_{j<k} outputs[k, j] o_j + sum_m noises[k, m] n_m

and row T, one past the last call, is the finished sample. The scale that Euler-like schedulers put on the model's
input is already inside. Rows count executed model calls, so solvers with two calls a step need no special case.
`hcompress.solver` makes tables by probing diffusers' schedulers; nothing here knows a solver by name.

One solver is affine but for the scale of its noise, which is the model's own guess v in [-1, 1] of the variance (IDDPM,
Nichol and Dhariwal 2021, eq. 15). Its noise goes into the output instead, after which all is affine again:

    o_k = (the model's prediction) + gain[k] n_k exp(slope[k] (1 + v))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SolverTable:
    """Affine coefficients of one solver at one number of steps.

    Legend: T model calls, M noise draws.

    timesteps: float64[T]         what the model is told as its time at each call
    start:     float64[T + 1]     weight of the unit-variance start noise x_T
    outputs:   float64[T + 1, T]  weight of each model output; strictly lower triangular
    noises:    float64[T + 1, M]  weight of each unit-variance noise; M = 0 for deterministic solvers
    learned:   float64[T, 2]      gain and slope of each call, and `noises` is 0; None where no variance is learned
    """

    timesteps: NDArray[np.float64]
    start: NDArray[np.float64]
    outputs: NDArray[np.float64]
    noises: NDArray[np.float64]
    learned: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        calls = len(self.timesteps)
        shapes = (self.start.shape, self.outputs.shape, self.noises.shape[:1])
        if shapes != ((calls + 1,), (calls + 1, calls), (calls + 1,)) or self.noises.ndim != 2:
            raise ValueError(f"a solver table of {calls} calls cannot have rows of shapes {shapes}")
        learned = np.zeros((calls, 2)) if self.learned is None else self.learned
        if learned.shape != (calls, 2):
            raise ValueError(f"gains and slopes of {calls} calls cannot be of shape {learned.shape}")
        if not all(np.isfinite(a).all() for a in (self.timesteps, self.start, self.outputs, self.noises, learned)):
            raise ValueError("a solver table must be finite")
        if np.triu(self.outputs).any():
            raise ValueError("a solver table must be strictly lower triangular: no call may see its own output")

    @property
    def num_calls(self) -> int:
        """T, the number of model calls of one generation."""
        return len(self.timesteps)

    @property
    def num_noises(self) -> int:
        """M, the number of noise tensors drawn after the start noise."""
        return self.noises.shape[1]

    def noise_of(self, call: int, noises: Sequence[Any]) -> Any:
        """The noise that goes into the output of `call`; None where none does."""
        return noises[call] if self.learned is not None and call < len(noises) else None

    def combine(self, call: int, start: Any, outputs: Sequence[Any], noises: Sequence[Any] = ()) -> Any:
        """x at `call` (the finished sample at `call` = T), from arrays or tensors of one shape, any library."""
        x = start * float(self.start[call])
        for values, row in ((outputs, self.outputs[call]), (noises, self.noises[call])):
            for value, weight in zip(values, row, strict=False):
                if weight != 0.0:
                    x = x + value * float(weight)
        return x
