"""Write a bundle: everything that a generation needs on a machine without torch. The format is in export/FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import nn

import hcompress
from hcompress.adapter import Adapter
from hcompress.corrections import Corrections
from hcompress.errors import BundleError, DiskError
from hcompress.sampling import constants_of
from hcompress.schedule import Identity, Schedule
from hcompress_export.correct import vectors_of
from hcompress_export.decoder import write_decoder
from hcompress_export.freeze import freeze
from hcompress_export.passes import make_weights_inputs, move_weights_out, step_graph
from hcompress_export.qdq import layers_of
from hcompress_export.switch import switch_graph
from hcompress_export.trace import OPSET, trace
from hcompress_export.update import write_update
from hcompress_export.weights import write_weights
from hcompress_runtime.bundle import CONSTANTS, FORMATS, MANIFEST, WEIGHTS, Bundle, is_bundle, open_bundle
from hcompress_runtime.conditions import Input
from hcompress_runtime.files import sha256, write_atomically
from hcompress_runtime.plan import Pattern, Plan
from hcompress_runtime.table import SolverTable

SCHEDULE = "schedule.safetensors"
TOOLS = ("torch", "diffusers", "onnx", "onnx-ir", "onnxscript")


def export_bundle(
    adapter: Adapter,
    table: SolverTable,
    identity: Identity,
    out: Path,
    *,
    cfg: float,
    schedule: Schedule | None = None,
    layout: str = "embedded",
    widen: bool = False,
    decoder: nn.Module | None = None,
    opset: int | None = None,
    traced: ir.Model | None = None,
    inspect: Callable[[Path], object] = lambda folder: None,
) -> Bundle:
    """Freeze and write `adapter` under `table` at guidance `cfg`; without a `schedule`, the dense model.

    Nothing is at `out` until all is written and `inspect` has returned: it is given the finished folder, may run it
    and add files to it, and what it raises leaves `out` as it was. Equal input gives equal bytes.

    layout:  one of hcompress_runtime.bundle.LAYOUTS, see export/FORMAT.md; without slots nothing is switched
    widen:   one graph for each distinct mask, see hcompress_export.freeze
    decoder: from latents to pictures, see hcompress.models.decoder
    opset:   see `trace`
    traced:  what `trace` gives for this adapter, `cfg` and `opset`, for whoever exports it more than once

    Raises ScheduleError for a schedule of another model or solver, BundleError where `out` is something other than a
    bundle, DiskError where the disk refuses.
    """
    if schedule:
        schedule.check_fits(adapter.graph, identity)
    compute = schedule.compute if schedule else np.ones((table.num_calls, len(adapter.graph)), np.bool_)
    corrections = schedule.corrections if schedule else None
    plan = freeze(adapter.graph, compute, corrections, widen=widen, finish=layout != "switch")
    with _replacing(Path(out)) as folder:
        if traced is None:
            traced = trace(adapter, cfg, opset=opset, learned_variance=table.learned is not None)
        graphs, file_of = _write_graphs(folder, traced, plan, layout)
        write_update(folder, adapter.sample_shape, table.num_calls, opset=traced.opset_imports[""])
        write_atomically(folder / CONSTANTS, save(_constants(adapter, table, plan, corrections)))
        if schedule:
            schedule.save(folder / SCHEDULE)
        if decoder:
            write_decoder(folder, decoder, adapter.sample_shape, opset=opset or OPSET)
        frozen = plan.to_json()
        manifest = {
            "format": FORMATS[any(step.corrects for step in plan.steps)],
            "layout": layout,
            "identity": asdict(identity),
            "method": schedule.method if schedule else {"name": "dense"},
            "cur": float(1 - compute.mean()),
            "mac_ratio": adapter.graph.mac_ratio(compute),
            "sample_shape": adapter.sample_shape,
            "dtype": str(adapter.dtype).removeprefix("torch."),
            "guidance": _guidance(adapter, cfg),
            **({"quantized": quantized} if (quantized := layers_of(adapter.network)) else {}),
            "conditions": {name: _described(one) for name, one in adapter.conditions.items()},
            "opset": traced.opset_imports[""],
            "tools": {"hcompress": hcompress.__version__} | {tool: _version(tool) for tool in TOOLS},
            "branches": frozen["branches"],
            "slots": frozen["slots"],
            "steps": [
                {"graph": file_of[step.pattern]} | plain
                for step, plain in zip(plan.steps, frozen["steps"], strict=True)
            ],
            "graphs": graphs,
            "files": {
                path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(folder.rglob("*.*"))
            },
        }
        write_atomically(folder / MANIFEST, _readable(manifest).encode())
        inspect(folder)
    return open_bundle(out)


def _write_graphs(folder: Path, traced: ir.Model, plan: Plan, layout: str) -> tuple[dict[str, Any], dict[Pattern, str]]:
    """Write weights and graphs; say what each graph file holds and which file runs a pattern."""
    if layout == "switch":
        one = switch_graph(traced, plan)
        models = dict.fromkeys(plan.patterns, one)
    else:
        models = {pattern: step_graph(traced, pattern) for pattern in plan.patterns}
    regions = write_weights(folder / WEIGHTS, models.values())
    graphs, files, file_of = {}, dict[int, str](), {}
    for pattern, model in models.items():
        if id(model) not in files:
            weight_bytes = sum(regions[name].length for name in model.graph.initializers if name in regions)
            if layout == "per-mask":
                make_weights_inputs(model, regions)
            move_weights_out(model, regions, Path(WEIGHTS).name)
            content = ir.to_proto(model).SerializeToString(deterministic=True)
            file = f"{Path(WEIGHTS).parent}/{hashlib.sha256(content).hexdigest()[:16]}.onnx"
            graphs[file] = {"nodes": model.graph.num_nodes(), "weight_bytes": weight_bytes}
            files[id(model)] = file
            write_atomically(folder / file, content)
        file_of[pattern] = files[id(model)]
    return graphs, file_of


def _described(one: Input) -> dict[str, Any]:
    """An input as the manifest has it; a default is among the constants."""
    classes = {} if one.classes is None else {"classes": one.classes}
    return {"dtype": one.dtype, "shape": one.shape} | classes


def _guidance(adapter: Adapter, cfg: float) -> dict[str, Any]:
    """How classifier-free guidance is laid out in the graphs."""
    if cfg == 1.0:
        return {"mode": "none", "scale": 1.0, "rows_per_sample": 1}
    halves = {"mode": "batched", "scale": cfg, "rows_per_sample": 2, "order": ["cond", "uncond"]}
    return halves | {"guided_channels": adapter.guided_channels}


def _constants(
    adapter: Adapter, table: SolverTable, plan: Plan, corrections: Corrections | None
) -> dict[str, NDArray[Any]]:
    """The solver table and the step constants, T rows each, and the defaults of conditions, a row each.

    Steps and defaults are float32, which a graph in a half rounds to just what the adapter computes with.
    """
    with torch.no_grad():
        rows = constants_of(adapter, table)
    steps = {f"step.{name}": torch.cat([row[name] for row in rows]).float().cpu().numpy() for name in rows[0]}
    if corrections is not None:
        steps |= {f"step.{name}": rows for name, rows in vectors_of(plan, corrections).items()}
    defaults = {name: one.default for name, one in adapter.conditions.items() if one.default is not None}
    rows_of = {f"condition.{name}": default[None].astype(np.float32) for name, default in defaults.items()}
    tables = {f"table.{name}": value for name, value in asdict(table).items() if value is not None}
    return steps | rows_of | tables


def _version(tool: str) -> str | None:
    """None for what is not installed, but lies somewhere on the path."""
    try:
        return version(tool)
    except PackageNotFoundError:
        return None


def _readable(value: Any, depth: int = 0) -> str:
    """JSON with a line for each entry of the two outer levels: one for each step, graph and file."""
    if depth == 2 or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    indent, outdent = "  " * (depth + 1), "  " * depth
    if isinstance(value, dict):
        body = [f"{indent}{json.dumps(key)}: {_readable(inner, depth + 1)}" for key, inner in value.items()]
        return "{\n" + ",\n".join(body) + f"\n{outdent}}}"
    return "[\n" + ",\n".join(f"{indent}{_readable(inner, 2)}" for inner in value) + f"\n{outdent}]"


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end; on any failure `out` stays as it was.

    A kill between the two renames leaves the old bundle as `.NAME.old`.
    """
    if out.exists() and not is_bundle(out) and not (out.is_dir() and not os.listdir(out)):
        raise BundleError(f"{out} exists and is no bundle; pass another --out")
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise BundleError(f"{out} is where you are, and a bundle is put in its place whole; pass --out a folder in it")
    out = out.resolve()  # what a link names is replaced
    folder, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    try:
        _remove(folder)
        folder.mkdir(parents=True)
        yield folder
        _remove(old)
        if out.exists():
            out.replace(old)
        try:
            folder.replace(out)
        except OSError:
            old.replace(out)
            raise
        _remove(old)
    except OSError as error:
        raise DiskError(f"cannot write {out}: {error.strerror or error}; what was there before is untouched") from error
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
