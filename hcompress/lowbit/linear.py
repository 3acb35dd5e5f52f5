"""A linear layer whose weight is stored in few bits and whose input is rounded at a step size of the current call.

    y = Q_a(x) Q_w(W)^T + bias                      hcompress.lowbit.grid

The input's step size belongs to an (input, model call): TALSQ (EfficientDM, He et al. 2024, section 3.3), where layers
that read the same tensor (the query, key and value of an attention) share one. No layer counts calls: a layer of a
branch that is reused is not called at all. The call under way is handed down by `Scales`, which the adapter fills from
the step constants and empties again.

In plain PyTorch the layer multiplies what its integers stand for, in float, made anew at each call: a float copy of all
weights would be four times the model. Where it is traced it is one operator, `hcompress::quantized_linear`, which
hcompress_export writes as QuantizeLinear, DequantizeLinear and MatMul.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from hcompress.errors import ModelError
from hcompress.lowbit.grid import ACTIVATION_GRIDS, SMALLEST_SCALE, Format, Grid


@final
class Scales:
    """The input step sizes of the call under way, float[1] for each input; one object for all layers of a network."""

    def __init__(self) -> None:
        self._current: Sequence[Tensor] | None = None

    @contextmanager
    def during(self, current: Sequence[Tensor]) -> Iterator[None]:
        """A call at step sizes `current`. Raises ModelError inside another: calls of one network do not nest."""
        if self._current is not None:
            raise ModelError("a quantized network was called from within its own call")
        self._current = current
        try:
            yield
        finally:
            self._current = None

    def __getitem__(self, column: int) -> Tensor:
        """float[1]. Raises ModelError outside a call: a layer cannot know by itself which one it is in."""
        if self._current is None:
            raise ModelError("a quantized layer was called outside its adapter; use the adapter, not its network")
        return self._current[column]


@final
class QuantLinear(nn.Module):
    """`nn.Linear` in few bits; what quantization leaves in a network.

    integers: [out, in] multiples of the scale, in the weight grid's dtype
    weight_scale: float32[out, 1], or [out, in / block]
    bias:     [out] or None, as it was
    scales, column: where the step size of the input is found; None where the input is not rounded

    `.to(dtype)` leaves integers and scales as they are: they are the model, the dtype is what it is computed in.
    """

    integers: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        integers: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        format: Format,
        scales: Scales,
        column: int | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = integers.shape
        self.format, self.scales, self.column = format, scales, column
        self.register_buffer("integers", integers)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(
        cls, linear: nn.Linear, weight_scale: Tensor, format: Format, scales: Scales, column: int | None
    ) -> QuantLinear:
        """`linear` with its weight rounded at `weight_scale`."""
        weight = linear.weight.detach()
        integers = format.weight_grid.store(weight, widen(weight_scale, weight.shape[1]))
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(integers, weight_scale, bias, format, scales, column)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in]."""
        grid = self.format.activation_grid
        step = None if self.column is None else self.scales[self.column].to(x.dtype)
        if torch.compiler.is_exporting():
            name = None if grid is None else grid.name
            return quantized_linear(x, self.integers, self.weight_scale, step, self.bias, self.format.weight, name)
        return _product(x, self.integers, self.weight_scale, step, self.bias, grid)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        integers, scale = self.integers, self.weight_scale
        super()._apply(fn, recurse)
        self.integers = integers.to(self.integers.device)  # float8 counts as a float, and would become another one
        self.weight_scale = scale.to(self.weight_scale.device)
        return self


def absmax_scale(weight: Tensor, format: Format) -> Tensor:
    """The step sizes [out, 1], or [out, in / block], at which the largest weight is the grid's last value. float32."""
    blocks = weight.detach().float().unflatten(1, (-1, format.block or weight.shape[1]))
    return (blocks.abs().amax(dim=2) / format.weight_grid.high).clamp(min=SMALLEST_SCALE)


def dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """The weight [out, in] that `integers` stand for, in the dtype of `scale` [out, blocks]."""
    return integers.to(scale.dtype) * widen(scale, integers.shape[1])


def widen(scale: Tensor, width: int) -> Tensor:
    """[out, 1] or [out, width] from a scale [out, blocks]."""
    blocks = scale.shape[1]
    return scale if blocks == 1 else scale.repeat_interleave(width // blocks, dim=1)


def _product(
    x: Tensor, integers: Tensor, weight_scale: Tensor, step: Tensor | None, bias: Tensor | None, grid: Grid | None
) -> Tensor:
    if grid is not None and step is not None:
        x = grid.fake(x, step)
    return functional.linear(x, dequantize(integers, weight_scale).to(x.dtype), bias)


@torch.library.custom_op("hcompress::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    integers: Tensor,
    weight_scale: Tensor,
    step: Tensor | None,
    bias: Tensor | None,
    weight: str,
    activation: str | None,
) -> Tensor:
    """What QuantLinear computes, as one operator for tracing. `weight` and `activation` are keys of their grids."""
    grid = None if activation is None else ACTIVATION_GRIDS[activation]
    return _product(x, integers, weight_scale, step, bias, grid)


@quantized_linear.register_fake
def _(
    x: Tensor,
    integers: Tensor,
    weight_scale: Tensor,
    step: Tensor | None,
    bias: Tensor | None,
    weight: str,
    activation: str | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], integers.shape[0]))
