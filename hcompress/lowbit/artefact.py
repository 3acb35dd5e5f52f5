"""A quantized model on disk: what differs from the model it came from, and that model's name and hashes.

RUN/quantized.safetensors     one metadata key, the format's name, that holds `Origin` as JSON; and the tensors
    log_scales   float32[T, K]
    timesteps    float32[T]
    active       bool[T, K], where it was made for a schedule: the step sizes that a run under it reads
    network.*    every tensor of the network that the float one has not, or not so: integers in their own type (int4 two
                 a byte, hcompress.lowbit.grid.pack), scales, and float tensors that something was folded into
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hcompress.adapter import Adapter, config_hash, weight_hash
from hcompress.errors import ModelError
from hcompress.lowbit.adapter import QuantizedAdapter, replace_modules, twin
from hcompress.lowbit.grid import Format, pack, unpack
from hcompress.lowbit.linear import QuantLinear, Scales
from hcompress.schedule import Identity
from hcompress_runtime.files import write_atomically

FILE, FORMAT = "quantized.safetensors", "hcompress-quantized-1"


@final
@dataclass(frozen=True)
class Origin:
    """Where a quantized model comes from.

    base:     the float model's identity, with the solver and guidance that it was quantized for
    plan:     of QuantizedAdapter
    versions: of the libraries that made it
    schedule: SHA-256 of the schedule under which it was made; None: uncached
    """

    base: Identity
    plan: dict[str, Any]
    versions: dict[str, Any]
    schedule: str | None = None


def save_quantized(
    adapter: QuantizedAdapter, base: Adapter, origin: Origin, path: Path, *, active: Tensor | None = None
) -> None:
    """Write what `adapter` has other than `base`, and which step sizes are `active`. Raises DiskError."""
    before = base.network.state_dict()
    tensors = {"log_scales": adapter.log_scales.detach(), "timesteps": adapter.timesteps}
    if active is not None:
        tensors["active"] = active
    for name, tensor in adapter.network.state_dict().items():
        if name not in before or not torch.equal(tensor, before[name]):
            tensors[f"network.{name}"] = tensor
    for name, module in _quantized(adapter.network):
        if _packed(module.format, module.in_features):
            tensors[f"network.{name}.integers"] = pack(module.integers)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, {FORMAT: json.dumps(asdict(origin), sort_keys=True)}))


def read_origin(path: Path) -> Origin:
    """Where the quantized model in file `path` comes from. Raises ModelError for what is no such file."""
    return _read(path, tensors=False)[0]


def load_quantized(path: Path, base: Adapter) -> QuantizedAdapter:
    """The quantized model in file `path`, over `base`, which stays as it is.

    Raises ModelError where `base` is not the model that was quantized, or the file is damaged.
    """
    origin, tensors = _read(path)
    wanted, got = origin.base, (config_hash(base.config()), weight_hash(base.network))
    if (wanted.config_hash, wanted.weight_hash) != got:
        raise ModelError(
            f"{path} was made from a {wanted.model} of other weights ({str(wanted.weight_hash)[:12]}, "
            f"found {got[1][:12]}); bring that model back or quantize this one"
        )
    try:
        return _assemble(origin, tensors, base)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{path} lacks or garbles {error}; copy it again or quantize anew") from error


def _assemble(origin: Origin, tensors: dict[str, Tensor], base: Adapter) -> QuantizedAdapter:
    copy, scales, device = twin(base), Scales(), base.device
    network = {name.removeprefix("network."): value.to(device) for name, value in tensors.items()}
    replaced: dict[int, nn.Module] = {}
    for name, layer in origin.plan["layers"].items():
        column = layer["column"]
        format = Format(layer["weight"], layer["activation"], layer["block"])
        old = copy.network.get_submodule(name)
        integers = network.pop(f"{name}.integers")
        if _packed(format, old.get_parameter("weight").shape[1]):
            integers = unpack(integers)
        bias = network.pop(f"{name}.bias", getattr(old, "bias", None))
        new = QuantLinear(integers, network.pop(f"{name}.weight_scale"), bias, format, scales, column)
        replaced[id(old)] = new
    replace_modules(copy.network, replaced)
    log_scales, timesteps = network.pop("log_scales"), network.pop("timesteps")
    network.pop("active", None)  # for those who read the file: a run under the schedule never reads the others
    for name, value in network.items():  # folded into, but not quantized
        parent, _, leaf = name.rpartition(".")
        copy.network.get_submodule(parent)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return QuantizedAdapter(copy, log_scales, timesteps, scales, origin.plan).eval()


def _quantized(network: nn.Module) -> list[tuple[str, QuantLinear]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, QuantLinear)]


def _packed(format: Format, width: int) -> bool:
    """Whether the integers lie two a byte."""
    return format.weight == "int4" and width % 2 == 0


def _read(path: Path, *, tensors: bool = True) -> tuple[Origin, dict[str, Tensor]]:
    try:
        with safe_open(path, "torch") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is truncated or not a safetensors file ({error}); copy it or quantize anew"
        ) from error
    if FORMAT not in metadata:
        raise ModelError(f"{path} is no quantized model that this version reads: its metadata lacks {FORMAT!r}")
    try:
        described = json.loads(metadata[FORMAT])
        return Origin(**described | {"base": Identity(**described["base"])}), held
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} lacks or garbles {error}; copy it or quantize anew") from error


def network_bytes(adapter: Adapter, itemsize: int | None = None) -> int:
    """Bytes of the network's weights as a bundle holds them; equal modules count once.

    itemsize: of the weights that stay floats; None: as they are
    """
    layers = [module for _, module in _quantized(adapter.network)]
    scales = sum(4 * layer.weight_scale.numel() for layer in layers)
    integers = sum(layer.integers.numel() // (2 if _packed(layer.format, layer.in_features) else 1) for layer in layers)
    floats = adapter.graph.total_params - sum(layer.integers.numel() for layer in layers)
    return scales + integers + floats * (itemsize or adapter.dtype.itemsize)
