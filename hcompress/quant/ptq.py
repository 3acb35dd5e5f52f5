"""Quantization after training, on nvidia-modelopt: its calibrators measure, its algorithms set the ranges.

modelopt works on a twin of the network, on the layers of an explicit list (its own patterns switch on norms and switch
off `*proj_out*`); what it found is read from its quantizers, and the network in few bits is our own. Each of its input
quantizers gets a calibrator that keeps a calibrator of modelopt's for every model call, chosen by the sampler's loop.

SmoothQuant is applied where its multiplier can be folded (hcompress.quant.balance), and is left out elsewhere: a
multiplication before each layer would cost more than it gains. Layers that read one tensor must share it: of
s_j = absmax(W_j)^(1-a) / absmax(X_j)^a for each reader the largest is that of all their weights together.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcompress.adapter import Adapter
from hcompress.errors import ModelError, RecipeError, missing
from hcompress.lowbit.adapter import QuantizedAdapter, twin
from hcompress.lowbit.grid import SMALLEST_SCALE, Format
from hcompress.quant.balance import balanced, folds_of
from hcompress.quant.build import build
from hcompress.quant.calibration import Walk, check_amax, nearest_run, walk_through
from hcompress.quant.selection import Selection, select_as
from hcompress.quant.settings import PtqSettings

TINY = 1e-8  # what SmoothQuant takes a weight for that ignores an input: modelopt divides by it
BITS: dict[str, int | tuple[int, int]] = {"int8": 8, "int4": 4, "fp8": (4, 3)}  # as modelopt calls them


def ptq(
    adapter: Adapter,
    walk: Walk,
    settings: PtqSettings,
    on_call: Callable[[int], None] = lambda done: None,
) -> QuantizedAdapter:
    """`adapter` in few bits, by the method and in the format that `settings` name.

    Raises MissingExtra without modelopt, ModelError for an input or weight that has no range, RecipeError where
    SmoothQuant has nothing to balance, what `select` raises.
    """
    selection = select_as(adapter, settings)
    algorithm: Any = "max"
    if settings.method == "int8-smoothquant":
        if not folds_of(adapter, selection):
            raise RecipeError(
                "int8-smoothquant finds no input of this model that a linear layer makes, so there is nothing to "
                "balance; use int8-max, which it would be"
            )
        algorithm = {"method": "smoothquant", "alpha": settings.alpha}
    percentile = settings.percentile if settings.method == "int8-percentile" else None
    found = calibrate(adapter, selection, walk, algorithm, percentile, on_call)
    weight_scales, amax = found.weight_scales, found.amax
    if found.multipliers:
        folds = folds_of(adapter, selection)
        divisors = {
            column: 1 / torch.stack([found.multipliers[name] for name in fold.readers]).amax(dim=0)
            for column, fold in folds.items()
        }
        adapter = balanced(adapter, folds, divisors)
        for column, divisor in divisors.items():
            amax[:, column] = (found.channels[column] / divisor).amax(dim=1)
        amax = nearest_run(amax, found.ran)
        weight_scales = {}  # of weights that have changed; those of modelopt hold a multiplier for each reader
    if settings.one_scale:
        amax = amax.amax(dim=0, keepdim=True)
    timesteps = torch.from_numpy(walk.table.timesteps)
    return build(adapter, selection, amax, timesteps, settings.told(), weight_scales)


@dataclass(frozen=True)
class Found:
    """What modelopt measured. T calls, K inputs.

    amax:          float32[T, K]; at a call that does not run an input's layers, that of the nearest call that does
    ran:           bool[T, K], which calls run them
    weight_scales: float32[out, blocks] by layer
    channels:      under SmoothQuant, by column float32[T, in], the absmax of each channel
    multipliers:   under SmoothQuant, by layer float32[in], what modelopt would multiply its input by
    """

    amax: Tensor
    ran: Tensor
    weight_scales: dict[str, Tensor]
    channels: dict[int, Tensor]
    multipliers: dict[str, Tensor]


def calibrate(
    adapter: Adapter,
    selection: Selection,
    walk: Walk,
    algorithm: Any = "max",
    percentile: float | None = None,
    on_call: Callable[[int], None] = lambda done: None,
) -> Found:
    """Run modelopt's `algorithm` along `walk`. percentile: 0 to 100, of a histogram; None takes the largest value."""
    smooth = algorithm != "max"
    model = twin(adapter)
    if smooth:  # changes weights in place
        for name in selection.columns:
            layer = model.network.get_submodule(name)
            weight = layer.get_parameter("weight").clone()
            if not weight.any():
                raise ModelError(
                    f"the weight of {name} is all zero, which nothing can balance; leave the layer in float with "
                    f"--keep '{name}', or use int8-max"
                )
            weight[:, ~weight.any(dim=0)] = TINY
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantizers = convert(model, selection, algorithm, percentile, walk, on_call)
    weight_scales, multipliers, channels = {}, {}, {}
    for name, format in selection.formats.items():
        layer = model.network.get_submodule(name)
        amax = layer.get_submodule("weight_quantizer").get_buffer("_amax").float()
        scale = amax.reshape(layer.get_parameter("weight").shape[0], -1) / format.weight_grid.high
        weight_scales[name] = scale.clamp(min=SMALLEST_SCALE)
        if smooth and name in selection.columns:
            multipliers[name] = quantizers[name].pre_quant_scale.float().flatten().cpu()
    calls, names = walk.table.num_calls, [selection.readers(column)[0] for column in range(selection.num_inputs)]
    amax, ran = torch.zeros(calls, len(names)), torch.zeros(calls, len(names), dtype=torch.bool)
    for column, name in enumerate(names):
        found: Mapping[int, Tensor] = quantizers[name]._calibrator.by_call()
        if smooth:
            channels[column] = torch.zeros(calls, layer_width(adapter, name))
        for call, value in found.items():
            ran[call, column], amax[call, column] = True, value.max()
            if smooth:
                channels[column][call] = value.flatten()
    check_amax(amax, ran, names)
    return Found(nearest_run(amax, ran), ran, weight_scales, channels, multipliers)


def layer_width(adapter: Adapter, name: str) -> int:
    """Channels of the input of layer `name`."""
    return int(adapter.network.get_submodule(name).get_parameter("weight").shape[1])


def convert(
    model: Adapter,
    selection: Selection,
    algorithm: Any,
    percentile: float | None,
    walk: Walk,
    on_call: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Make `model` modelopt's, in place, calibrated along `walk`, which weights alone do not need.

    Returns its input quantizers, by layer.

    modelopt greets on stdout, where results go, and warns of versions that nobody here can change: both are dropped.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            import modelopt.torch.quantization as mtq
        except ModuleNotFoundError as error:
            ours = (error.name or "").startswith("modelopt")
            raise missing("nvidia-modelopt" if ours else str(error.name), "train") from error
        from hcompress.quant.by_call import ByCall, Now

        now = Now()
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for name, format in selection.formats.items():
            entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight_config(format)})
            if format.activation:
                calibrator = (ByCall, (name, now, percentile))
                config = {"num_bits": BITS[format.activation], "axis": None, "calibrator": calibrator}
                entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": config})
        mtq.quantize(
            model.network,
            {"quant_cfg": entries, "algorithm": algorithm},
            (lambda network: walk_through(model, walk, now.set, on_call)) if selection.columns else None,
        )
    return {name: model.network.get_submodule(name).get_submodule("input_quantizer") for name in selection.columns}


def weight_config(format: Format) -> dict[str, Any]:
    """modelopt's configuration of a weight: a scale for each output channel, or for each block of inputs."""
    shape: dict[str, Any] = {"axis": 0} if format.block is None else {"block_sizes": {-1: format.block}}
    return {"num_bits": BITS[format.weight]} | shape
