"""Networks with fewer heads and MLP units: taking them out, and the file that holds what is left.

Only widths inside a branch change: a slot, the residual stream and the list of branches are what they were, so every
caching method, the export and the runtime work on a pruned model as on any other. Which families can be pruned says
`Adapter.recount`.

    RUN/pruned.safetensors    one metadata key, the format's name, that holds `Widths` and the model that was pruned as
                              JSON; and every tensor of the network
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hcompress.adapter import Adapter
from hcompress.errors import ModelError
from hcompress.lowbit.adapter import SomeAdapter, twin
from hcompress_runtime.files import write_atomically

FILE, FORMAT = "pruned.safetensors", "hcompress-pruned-1"
KEY = "pruned"  # in the network's configuration, hence in the model's identity

Kept = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Of each block: the heads and the MLP units that stay, by number."""


@final
@dataclass(frozen=True)
class Widths:
    """How many heads of self-attention and units of the MLP each block has."""

    heads: tuple[int, ...]
    units: tuple[int, ...]

    @classmethod
    def of(cls, network: Any) -> Widths:
        """Those of a network. Raises ModelError where its blocks are not of the kind that can be pruned."""
        parts = [_parts(block) for block in blocks_of(network)]
        return cls(
            tuple(int(attention.heads) for attention, _, _ in parts), tuple(up.out_features for _, up, _ in parts)
        )

    def kept(self) -> Kept:
        """The first of everything."""
        return [(range(heads), range(units)) for heads, units in zip(self.heads, self.units, strict=True)]


def blocks_of(network: Any) -> list[nn.Module]:
    """The blocks of a network of diffusers. Raises ModelError where it has none that can be pruned."""
    blocks = list(getattr(network, "transformer_blocks", ()))
    if not blocks or not all(hasattr(block, "attn1") and hasattr(block, "ff") for block in blocks):
        raise ModelError(
            f"{type(network).__name__} cannot be pruned: heads and MLP units are known of DiT and PixArt only"
        )
    return blocks


def narrowed(adapter: SomeAdapter, kept: Kept) -> SomeAdapter:
    """A copy of `adapter` with these heads and units only; weights that do not change are shared."""
    copy = twin(adapter)
    for block, (heads, units) in zip(blocks_of(copy.network), kept, strict=True):
        attention, up, down = _parts(block)
        size = attention.to_q.out_features // attention.heads
        channels = (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            _take(layer, 0, channels)
        _take(attention.to_out[0], 1, channels)
        attention.heads, attention.inner_dim = len(heads), len(channels)
        attention.inner_kv_dim = len(channels)
        _take(up, 0, torch.tensor(units))
        _take(down, 1, torch.tensor(units))
    network: Any = copy.network
    network.register_to_config(**{KEY: asdict(Widths.of(network))})
    copy.recount()
    return copy


def save_pruned(adapter: Adapter, base: str, path: Path) -> None:
    """Write the network of `adapter`, which was pruned from the MODEL `base`. Raises DiskError."""
    tensors = {name: value.detach().cpu().clone() for name, value in adapter.network.state_dict().items()}
    described = {"base": base, "widths": asdict(Widths.of(adapter.network))}
    write_atomically(path, save(tensors, {FORMAT: json.dumps(described, sort_keys=True)}))


def read_base(path: Path) -> str:
    """The MODEL that the network in file `path` was pruned from. Raises ModelError for what is no such file."""
    return str(_read(path, tensors=False)[0]["base"])


def load_pruned(path: Path, base: SomeAdapter) -> SomeAdapter:
    """The pruned model in file `path`; `base` gives the kind of network and stays as it is. Raises ModelError."""
    described, tensors = _read(path)
    try:
        widths = Widths(**{name: tuple(counts) for name, counts in described["widths"].items()})
        adapter = narrowed(base, widths.kept())
        adapter.network.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path} does not fit {described.get('base')} ({reason}); prune anew") from error
    adapter.network.requires_grad_(False)
    return adapter.to(base.device)


def _parts(block: Any) -> tuple[Any, nn.Linear, nn.Linear]:
    """Self-attention of a block, and the linears into and out of its MLP's units."""
    up, down = getattr(block.ff.net[0], "proj", None), block.ff.net[2]
    if not isinstance(up, nn.Linear) or not isinstance(down, nn.Linear) or up.out_features != down.in_features:
        raise ModelError(f"an MLP of {type(block.ff.net[0]).__name__} in float cannot be pruned: its units are gated")
    return block.attn1, up, down


def _take(layer: nn.Linear, axis: int, kept: Tensor) -> None:
    """Keep these outputs (axis 0) or inputs (axis 1) of a linear."""
    kept = kept.to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, kept), requires_grad=False)
    if axis == 1:
        layer.in_features = len(kept)
        return
    layer.out_features = len(kept)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[kept], requires_grad=False)


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "torch") as file:
            metadata = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
        return json.loads(metadata[FORMAT]), held
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is truncated or not a safetensors file ({error}); copy it or prune anew") from error
    except KeyError as error:
        raise ModelError(f"{path} is no pruned model that this version reads: its metadata lacks {error}") from error
