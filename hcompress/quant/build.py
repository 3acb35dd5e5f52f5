"""From a network, what was selected of it and ranges, to the network in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hcompress.adapter import Adapter
from hcompress.errors import ModelError
from hcompress.lowbit.adapter import QuantizedAdapter, replace_modules, twin
from hcompress.lowbit.grid import ACTIVATION_GRIDS, SMALLEST_SCALE
from hcompress.lowbit.linear import QuantLinear, Scales, absmax_scale
from hcompress.quant.selection import Selection


def build(
    adapter: Adapter,
    selection: Selection,
    amax: Tensor,
    timesteps: Tensor,
    method: Mapping[str, Any],
    weight_scales: Mapping[str, Tensor] | None = None,
) -> QuantizedAdapter:
    """The selected layers of `adapter` in their formats; `adapter` itself stays as it is, and shares what is kept.

    amax:          [T, K], the range of each input at each call; [1, K] for one at all calls
    timesteps:     [T], of the calls; calls at one timestep share the larger range, as they cannot be told apart
    method:        how it came to be, JSON-able; its `name` is that of the method
    weight_scales: [out, blocks] by layer; a layer without takes the range of its weights

    Raises ModelError for a range that is not finite or not above 0.
    """
    plan = {"method": dict(method), "layers": selection.plan()}
    log_scales = step_log_scales(selection, amax.expand(len(timesteps), -1), timesteps)
    copy, scales = twin(adapter), Scales()
    replaced: dict[int, QuantLinear] = {}
    for name, format in selection.formats.items():
        linear = adapter.network.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scale = (weight_scales or {}).get(name)
        if scale is None:
            scale = absmax_scale(linear.weight, format)
        replaced[id(copy.network.get_submodule(name))] = QuantLinear.of(
            linear, scale, format, scales, selection.columns.get(name)
        )
    replace_modules(copy.network, replaced)
    return QuantizedAdapter(copy, log_scales, timesteps, scales, plan).to(adapter.device).eval()


def step_log_scales(selection: Selection, amax: Tensor, timesteps: Tensor) -> Tensor:
    """Logarithms of the step sizes, float32[T, K], of ranges `amax` [T, K] at `timesteps` [T]."""
    if not amax.isfinite().all() or (amax <= 0).any():
        column = int((~(amax.isfinite() & (amax > 0))).any(dim=0).nonzero()[0])
        raise ModelError(f"the range of the input of {selection.readers(column)[0]} is not finite or not above 0")
    same = timesteps[:, None] == timesteps[None]  # [T, T]
    amax = amax.float().cpu()
    shared = torch.stack([amax[rows.cpu()].amax(dim=0) for rows in same])
    grids = {column: ACTIVATION_GRIDS[selection.formats[name].activation or ""].high
             for name, column in selection.columns.items()}  # fmt: skip
    high = torch.tensor([grids[column] for column in range(selection.num_inputs)])
    return (shared / high).clamp(min=SMALLEST_SCALE).log()
