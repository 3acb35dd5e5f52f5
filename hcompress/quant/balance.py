"""Moving the spread of an input's channels into the weights that read it, at no cost when the model runs.

    x W^T = (x / b) (W diag(b))^T                    SmoothQuant (Xiao et al. 2023, eq. 3)

The division is folded into the rows of the linear layer that makes x, so there must be one. An attention's last layer
reads averages of the values, whose rows are divided. Where x = norm(h) (1 + scale) + shift with shift and scale of a
block's own adaLN, the rows of both are: shift' = shift / b, scale' = (1 + scale) / b - 1. PixArt's modulation is one
vector for all blocks, behind a GELU there is no linear row, and a cross-attention's query reads the residual stream:
those inputs stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from hcompress.adapter import Adapter
from hcompress.lowbit.adapter import replace_modules, twin
from hcompress.quant.selection import Selection

LEAST, MOST = 1e-4, 1e4  # that a channel is multiplied by, as modelopt clamps it


@final
@dataclass(frozen=True)
class Fold:
    """Where the input of some layers comes from.

    readers: all layers that read it
    source:  the linear layer whose output it is made of, in `parts` equal parts
    offsets: {part: c}, parts to divide as (c + y) / b - c
    """

    readers: tuple[str, ...]
    source: str
    parts: int
    offsets: Mapping[int, float]


VALUES = {name: Fold((f"{name}.to_out.0",), f"{name}.to_v", 1, {0: 0.0}) for name in ("attn1", "attn2")}
FOLDS: dict[str, tuple[Fold, ...]] = {
    "DiTTransformer2DModel": (
        Fold(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm1.linear", 6, {0: 0.0, 1: 1.0}),
        VALUES["attn1"],
        Fold(("ff.net.0.proj",), "norm1.linear", 6, {3: 0.0, 4: 1.0}),
    ),
    "PixArtTransformer2DModel": (VALUES["attn1"], VALUES["attn2"]),
}
"""The folds in each of a family's `transformer_blocks`, by the class of its network."""


def folds_of(adapter: Adapter, selection: Selection) -> dict[int, Fold]:
    """Those of `selection`'s inputs that can be divided, by column; all readers of one must be in the selection."""
    blocks = getattr(adapter.network, "transformer_blocks", ())
    every = [
        Fold(tuple(_in_block(at, name) for name in fold.readers), _in_block(at, fold.source), fold.parts, fold.offsets)
        for at in range(len(blocks))
        for fold in FOLDS.get(type(adapter.network).__name__, ())
    ]
    columns = selection.columns
    return {
        columns[fold.readers[0]]: fold
        for fold in every
        if all(name in columns for name in fold.readers) and len({columns[name] for name in fold.readers}) == 1
    }


def weight_salience(adapter: Adapter, readers: Iterable[str]) -> Tensor:
    """[in], the largest absolute weight of each input channel over all `readers`, which share the input."""
    weights = torch.cat([adapter.network.get_submodule(name).get_parameter("weight") for name in readers])
    return weights.detach().abs().amax(dim=0).float()


@torch.no_grad()
def balanced(adapter: Adapter, folds: Mapping[int, Fold], divisors: Mapping[int, Tensor]) -> Adapter:
    """A twin of `adapter` that computes the same, with input `column` divided by `divisors`[column], [in], above 0."""
    changed = {name for fold in folds.values() for name in (*fold.readers, fold.source)}
    copy = twin(adapter)
    linears = {name: _copied(copy.network.get_submodule(name)) for name in changed}
    for column, fold in folds.items():
        b = divisors[column].clamp(LEAST, MOST)
        for name in fold.readers:
            linears[name].weight.mul_(b.to(linears[name].weight))
        source = linears[fold.source]
        width = source.out_features // fold.parts
        for part, offset in fold.offsets.items():
            rows = slice(part * width, (part + 1) * width)
            source.weight[rows] /= b[:, None].to(source.weight)
            if source.bias is not None:
                source.bias[rows] = (offset + source.bias[rows]) / b.to(source.bias) - offset
    replace_modules(copy.network, {id(copy.network.get_submodule(name)): new for name, new in linears.items()})
    return copy


def _in_block(at: int, name: str) -> str:
    return f"transformer_blocks.{at}.{name}"


def _copied(linear: nn.Module) -> nn.Linear:
    """`linear` with weights of its own."""
    weight, bias = linear.get_parameter("weight"), dict(linear.named_parameters()).get("bias")
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    copy.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        copy.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return copy.train(linear.training)
