"""8-bit products in PyTorch, where there is no TensorRT to do it: torch._int_mm and torch._scaled_mm.

They bound from below what an engine can do: quantizing inputs and scaling products are kernels of their own here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.linear import QuantLinear
from hcompress.quant.build import replace_modules

LEAST_ROWS, MULTIPLE = 32, 16  # of _int_mm on CUDA: more than 16 rows, widths that are multiples of 8; of fp8: of 16


class Multiplied(nn.Module):
    """A QuantLinear with int8 or fp8 on both sides whose product is one of these."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        if layer.format.activation != layer.format.weight or layer.column is None:
            raise ValueError(f"{layer.format} has no product of 8 bits")
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] for x [..., in]."""
        layer = self.layer
        grid, step = layer.format.activation_grid, layer.scales[layer.column]
        assert grid is not None
        rows = x.flatten(0, -2)
        q = grid.store(rows, step.to(x.dtype))
        short = max(0, LEAST_ROWS - len(q)) if grid.dtype == torch.int8 else -len(q) % MULTIPLE
        if short:
            q = functional.pad(q.view(torch.uint8), (0, 0, 0, short)).view(grid.dtype)
        if grid.dtype == torch.int8:
            y = torch._int_mm(q, layer.integers.t())
        else:
            one = torch.ones((), device=x.device)
            y = torch._scaled_mm(q, layer.integers.t(), one, one, out_dtype=torch.bfloat16)
        y = y[: len(rows)].float() * (step.float() * layer.weight_scale.float().squeeze(1))
        y = y if layer.bias is None else y + layer.bias.float()
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def multiplied(adapter: QuantizedAdapter, device: str) -> QuantizedAdapter:
    """A copy on `device` whose layers in few bits are multiplied in few bits."""
    adapter = copy.deepcopy(adapter).to(device)
    layers = [module for module in adapter.network.modules() if isinstance(module, QuantLinear)]
    replace_modules(adapter.network, {id(layer): Multiplied(layer) for layer in layers})  # type: ignore[misc]
    return adapter
