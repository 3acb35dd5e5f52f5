"""From what a user names to a bundle: open it, decide what will be written before anything is built, write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.corrections import taylor
from hcompress.errors import InputError, ScheduleError
from hcompress.lowbit.artefact import FILE, network_bytes, read_origin
from hcompress.models.decoder import load_decoder
from hcompress.recipe import resolve_any
from hcompress.rundir import RunDir, flags_of, own_flags, own_schedule
from hcompress.sampling import sample_seeded
from hcompress.schedule import Schedule
from hcompress.setting import Setting, open_finished, open_setting, open_with
from hcompress_export.bundle import export_bundle
from hcompress_export.merge import merge
from hcompress_export.parity import prove
from hcompress_export.planner import ENGINES, Estimate, choose, estimate
from hcompress_export.qdq import layers_of, opset_of
from hcompress_export.trace import OPSET, OPSETS
from hcompress_runtime.backends import check_formats, check_target, choose_flavor, load
from hcompress_runtime.bundle import ITEM_BYTES, Bundle
from hcompress_runtime.conditions import example
from hcompress_runtime.engine_cache import gpu_here


def open_source(
    source: str,
    schedule: str | None,
    *,
    dense: bool,
    solver: str | None = None,
    steps: int | None = None,
    cfg: float | None = None,
    reuse: str | None = None,
) -> tuple[Setting, Schedule | None]:
    """The setting of a finished run folder, or of a MODEL under `schedule`; a schedule too, unless `dense`.

    reuse: the rule that the schedule is to run under, where that takes no fit; None leaves it its own

    solver, steps, cfg: of a MODEL, None for ddim, and for steps and guidance of a `schedule` in a file, else 20 and 1.5

    A folder of `hcompress quantize` is a MODEL with solver, steps and guidance of its own, and perhaps a schedule; it
    is exported dense where it has none.

    Raises RunError, ModelError, SolverError, ScheduleError; InputError for a MODEL without a schedule, and for what
    differs from a folder's own.
    """
    asked = {"solver.name": solver, "solver.steps": steps, "cfg": cfg}
    asked = {key: value for key, value in asked.items() if value is not None}
    setting, found = _open(source, schedule, dense, reuse, asked)
    if found is None and reuse not in (None, "plain"):
        raise InputError(f"nothing is reused without a schedule; leave out --reuse {reuse}, or --dense")
    return setting, found and found.reusing(reuse, setting.adapter.graph)


def _open(
    source: str, schedule: str | None, dense: bool, reuse: str | None, asked: Mapping[str, Any]
) -> tuple[Setting, Schedule | None]:
    """As it was learned, read for `reuse`."""
    run, flags = RunDir(Path(source)), {"solver.name": "ddim", "solver.steps": 20, "cfg": 1.5, **asked}
    if own := own_flags(source):
        flags = own
        _refuse_others(source, own, asked)
        its = own_schedule(source)
        schedule = schedule or (str(its) if its else None)
        dense = dense or schedule is None
    elif run.recipe.exists():
        recipe = resolve_any(run.recipe)
        _refuse_others(source, flags_of(recipe), asked)
        if schedule is not None:
            raise InputError(
                f"{source} is a run with a schedule of its own; leave out --schedule, or export {recipe.model} with it"
            )
        setting, learned = open_finished(Path(source), reuse=reuse)
        return setting, None if dense else learned
    elif schedule is not None and not dense and Path(schedule).exists():
        flags |= {key: value for key, value in Schedule.load(schedule, reuse=reuse).flags.items() if key not in asked}
    solver, steps, cfg = (flags[key] for key in ("solver.name", "solver.steps", "cfg"))
    if dense:
        return open_setting(source, solver, steps, cfg), None
    if schedule is None:
        raise InputError(
            f"{source} is no run folder; a MODEL needs --schedule, a file or a rule such as random:0.375, or --dense"
        )
    return open_with(source, schedule, solver, steps, cfg, reuse=reuse)


def _refuse_others(source: str, own: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise InputError where a folder is asked for other calls than its own."""
    for key, value in asked.items():
        if value != own[key]:
            flag = {"solver.name": "--solver", "solver.steps": "--steps"}.get(key, f"--{key}")
            raise InputError(
                f"{source} is for {flag} {own[key]}, not {value}; leave {flag} out, or train or quantize anew"
            )


def check_engines(flavor: str, layout: str, sms: Sequence[int]) -> str:
    """The planner's backend for engines, once it is sure that they can be built here; the export takes minutes.

    Raises InputError for a layout or flavor that has none, MissingExtra and EngineError for what is missing.
    """
    if layout == "switch":
        raise InputError("engines need a graph for each step; pass --layout per-mask, embedded or auto with --trt")
    chosen = choose_flavor(flavor)
    library = load(chosen)
    for sm in sms if chosen.name == "rtx" else ():
        check_target(library, sm)
    if chosen.name == "trt" or not sms:
        gpu_here(chosen)
    return {"trt": "tensorrt", "rtx": "rtx"}[chosen.name]


def check_engine_formats(setting: Setting, flavor: str, sms: Sequence[int]) -> None:
    """Raise EngineError for a format that the GPUs of `sms`, or the one here, do not have; `flavor` is of those."""
    check_formats(layers_of(setting.adapter.network), sms or [gpu_here(choose_flavor(flavor))])


def check_made_for(setting: Setting, schedule: Schedule | None) -> None:
    """Raise ScheduleError where the step sizes of a quantized model were learned under another schedule."""
    file = Path(setting.model.name) / FILE
    if schedule is None or not file.is_file():
        return
    origin = read_origin(file)
    made_for = origin.schedule
    if made_for not in (None, schedule.fingerprint, replace(schedule, corrections=None).fingerprint):
        raise ScheduleError(
            f"the step sizes of {setting.model.name} were learned under schedule {str(made_for)[:12]}, not under this "
            f"one ({schedule.fingerprint[:12]}); export {setting.model.name} itself, or train a schedule on "
            f"{origin.base.model} and quantize that with --with-cache for it"
        )


@dataclass(frozen=True)
class Decision:
    """A layout and the schedule that goes into it.

    schedule:      as it will be frozen; None exports the dense model
    macs_given_up: share of the schedule's MACs that merging masks adds
    estimates:     of every layout
    chosen:        one of them
    why:           a sentence
    opset:         of ONNX, as asked; None: the usual one
    warning:       a line, where its corrections were fitted at another guidance scale
    """

    schedule: Schedule | None
    macs_given_up: float
    estimates: Mapping[str, Estimate]
    chosen: Estimate
    why: str
    opset: int | None = None
    warning: str | None = None


def decide(
    setting: Setting,
    schedule: Schedule | None,
    *,
    backend: str = "ort-cpu",
    layout: str = "auto",
    dtype: str = "float32",
    batch: int = 1,
    max_graphs: int | None = None,
    memory_budget: int | None = None,
    opset: int | None = None,
) -> Decision:
    """Merge masks where `max_graphs` asks for it, then take `layout`, or under "auto" the planner's.

    backend: a key of hcompress_export.planner.ENGINES; batch: samples; memory_budget: bytes; opset: None for the usual.
    Raises InputError where layout, precision or opset do not exist or nothing fits into the budget, ScheduleError for
    `max_graphs`.
    """
    check_made_for(setting, schedule)
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        raise InputError(f"--opset {opset} should be one of {OPSETS[0]} to {OPSETS[1]}; {OPSET} is the usual one")
    opset_of(setting.adapter.network, OPSET, opset)
    if dtype not in ITEM_BYTES:
        raise InputError(f"there is no precision {dtype!r}; choose from: {', '.join(ITEM_BYTES)}")
    graph, given_up = setting.adapter.graph, 0.0
    compute: NDArray[np.bool_] = np.ones((setting.table.num_calls, len(graph)), np.bool_)
    if schedule and max_graphs is not None:
        merged, extra = merge(graph, schedule.compute, max_graphs)
        given_up = extra / graph.total_macs(schedule.compute)
        schedule = _remasked(schedule, merged, graph, max_graphs)
    if schedule:
        compute = schedule.compute
    warning = schedule.fitted_elsewhere(setting.cfg) if schedule else None
    rows = batch * (1 if setting.cfg == 1.0 else 2)
    itemsize, widen = ITEM_BYTES[dtype], max_graphs is not None
    formats = layers_of(setting.adapter.network)
    few_bits = network_bytes(setting.adapter, itemsize) if formats else None
    every = estimate(
        graph,
        compute,
        schedule.corrections if schedule else None,
        rows=rows,
        itemsize=itemsize,
        backend=backend,
        widen=widen,
        weight_bytes=few_bits,
    )
    if ENGINES[backend]:
        every = [one for one in every if one.layout != "switch"]  # its If would cut TensorRT's fusions
    estimates = {one.layout: one for one in every}
    if layout == "auto":
        integers = any(one["weight"] == one["activation"] == "int8" for one in formats)
        chosen, why = choose(every, backend=backend, memory_budget=memory_budget, integers=integers)
        return Decision(schedule, given_up, estimates, chosen, why, opset, warning)
    if layout not in estimates:
        raise InputError(f"there is no layout {layout!r}; choose from: auto, {', '.join(estimates)}")
    chosen = estimates[layout]
    if memory_budget is not None and chosen.device_bytes > memory_budget:
        needed, allowed = (f"{size / 1e6:.1f} MB" for size in (chosen.device_bytes, memory_budget))
        raise InputError(f"{layout} needs {needed}, over the budget of {allowed}; raise it or pass --layout auto")
    return Decision(schedule, given_up, estimates, chosen, f"{layout}: as asked.", opset, warning)


def _remasked(schedule: Schedule, merged: NDArray[np.bool_], graph: BranchGraph, max_graphs: int) -> Schedule:
    """`schedule` with its masks merged: what is reused then continues other values, from other calls.

    Differences follow from the mask and are taken anew. What was fitted holds for the mask it was fitted on only.
    Raises ScheduleError where that would be another.
    """
    corrections, added = schedule.corrections, int((merged & ~schedule.compute).sum())
    if added and schedule.reuse == "corrected":
        raise ScheduleError(
            f"--max-graphs {max_graphs} computes {added} values that this schedule reuses, and its corrections were "
            "fitted on what it computes itself; leave --max-graphs out, or pass --reuse taylor or plain"
        )
    if corrections is not None and added:
        corrections = taylor(merged, graph.widths, corrections.order)
    method = schedule.method | {"max_graphs": max_graphs}
    return replace(schedule, compute=merged, method=method, logits=None, corrections=corrections)


def deploy(
    setting: Setting,
    decision: Decision,
    out: Path,
    *,
    dtype: str = "float32",
    proven: bool = True,
    progress: Callable[[str], object] = lambda doing: None,
) -> tuple[Bundle, list[float]]:
    """Write the bundle that was decided on, and the drift of its latents from PyTorch's (none where not `proven`).

    The weights of `setting` are in `dtype` from then on. Raises what `export_bundle` and `prove` raise,
    and where it is `proven` ModelError for outputs that are not finite.
    """
    schedule, errors = decision.schedule, list[float]()
    frozen = (schedule.compute, schedule.corrections) if schedule else ()
    adapter = setting.adapter.to(getattr(torch, dtype))

    def inspect(folder: Path) -> None:
        if proven:
            progress("comparing with PyTorch")
            errors.extend(prove(adapter, folder, *frozen).tolist())

    if proven:  # else a damaged model would look like a bundle that is none of it
        sample_seeded(adapter, setting.table, example(adapter.conditions, 1), seed=0, cfg=setting.cfg)
    progress("tracing, cutting, writing")
    bundle = export_bundle(
        adapter,
        setting.table,
        setting.identity,
        out,
        cfg=setting.cfg,
        schedule=schedule,
        layout=decision.chosen.layout,
        widen=bool(schedule and "max_graphs" in schedule.method),
        decoder=load_decoder(setting.model.folder),
        opset=decision.opset,
        inspect=inspect,
    )
    return bundle, errors
