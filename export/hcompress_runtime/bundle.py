"""Read a bundle, and believe nothing that its manifest has not vouched for. The format is in export/FORMAT.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hcompress_runtime.conditions import Input
from hcompress_runtime.errors import BundleError
from hcompress_runtime.plan import Plan, before
from hcompress_runtime.table import SolverTable

FORMATS = ("hcompress-bundle-1", "hcompress-bundle-2")  # the second: some step corrects what it reuses
MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"
WEIGHTS = "graphs/weights.safetensors"  # beside the graphs: ONNX external data may not lie outside the graph's folder
UPDATE = "update.onnx"  # what follows each call
DECODER = "decoder/decoder.onnx"  # of latent models; absent in pixel space
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of what a network may compute in
LAYOUTS = ("embedded", "per-mask", "switch")
SCALES = "activation_scales"  # the step constant [1, K] that holds step sizes of quantized inputs
CORRECTION = "correction."  # and a branch: the step constant [1, 3 D] that it is corrected by; and q's slot: [1, D]
AGAIN = "export or copy it again"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Legend: T model calls, B samples, R rows of the network's batch (`rows_per_sample` B).

    path:            its folder
    layout:          one of LAYOUTS
    plan:            what each call computes, reads, writes and frees
    graphs:          the graph file of each call, relative to `path`
    weight_bytes:    of each distinct graph, shared tensors counted for each
    table:           the solver
    constants:       step constants, float32[T, ...] each, row t for call t
    cfg:             guidance scale
    sample_shape:    (C, H, W)
    rows_per_sample: 2 where guidance doubles the batch, else 1
    conditions:      what the model is told of each sample
    cur, mac_ratio:  share of reused branches; MACs of the dense model over those of this one
    manifest:        everything, as it is in manifest.json
    """

    path: Path
    layout: str
    plan: Plan
    graphs: tuple[str, ...]
    weight_bytes: Mapping[str, int]
    table: SolverTable
    constants: Mapping[str, NDArray[np.float32]]
    cfg: float
    sample_shape: tuple[int, ...]
    rows_per_sample: int
    conditions: Mapping[str, Input]
    cur: float
    mac_ratio: float
    manifest: Mapping[str, Any]

    @property
    def dtype(self) -> str:
        """What the network computes and its slots are in, a key of ITEM_BYTES; all else is float32."""
        return str(self.manifest["dtype"])

    @property
    def has_decoder(self) -> bool:
        """Whether samples are latents and the bundle can make pictures of them."""
        return DECODER in self.manifest["files"]

    @property
    def all_graphs(self) -> tuple[str, ...]:
        """Every graph file that a generation needs, once: those of the calls, and the solver's update."""
        return (*dict.fromkeys(self.graphs), UPDATE)

    def peak_cache_bytes(self, batch: int) -> int:
        """The most bytes that cache slots hold at once while `batch` samples are generated."""
        return self.plan.peak_cache_bytes(batch * self.rows_per_sample, ITEM_BYTES[self.dtype])

    def total_bytes(self) -> int:
        """Of all files that the manifest lists."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def is_bundle(path: Path) -> bool:
    """Whether `path` holds a manifest of any version of this format; nothing is verified."""
    try:
        return str(json.loads((path / MANIFEST).read_text("utf-8"))["format"]).startswith("hcompress-bundle-")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_bundle(path: Path | str) -> Bundle:
    """Verify every file against the manifest, then read it. Raises BundleError, one line that names what is wrong."""
    path = Path(path)
    manifest = _read_manifest(path)
    try:
        _verify_files(path, manifest["files"])
        constants = _load_constants(path / CONSTANTS)
        bundle = Bundle(
            path=path,
            layout=manifest["layout"],
            plan=Plan.from_json(manifest),
            graphs=tuple(step["graph"] for step in manifest["steps"]),
            weight_bytes={file: graph["weight_bytes"] for file, graph in manifest["graphs"].items()},
            table=SolverTable(
                **{name: constants.pop(f"table.{name}") for name in ("timesteps", "start", "outputs", "noises")},
                learned=constants.pop("table.learned", None),
            ),
            conditions=_conditions(manifest["conditions"], constants),
            constants=constants,
            cfg=float(manifest["guidance"]["scale"]),
            sample_shape=tuple(manifest["sample_shape"]),
            rows_per_sample=int(manifest["guidance"]["rows_per_sample"]),
            cur=float(manifest["cur"]),
            mac_ratio=float(manifest["mac_ratio"]),
            manifest=manifest,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is garbled: {error}"
        raise BundleError(f"{path / MANIFEST} {reason}; {AGAIN}") from error
    _check_fits(bundle)
    return bundle


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"no bundle at {path}: {MANIFEST} is missing; `hcompress export` makes one") from error
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read as JSON ({error}); {AGAIN}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found not in [*FORMATS]:  # a list compares with anything
        known = " and ".join(map(repr, FORMATS))
        raise BundleError(f"{path} has format {found!r}, this version reads {known}; export it again")
    return dict(manifest)


def _verify_files(path: Path, files: Mapping[str, Any]) -> None:
    """Every listed file is inside the bundle, whole and unchanged."""
    root = path.resolve()
    for name, entry in files.items():
        file = path / name
        inside = not PurePosixPath(name).is_absolute() and file.resolve().is_relative_to(root)
        if not inside:
            raise BundleError(f"{path / MANIFEST} lists {name!r}, which is outside the bundle; do not use it")
        if not file.is_file():
            raise BundleError(f"{file} is missing; {AGAIN}")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(f"{file} has {size} bytes instead of {entry['bytes']}; {AGAIN}")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise BundleError(f"{file} was changed: SHA-256 {digest[:12]} instead of {entry['sha256'][:12]}; {AGAIN}")


def _load_constants(file: Path) -> dict[str, NDArray[Any]]:
    """`table.*` as float64 and the step constants as float32, without their prefix."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, KeyError) as error:
        raise BundleError(f"{file} is not a safetensors file ({error}); {AGAIN}") from error
    for name, tensor in tensors.items():
        want = np.float64 if name.startswith("table.") else np.float32
        if tensor.dtype != want:
            raise BundleError(f"{file}: {name} is {tensor.dtype} instead of {np.dtype(want)}; {AGAIN}")
        if not np.isfinite(tensor).all():
            raise BundleError(f"{file}: {name} holds NaN or infinity; {AGAIN}")
    return {name.removeprefix("step."): tensor for name, tensor in tensors.items()}


def _conditions(described: Mapping[str, Any], constants: dict[str, NDArray[Any]]) -> dict[str, Input]:
    """What the manifest describes, with the defaults that `constants` holds; takes those out of it."""
    inputs = {}
    for name, entry in described.items():
        dtype, shape = str(entry.get("dtype", "int64")), tuple(int(size) for size in entry.get("shape", ()))
        classes = entry.get("classes")
        row = constants.pop(f"condition.{name}", None)
        default = None if row is None else row.reshape(row.shape[1:]).astype(dtype)
        inputs[name] = Input(dtype, shape, None if classes is None else int(classes), default)
    if all(one.default is not None for one in inputs.values()):
        raise ValueError("no condition says how many samples there are")
    return inputs


def _check_fits(bundle: Bundle) -> None:
    """The parts were made for each other: T steps everywhere, graphs that exist and are vouched for."""
    if bundle.layout not in LAYOUTS:
        raise BundleError(f"{bundle.path} has layout {bundle.layout!r}; this version runs: {', '.join(LAYOUTS)}")
    calls = bundle.table.num_calls
    if len(bundle.plan.steps) != calls:
        raise BundleError(f"{bundle.path} has {len(bundle.plan.steps)} steps but a solver of {calls} calls; {AGAIN}")
    for name, rows in bundle.constants.items():
        if len(rows) != calls:
            raise BundleError(f"{bundle.path / CONSTANTS}: {name} has {len(rows)} rows for {calls} calls; {AGAIN}")
    corrects = {name for step in bundle.plan.steps for name in step.corrects}
    for branch in bundle.plan.branches:
        for name, count in ((branch, 3), (before(before(branch)), 1)):
            if name not in corrects:
                continue
            vectors, size = bundle.constants.get(f"{CORRECTION}{name}"), count * bundle.plan.slots[branch][-1]
            if vectors is None or vectors.shape[1:] != (size,):
                found = "absent" if vectors is None else f"{[*vectors.shape[1:]]}"
                raise BundleError(
                    f"{bundle.path / CONSTANTS}: the correction of {name} is {found} instead of [{size}]; {AGAIN}"
                )
    for file in {*bundle.all_graphs, CONSTANTS, WEIGHTS} - bundle.manifest["files"].keys():
        raise BundleError(f"{bundle.path / MANIFEST} uses {file!r} without listing it; {AGAIN}")
    dtype = bundle.manifest.get("dtype")
    if dtype not in [*ITEM_BYTES]:  # a list compares with anything
        raise BundleError(f"{bundle.path} computes in {dtype}; this version runs: {', '.join(ITEM_BYTES)}")
