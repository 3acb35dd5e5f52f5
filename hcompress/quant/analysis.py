"""Which layers can bear few bits: one is quantized at a time, and what that does to the output is measured.

    error of a layer = mean over calls of  |o - o_layer|^2 / |o|^2,   o the guided output on the float model's own state

States are the float trajectory's, so no layer pays for what an earlier call did. What is kept costs its bytes, so of
the layers that stand out those are proposed that do the most harm for their size, as far as a twentieth of all goes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hcompress.adapter import Adapter
from hcompress.quant.build import build
from hcompress.quant.calibration import Draw, Walk, observe
from hcompress.quant.selection import Selection
from hcompress.sampling import constants_of, trajectory

OUTLIER = 10.0  # times the median error: stands out
KEPT = 0.05  # of all weights that would be quantized may be proposed to be kept
CALLS = 5  # of the trajectory, spread evenly, on which a layer is judged


@dataclass(frozen=True)
class Sensitivity:
    """One layer's share in the damage. `error` is relative, of the guided output's square; `format` as of FORMATS."""

    name: str
    error: float
    format: str
    weights: int
    proposed: bool


def analyze(
    adapter: Adapter,
    selection: Selection,
    walk: Walk,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sensitivity]:
    """Every layer of `selection`, the most sensitive first; ranges are min-max, for each call.

    `proposed` are those to keep, see `keep`.
    on_layer: told how many of how many are done. Raises what `observe` and `build` raise.
    """
    seen = observe(adapter, selection, walk, num_values=0)
    timesteps = torch.from_numpy(walk.table.timesteps)
    calls = sorted(set(np.linspace(0, walk.table.num_calls - 1, CALLS).round().astype(int).tolist()))
    batch = next(walk.draws(adapter))
    path = trajectory(adapter, walk.table, batch.condition, batch.start, cfg=walk.cfg, noises=batch.noises)
    states = {call: x for call, (x, _, _) in enumerate(path) if call in calls}
    want = {call: _guided(adapter, walk, batch, call, x) for call, x in states.items()}
    errors: dict[str, float] = {}
    for done, layer in enumerate(selection.layers):
        alone, columns = only(selection, layer.name)
        quantized = build(adapter, alone, seen.amax[:, columns], timesteps, {"name": "analysis"})
        shares = []
        for call, x in states.items():
            off = (_guided(quantized, walk, batch, call, x) - want[call]).square().sum()
            shares.append((off / want[call].square().sum()).item())
        errors[layer.name] = statistics.fmean(shares)
        on_layer(done + 1, len(selection.layers))
    weights = {name: adapter.network.get_submodule(name).get_parameter("weight").numel() for name in errors}
    kept = keep(errors, weights)
    found = [
        Sensitivity(
            name,
            error,
            f"{selection.formats[name].weight}/{selection.formats[name].activation or 'float'}",
            weights[name],
            name in kept,
        )
        for name, error in errors.items()
    ]
    return sorted(found, key=lambda one: -one.error)


def keep(errors: Mapping[str, float], weights: Mapping[str, int]) -> set[str]:
    """Layers to leave in float: of those above OUTLIER times the median error the worst for their size, up to KEPT."""
    limit, left = OUTLIER * statistics.median(errors.values()), KEPT * sum(weights.values())
    kept = set()
    for name in sorted(errors, key=lambda name: -errors[name] / weights[name]):
        if errors[name] > limit and weights[name] <= left:
            kept.add(name)
            left -= weights[name]
    return kept


@torch.no_grad()
def _guided(adapter: Adapter, walk: Walk, batch: Draw, call: int, x: Tensor) -> Tensor:
    """The guided output at `call` on state x, without a learned variance."""
    constants = constants_of(adapter, walk.table)[call]
    return adapter.guided(x, batch.condition, constants, walk.cfg)[:, : adapter.sample_shape[0]]


def only(selection: Selection, name: str) -> tuple[Selection, list[int]]:
    """`selection` with layer `name` alone, and the columns of its inputs in the whole one: one, or none."""
    columns = [selection.columns[name]] if name in selection.columns else []
    layers = tuple(layer for layer in selection.layers if layer.name == name)
    alone = replace(
        selection,
        layers=layers,
        formats={name: selection.formats[name]},
        columns={name: 0} if columns else {},
    )
    return alone, columns
