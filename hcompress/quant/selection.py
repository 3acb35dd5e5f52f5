"""Which linear layers are quantized, and in which format.

What a layer is for is observed, not listed: one call of the network shows which branch, if any, runs it, and which
layers read the same tensor. Layers of branches take the format asked for. Those outside all branches (embedders, the
first layer, the last ones, skip projections) stay as they are, but for a family's block modulation: a third of DiT's
weights, so that keeping them in float32 would forfeit most of what quantization saves.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, final

import torch
from torch import Tensor, nn

from hcompress.adapter import Adapter
from hcompress.errors import ModelError, RecipeError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.grid import FORMATS, Format
from hcompress.quant.settings import QuantSettings
from hcompress_runtime.conditions import example

MODULATIONS = {"DiTTransformer2DModel": "transformer_blocks.*.norm1.linear"}
"""The block modulation (adaLN) of a family that computes it at each call, by the class of its network."""

MODULATION_FORMAT = "w8"


@final
@dataclass(frozen=True)
class Layer:
    """One linear layer of a network.

    name:   its first name there, such as "transformer_blocks.0.attn1.to_q"
    branch: index of the branch that runs it; None: it runs outside all
    input:  layers with the same number read the same tensor
    """

    name: str
    branch: int | None
    input: int


@final
@dataclass(frozen=True)
class Selection:
    """The layers that are quantized, in the order in which they run.

    formats: of each
    columns: of each whose input is rounded, the column of that input in step sizes [T, K]
    """

    layers: tuple[Layer, ...]
    formats: dict[str, Format]
    columns: dict[str, int]

    @property
    def num_inputs(self) -> int:
        """K, how many inputs are rounded."""
        return len(set(self.columns.values()))

    def num_weights(self, adapter: Adapter) -> int:
        """How many weights are quantized; biases are not."""
        return sum(adapter.network.get_submodule(name).get_parameter("weight").numel() for name in self.formats)

    def readers(self, column: int) -> list[str]:
        """The layers that read input `column`."""
        return [name for name, at in self.columns.items() if at == column]

    def activation(self, column: int) -> str:
        """What input `column` is rounded to, a key of ACTIVATION_GRIDS."""
        return self.formats[self.readers(column)[0]].activation or ""

    def plan(self) -> dict[str, Any]:
        """JSON-able: {layer: {"weight", "activation", "block", "column"}}."""
        return {name: vars(format) | {"column": self.columns.get(name)} for name, format in self.formats.items()}


@torch.no_grad()
def layers_of(adapter: Adapter) -> tuple[Layer, ...]:
    """The linear layers that one call runs, in order; those behind step constants alone are not among them."""
    constants = adapter.step_constants(torch.zeros(1, device=adapter.device))
    condition = adapter.condition(example(adapter.conditions, 1))
    inside: list[int | None] = [None]
    inputs: list[Tensor] = []  # kept alive, so that no two have one address
    found: dict[str, Layer] = {}

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        inside[0] = branch
        output = evaluate()
        inside[0] = None
        return output

    def note(name: str, x: Tensor) -> None:
        known = next((at for at, other in enumerate(inputs) if other is x), len(inputs))
        if known == len(inputs):
            inputs.append(x)
        found.setdefault(name, Layer(name, inside[0], known))

    linears = [(name, module) for name, module in adapter.network.named_modules() if isinstance(module, nn.Linear)]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])) for name, module in linears
    ]
    try:
        adapter(torch.zeros(1, *adapter.sample_shape, device=adapter.device), condition, constants, route)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found.values())


def select_as(adapter: Adapter, settings: QuantSettings) -> Selection:
    """What the `quant:` section of a recipe asks for. Raises as `select` does."""
    modulation = None if settings.modulation == "keep" else settings.modulation
    return select(adapter, settings.resolved_format, modulation=modulation, keep=settings.keep, only=settings.only)


def select(
    adapter: Adapter,
    format: str | Format,
    *,
    modulation: str | Format | None = MODULATION_FORMAT,
    keep: Sequence[str] = (),
    only: Sequence[str] = (),
) -> Selection:
    """The default layers in `format` (a name in FORMATS), or those that match `only`, less those that match `keep`.

    modulation: the format of the family's block modulation; None keeps it. A modulation named by `only` takes `format`.

    Raises ModelError for a network that is quantized already and for weights that are NaN or infinite, RecipeError for
    an unknown format, for a pattern that matches no layer, and where nothing is left.
    """
    if isinstance(adapter, QuantizedAdapter):
        raise ModelError("this model is quantized already; quantize the one it came from, with other settings")
    layers = layers_of(adapter)
    names = [layer.name for layer in layers]
    wanted = _format(format)
    if only:
        matching = {name for pattern in only for name in _matches(pattern, names)}
        formats = {name: wanted for name in names if name in matching}
    else:
        formats = {layer.name: wanted for layer in layers if layer.branch is not None}
        pattern = MODULATIONS.get(type(adapter.network).__name__)
        if pattern and modulation:
            formats |= dict.fromkeys(_matches(pattern, names), _format(modulation))
    kept = {name for pattern in keep for name in _matches(pattern, names)}
    formats = {name: formats[name] for name in names if name in formats and name not in kept}
    if not formats:
        raise RecipeError("no layer is left to quantize; pass fewer --keep, or other --only patterns")
    for name in formats:
        if not adapter.network.get_submodule(name).get_parameter("weight").isfinite().all():
            raise ModelError(f"the weight of {name} holds NaN or infinity; copy the model again")
    chosen = tuple(layer for layer in layers if layer.name in formats)
    formats = {name: _with_fitting_block(adapter, name, format) for name, format in formats.items()}
    return Selection(chosen, formats, _columns(chosen, formats))


def _columns(layers: Sequence[Layer], formats: dict[str, Format]) -> dict[str, int]:
    """One column for each (tensor, grid) that is rounded, in the order in which they are read."""
    columns: dict[tuple[int, str], int] = {}
    return {
        layer.name: columns.setdefault((layer.input, activation), len(columns))
        for layer in layers
        if (activation := formats[layer.name].activation)
    }


def _with_fitting_block(adapter: Adapter, name: str, format: Format) -> Format:
    """`format` with the largest block that divides both its own and the layer's width."""
    width = adapter.network.get_submodule(name).get_parameter("weight").shape[1]
    return format if format.block is None else replace(format, block=math.gcd(format.block, width))


def _format(name: str | Format) -> Format:
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise RecipeError(f"there is no format {name!r}; choose from: {', '.join(FORMATS)}")
    return FORMATS[name]


def _matches(pattern: str, names: Sequence[str]) -> list[str]:
    matching = [name for name in names if fnmatchcase(name, pattern)]
    if not matching:
        close = difflib.get_close_matches(pattern, names, n=1, cutoff=0) or ["*"]
        raise RecipeError(f"the pattern {pattern!r} matches no linear layer; layers are called such as {close[0]!r}")
    return matching
