"""Number formats of few bits, and rounding to them with a gradient.

    Q(v) = s round(clip(v / s, low, high))

The gradient is straight-through (Bengio et al. 2013), and that of the step size s is LSQ's (Esser et al. 2020, eq. 3)
without its 1/sqrt factor, as in EfficientDM (He et al. 2024): inside the range dQ/dv = 1 and dQ/ds = round(v/s) - v/s,
outside dQ/dv = 0 and dQ/ds = low or high. Left to autograd, which gives the same, they take twice the time and three
times the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

SMALLEST_SCALE = 1e-7  # float16 holds it as a subnormal; below 6e-8 it would be 0, which no backend divides by


@final
@dataclass(frozen=True)
class Grid:
    """Multiples of a step size s that a value may take: those of `dtype` between `low` and `high`.

    dtype: what the multiples are stored in; a grid narrower than its dtype is packed when it is written
    """

    name: str
    low: float
    high: float
    dtype: torch.dtype

    def round(self, multiples: Tensor) -> Tensor:
        """The nearest values of the grid, ties to even, for multiples within [low, high]. No gradient."""
        if self.dtype.is_floating_point:
            return multiples.to(self.dtype).to(multiples.dtype)
        return multiples.round()

    def fake(self, v: Tensor, scale: Tensor) -> Tensor:
        """Q(v), in the dtype of `v`, with its gradients; `scale` broadcasts against `v`."""
        fake: Tensor = _Rounded.apply(v, scale, self)
        return fake

    def store(self, v: Tensor, scale: Tensor) -> Tensor:
        """The multiples of Q(v) as `dtype`."""
        return self.round((v / scale).clamp(self.low, self.high)).to(self.dtype)


class _Rounded(torch.autograd.Function):
    """Q(v) of a grid at step sizes that broadcast against v."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        multiples = v / scale
        rounded = grid.round(multiples.clamp(grid.low, grid.high))
        ctx.save_for_backward(multiples, rounded)
        ctx.grid, ctx.shape = grid, scale.shape
        return rounded * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (multiples, rounded) = grads, ctx.saved_tensors
        of_v = _where_inside(grad, multiples, ctx.grid) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_v, None, None
        slope = rounded - _where_inside(multiples, multiples, ctx.grid)
        if ctx.shape.numel() == 1:
            return of_v, torch.dot(grad.flatten(), slope.flatten()).view(ctx.shape), None
        return of_v, (grad * slope).sum_to_size(ctx.shape), None


def _where_inside(values: Tensor, multiples: Tensor, grid: Grid) -> Tensor:
    """`values`, and 0 where a multiple was clipped, in one kernel."""
    return torch.ops.aten.hardtanh_backward(values, multiples, *_just_outside(grid))


@cache
def _just_outside(grid: Grid) -> tuple[float, float]:
    """The float32 next to either end: a grid has its ends, and the kernel's range has not."""
    low, high = (float(np.nextafter(np.float32(end), np.float32(2 * end))) for end in (grid.low, grid.high))
    return low, high


# A weight's range is symmetric; an activation uses the lowest integer too, because ONNX QuantizeLinear saturates there.
WEIGHT_GRIDS = {
    "int8": Grid("int8", -127, 127, torch.int8),
    "int4": Grid("int4", -7, 7, torch.int8),
    "fp8": Grid("fp8", -448, 448, torch.float8_e4m3fn),
}
ACTIVATION_GRIDS = {
    "int8": Grid("int8", -128, 127, torch.int8),
    "int4": Grid("int4", -8, 7, torch.int8),
    "fp8": Grid("fp8", -448, 448, torch.float8_e4m3fn),
}


@final
@dataclass(frozen=True)
class Format:
    """What a layer's weight and input are rounded to: keys of WEIGHT_GRIDS and ACTIVATION_GRIDS.

    activation: None leaves the input as it is ("weight-only")
    block:      inputs that share a scale of the weight; None: one scale for each output channel
    """

    weight: str
    activation: str | None = None
    block: int | None = None

    @property
    def weight_grid(self) -> Grid:
        """Of the weight."""
        return WEIGHT_GRIDS[self.weight]

    @property
    def activation_grid(self) -> Grid | None:
        """Of the input, if that is rounded."""
        return None if self.activation is None else ACTIVATION_GRIDS[self.activation]


FORMATS = {
    "w8a8": Format("int8", "int8"),
    "w4a8": Format("int4", "int8"),
    "w4a4": Format("int4", "int4"),
    "fp8": Format("fp8", "fp8"),
    "w8": Format("int8"),
    "w4": Format("int4", block=128),
}
"""The formats by the name that users give them."""


def pack(integers: Tensor) -> Tensor:
    """uint8[..., n / 2] from int8[..., n] of -8 to 7: two a byte, the first in the low half, as ONNX packs INT4."""
    halves = integers.view(torch.uint8) & 15
    return halves[..., ::2] | halves[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """int8[..., 2 n] from what `pack` made of it."""
    halves = torch.stack([packed << 4, packed & 240], dim=-1).flatten(-2).view(torch.int8)
    return halves >> 4
