"""A model in few bits under a schedule: both made for each other, in stages that can be killed and resumed.

    distil     QALoRA and step sizes, the student under the float model's schedule      RUN/distil.pt
    relearn    the schedule on the quantized model, to the same CUR                     RUN/relearn.pt
    refresh    the inputs' step sizes alone, under the schedule that was learned        RUN/refresh.pt

A quantized network bears less reuse, and not at the same places: what is reused carries the rounding of two calls. And
what is reused shifts the inputs of what is computed after it, so step sizes belong to a schedule: a bundle of the one
with another is refused (`hcompress.schedule.Schedule.fingerprint`).

Legend: T calls, N branches, K inputs that are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcompress.caching.harmonica import Training
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.checkpoint import resumed
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.quant.calibration import Walk, observe
from hcompress.quant.efficientdm import Distillation, searched, student_of
from hcompress.quant.selection import Selection
from hcompress.quant.settings import EfficientDMSettings
from hcompress.rundir import RunDir
from hcompress.schedule import Schedule
from hcompress.setting import Setting

Relearn = Literal["refine", "scratch", "keep"]
REFINE_TRAJECTORIES = 120
Report = Callable[[str, int, Any], None]


@dataclass(frozen=True)
class Cached:
    """What `quantize_cached` makes.

    adapter:   in few bits, its step sizes those of `schedule`
    schedule:  fits `adapter`
    active:    bool[T, K], the step sizes that a run under `schedule` reads; the others are as they were calibrated
    distilled: float32[T, K], log step sizes under the schedule that was given, before the refresh
    """

    adapter: QuantizedAdapter
    schedule: Schedule
    active: Tensor
    distilled: Tensor


def quantize_cached(
    setting: Setting,
    selection: Selection,
    given: Schedule,
    settings: EfficientDMSettings,
    run: RunDir,
    *,
    relearn: Relearn = "refine",
    teacher: Literal["quantized", "fp"] = "quantized",
    caching: HarmoniCaSettings | None = None,
    seed: int = 0,
    report: Report = lambda stage, trajectories, progress: None,
) -> Cached:
    """Quantize the float model of `setting` for life under a schedule, going on where RUN left off.

    given:   the schedule to start from; it fits `setting`
    relearn: "refine" goes on from its logits, or from its mask; "scratch" learns anew; "keep" keeps its mask
    teacher: of the router: the quantized model with everything computed, which leaves the error of reuse alone, or the
             float model, whose schedule may make up for both; its loss has a floor that no schedule removes
    caching: of the router; None: as `given` was learned, at its CUR
    report:  told each trajectory: (stage, how many there will be, its figures)
    """
    float_model, table = setting.adapter, setting.table
    walk = Walk(table, setting.cfg, samples=settings.samples, seed=seed, compute=given.compute)
    start = amax_under(setting, selection, walk)
    student = student_of(float_model, selection, start, walk, settings)
    stage = Distillation(float_model, student, walk, settings)
    _drain(resumed(run, "distil", stage, stage.run()), "distil", stage.trajectories, report)
    adapter = stage.finish()
    distilled = adapter.log_scales.detach().clone()

    identity = adapter.identity(setting.model.name, setting.identity.solver, setting.cfg)
    method: dict[str, Any] = {**given.method, "relearned": relearn}
    logits = given.logits
    compute = given.compute
    if relearn != "keep":
        wanted = caching or router_settings(given, relearn)
        first = first_logits(given, wanted) if relearn == "refine" else None
        reference = float_model if teacher == "fp" else None
        training = Training(adapter, table, setting.cfg, wanted, seed, teacher=reference, first=first)
        _drain(resumed(run, "relearn", training.router, training.run()), "relearn", wanted.trajectories, report)
        compute, logits = training.router.hard(wanted.threshold), training.router.logits()
        method |= wanted.model_dump(exclude_none=True)
        method |= {"name": wanted.method, "teacher": teacher, "final_beta": training.router.beta, "seed": seed}
        method |= {"mac_ratio": adapter.graph.mac_ratio(compute)}
        refresh = settings.model_copy(update={"updates": settings.refresh})
        walk = Walk(table, setting.cfg, seed=seed, compute=compute)
        stage = Distillation(float_model, adapter, walk, refresh)
        _drain(resumed(run, "refresh", stage, stage.run()), "refresh", stage.trajectories, report)
        adapter = stage.finish()
    schedule = Schedule(compute, adapter.graph.names, identity, method, logits)
    return Cached(adapter, schedule, active_inputs(selection, compute), distilled)


def amax_under(setting: Setting, selection: Selection, walk: Walk) -> Tensor:
    """Searched ranges [T, K] of the inputs under the walk's mask; what it never runs keeps its range without a mask."""
    dense = observe(setting.adapter, selection, Walk(walk.table, walk.cfg, walk.samples, walk.batch, walk.seed))
    cached = observe(setting.adapter, selection, walk)
    return torch.where(cached.ran, searched(cached, selection), searched(dense, selection))


def active_inputs(selection: Selection, compute: NDArray[np.bool_]) -> Tensor:
    """bool[T, K]: the inputs that are read at each call. An input outside all branches always is."""
    active = torch.ones(len(compute), selection.num_inputs, dtype=torch.bool)
    branch_of = {layer.name: layer.branch for layer in selection.layers}
    for column in range(selection.num_inputs):
        branches = {branch_of[name] for name in selection.readers(column)}
        if None not in branches:
            active[:, column] = torch.from_numpy(compute[:, sorted(b for b in branches if b is not None)].any(axis=1))
    return active


def router_settings(given: Schedule, relearn: Relearn) -> HarmoniCaSettings:
    """As `given` was learned, steered to its CUR; a rule's schedule takes the defaults. A refinement is shorter."""
    known = {key: value for key, value in given.method.items() if key in HarmoniCaSettings.model_fields}
    known = {key: value for key, value in known.items() if key not in ("beta", "target_cur", "target_speedup")}
    if not known:
        known = {"proxy": "sensitivity"}
    known |= {"method": "harmonica", "target_cur": given.cur}
    if relearn == "refine":
        known |= {"trajectories": REFINE_TRAJECTORIES, "ramp": 1 / REFINE_TRAJECTORIES}
    return HarmoniCaSettings.model_validate(known)


def first_logits(given: Schedule, settings: HarmoniCaSettings) -> NDArray[np.float32]:
    """The logits of `given` [T, N]; for a mask alone, ones that say the same and are not too sure of it to change."""
    if given.logits is not None:
        return given.logits
    edge = float(np.log(settings.threshold / (1 - settings.threshold)))
    return np.where(given.compute, settings.clamp / 2, (edge - settings.clamp) / 2).astype(np.float32)


def _drain(stage: Iterator[Any], name: str, trajectories: int, report: Report) -> None:
    for progress in stage:
        report(name, trajectories, progress)
