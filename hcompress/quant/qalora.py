"""A linear layer that learns what it will be once it is rounded: QALoRA (EfficientDM, He et al. 2024, section 3.2).

    y = Q_a(x) Q_w(W0 + B A)^T + bias

The low-rank part lies inside the rounding, so it can move a weight from one multiple of the step size to the next and
vanishes into the integers when training ends: `fold` leaves a QuantLinear that computes the same, bit for bit.
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hcompress.lowbit.grid import Format
from hcompress.lowbit.linear import QuantLinear, Scales, widen


@final
class QALoRALinear(nn.Module):
    """`linear` at learnable step sizes of its weight, plus a learnable product of rank r. The factor of B A is 1.

    weight0:   [out, in], frozen: the float weight, or with `w0="int"` what it is once rounded, as in the paper's code
    down:      A [r, in], drawn from kaiming_uniform(a = sqrt 5)
    up:        B [out, r], zero at first, so that training starts from plain rounding
    log_scale: [out, blocks], logarithm of the weight's step sizes
    """

    weight0: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        weight_scale: Tensor,
        format: Format,
        scales: Scales,
        column: int | None,
        *,
        rank: int,
        w0: Literal["fp", "int"],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        out_features, in_features = weight.shape
        self.in_features, self.out_features = in_features, out_features
        self.format, self.scales, self.column = format, scales, column
        if w0 == "int":
            weight = format.weight_grid.fake(weight, widen(weight_scale, in_features))
        self.register_buffer("weight0", weight)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        down = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(out_features, rank))
        self.log_scale = nn.Parameter(weight_scale.log().to(weight.device))

    def merged(self) -> Tensor:
        """W0 + B A, [out, in], before it is rounded."""
        return torch.addmm(self.weight0, self.up, self.down)

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in]."""
        grid = self.format.activation_grid
        if grid is not None and self.column is not None:
            x = grid.fake(x, self.scales[self.column].to(x.dtype))
        weight = checkpoint(self.rounded, use_reentrant=False, preserve_rng_state=False)
        return functional.linear(x, weight, self.bias)

    def rounded(self) -> Tensor:
        """Q_w(W0 + B A), [out, in]. Made again on the way back: its parts would be twice the model."""
        return self.format.weight_grid.fake(self.merged(), widen(self.log_scale.exp(), self.in_features))

    @torch.no_grad()
    def fold(self) -> QuantLinear:
        """The layer without A, B and W0: integers and their step sizes."""
        scale = self.log_scale.exp()
        integers = self.format.weight_grid.store(self.merged(), widen(scale, self.in_features))
        return QuantLinear(integers, scale, self.bias, self.format, self.scales, self.column)
