"""Write a bundle: everything that a generation needs on a machine without torch. The format is in export/FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from hcompress.adapter import Adapter
from hcompress.errors import BundleError, RunError
from hcompress.files import sha256, write_atomically
from hcompress.sampling import constants_of
from hcompress.schedule import Identity, Schedule
from hcompress_export.freeze import freeze
from hcompress_export.passes import INLINE_BYTES, Region, move_weights_out, step_graph
from hcompress_export.trace import OPSET, trace
from hcompress_runtime.bundle import CONSTANTS, FORMAT, GRAPHS, MANIFEST, WEIGHTS, Bundle, is_bundle, open_bundle
from hcompress_runtime.table import SolverTable

TOOLS = ("hcompress", "torch", "diffusers", "onnx", "onnx-ir", "onnxscript")


def export_bundle(
    adapter: Adapter,
    table: SolverTable,
    identity: Identity,
    out: Path,
    *,
    cfg: float,
    schedule: Schedule | None = None,
    opset: int = OPSET,
    inspect: Callable[[Path], object] = lambda folder: None,
) -> Bundle:
    """Freeze and write `adapter` under `table` at guidance `cfg`; without a `schedule`, the dense model.

    Nothing is at `out` until all is written and `inspect` has returned: it is given the finished folder, may run it
    and add files to it, and what it raises leaves `out` as it was. Equal input gives equal bytes.

    Raises ScheduleError for a schedule of another model or solver, BundleError where `out` is something other than a
    bundle, RunError where the disk refuses.
    """
    if schedule:
        schedule.check_fits(adapter.graph, identity)
    compute = schedule.compute if schedule else np.ones((table.num_calls, len(adapter.graph)), np.bool_)
    plan = freeze(adapter.graph, compute)
    with _replacing(Path(out)) as folder:
        traced = trace(adapter, cfg, opset=opset)
        graphs = {pattern: step_graph(traced, pattern) for pattern in plan.patterns}
        regions = _write_weights(folder / WEIGHTS, graphs.values())
        files, graph_of = {}, {}
        for pattern, model in graphs.items():
            weights = sum(regions[name].length for name in model.graph.initializers if name in regions)
            move_weights_out(model, regions, Path(WEIGHTS).name)
            content = ir.to_proto(model).SerializeToString(deterministic=True)
            graph_of[pattern] = f"{GRAPHS}/{hashlib.sha256(content).hexdigest()[:16]}.onnx"
            files[graph_of[pattern]] = {"nodes": model.graph.num_nodes(), "weight_bytes": weights}
            write_atomically(folder / graph_of[pattern], content)
        write_atomically(folder / CONSTANTS, save(_constants(adapter, table)))
        if schedule:
            schedule.save(folder / "schedule.safetensors")
        manifest = {
            "format": FORMAT,
            "identity": asdict(identity),
            "method": schedule.method if schedule else {"name": "dense"},
            "cur": float(1 - compute.mean()),
            "mac_ratio": adapter.graph.mac_ratio(compute),
            "sample_shape": list(adapter.sample_shape),
            "dtype": "float32",
            "guidance": _guidance(adapter, cfg),
            "conditions": {"labels": {"classes": int(adapter.num_classes)}},
            "opset": opset,
            "tools": {tool: version(tool) for tool in TOOLS},
            "graphs": files,
            "graph_of_step": [graph_of[step.pattern] for step in plan.steps],
            "plan": plan.to_json(),
            "files": {
                str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        }
        write_atomically(folder / MANIFEST, _readable(manifest).encode())
        inspect(folder)
    return open_bundle(out)


def _guidance(adapter: Adapter, cfg: float) -> dict[str, Any]:
    """How classifier-free guidance is laid out in the graphs."""
    if cfg == 1.0:
        return {"mode": "none", "scale": 1.0, "rows_per_sample": 1}
    halves = {"mode": "batched", "scale": cfg, "rows_per_sample": 2, "order": ["cond", "uncond"]}
    return halves | {"guided_channels": adapter.guided_channels}


def _constants(adapter: Adapter, table: SolverTable) -> dict[str, NDArray[Any]]:
    """The solver table and the step constants, T rows each."""
    with torch.no_grad():
        rows = constants_of(adapter, table)
    steps = {f"step.{name}": torch.cat([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
    return steps | {f"table.{name}": value for name, value in asdict(table).items()}


def _write_weights(path: Path, models: Any) -> dict[str, Region]:
    """Every tensor of at least INLINE_BYTES that some graph uses, once, as safetensors; says where each one lies.

    Written here because graphs point into it by offset, and because models need not fit in memory twice.
    """
    tensors: dict[str, ir.TensorProtocol] = {}
    for model in models:
        for name, value in model.graph.initializers.items():
            if value.const_value.nbytes >= INLINE_BYTES:
                tensors[name] = value.const_value
    # As the safetensors library does it: the widest types first, so that every tensor is aligned; then by name.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def content(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.tobytes())

    write_atomically(path, content)
    start = 8 + len(text)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: Region(start + begin, end - begin) for name, (begin, end) in spans.items()}


_DTYPES = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "I64",
    ir.DataType.INT8: "I8",
}


def _readable(manifest: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, and for each entry of the long ones (steps, files, graphs)."""

    def lines(value: Any, depth: int) -> str:
        pad = "  " * depth
        if depth < 3 and isinstance(value, dict) and value:
            body = (f"{pad}{json.dumps(key)}: {lines(inner, depth + 1)}" for key, inner in value.items())
            return "{\n" + ",\n".join(body) + f"\n{pad[2:]}}}"
        if depth < 4 and isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(pad + json.dumps(inner) for inner in value) + f"\n{pad[2:]}]"
        return json.dumps(value)

    return lines(manifest, 1) + "\n"


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end; on any failure `out` stays as it was.

    A kill between the two renames leaves the old bundle as `.NAME.old`.
    """
    if out.exists() and not is_bundle(out) and not (out.is_dir() and not os.listdir(out)):
        raise BundleError(f"{out} exists and is no bundle; pass another --out")
    folder, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    try:
        _remove(folder)
        folder.mkdir(parents=True)
        yield folder
        _remove(old)
        if out.exists():
            out.replace(old)
        folder.replace(out)
        _remove(old)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror}; what was there before is untouched") from error
    finally:
        _remove(folder)
