"""EfficientDM in a run folder, alone or for life under a schedule: stages that can be killed and go on.

    distil     QALoRA and step sizes; with a schedule, the student runs under it        RUN/distil.pt
    relearn    that schedule anew on the quantized model, to the same CUR               RUN/relearn.pt
    refresh    step sizes alone, shortly, under the better of the two schedules         RUN/refresh.pt

A quantized network may bear less reuse, and not at the same places: what is reused carries the rounding of two calls.
At 8 bits it hardly does (recipes/LOG.md), so what was learned is held against what was given, on held-out noise. And
what is reused shifts the inputs of what is computed after it, so step sizes belong to a schedule
(`hcompress.schedule.Schedule.fingerprint`). Weights do not: to train them on, too, cost 1 dB in W4A8.

Legend: T calls, N branches, K inputs that are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcompress.adapter import Adapter
from hcompress.caching.harmonica import Training
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.checkpoint import resumed
from hcompress.errors import RecipeError, ScheduleError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.quant.calibration import Walk, observe
from hcompress.quant.efficientdm import Distillation, start_amax, student_of
from hcompress.quant.selection import Selection, select_as
from hcompress.quant.settings import EfficientDMSettings
from hcompress.rundir import RunDir
from hcompress.schedule import Schedule
from hcompress.setting import Setting
from hcompress.train import problem_of

REFINE_TRAJECTORIES = 120  # of a schedule that starts from the float model's
JUDGES = 32  # held-out samples that decide whether it is kept
Report = Callable[[str, int, Any], None]
"""(stage, how many trajectories it will have, the figures of the one that is done)"""


@final
@dataclass(frozen=True)
class Distilled:
    """What `distil` makes.

    adapter:  in few bits, made for `schedule`, or for running uncached
    schedule: fits `adapter`; None where none was given
    active:   bool[T, K], the step sizes that a run under `schedule` reads
    first:    as the first stage left it, made for the schedule that was given; `adapter` itself where that is kept
    """

    adapter: QuantizedAdapter
    schedule: Schedule | None
    active: Tensor | None
    first: QuantizedAdapter


def distil(
    setting: Setting,
    settings: EfficientDMSettings,
    seed: int,
    run: RunDir,
    given: Schedule | None = None,
    report: Report = lambda stage, trajectories, progress: None,
) -> Distilled:
    """Quantize the float model of `setting` as `settings` say, going on where RUN left off.

    given: the schedule that it starts from; it fits `setting`

    Raises what `check` does, ModelError where training diverges or an input has no range, RunError for a checkpoint
    that cannot be read.
    """
    teacher, selection = setting.adapter, check(setting.adapter, settings, given)
    walk = Walk(setting.table, setting.cfg, settings.samples, settings.batch, seed)
    if given is not None:
        walk = replace(walk, compute=given.compute)
    amax = amax_under(setting, selection, walk)
    student = student_of(teacher, selection, amax, walk, settings)
    student.plan["solver"] = setting.identity.solver
    stage = Distillation(teacher, student, walk, settings)
    _finish(resumed(run, "distil", stage, stage.run()), "distil", stage.trajectories, report)
    first = stage.finish()
    if given is None:
        return Distilled(first, None, None, first)
    if settings.relearn == "keep":
        identity = first.identity(str(run.path), setting.identity.solver, setting.cfg)
        kept = replace(given, identity=identity, method=given.method | {"relearn": "keep"})
        return Distilled(first, kept, active_inputs(selection, given.compute), first)

    caching = router_settings(given, settings)
    logits = first_logits(given, caching) if settings.relearn == "refine" else None
    target = teacher if settings.teacher == "fp" else None
    running = replace(setting, model=replace(setting.model, adapter=first))
    problem = replace(problem_of(running, seed), teacher=target, first=logits)
    training = Training(problem, caching)
    _finish(resumed(run, "relearn", training, training.run()), "relearn", caching.trajectories, report)
    found = {"given": (given.compute, given.logits), "learned": (training.router.hard(), training.router.logits())}
    scores = {name: problem.score_db(mask, count=JUDGES) for name, (mask, _) in found.items()}
    better = max(scores, key=lambda name: scores[name])
    compute, kept_logits = found[better]

    own = QuantizedAdapter(first.original, first.log_scales.detach().clone(), first.timesteps, first.scales, first.plan)
    shorter = settings.model_copy(update={"updates": settings.refresh})
    refresh = Distillation(teacher, own, replace(walk, compute=compute), shorter)
    _finish(resumed(run, "refresh", refresh, refresh.run()), "refresh", refresh.trajectories, report)
    adapter = refresh.finish()
    method = caching.model_dump(exclude_none=True, exclude={"order"}) | {
        "name": caching.method,
        "relearn": settings.relearn,
        "teacher": settings.teacher,
        "final_beta": training.router.beta,
        "seed": seed,
        "mac_ratio": adapter.graph.mac_ratio(compute),
        "kept": better,
        "score_db": scores,
    }
    identity = adapter.identity(str(run.path), setting.identity.solver, setting.cfg)
    schedule = Schedule(compute, adapter.graph.names, identity, method, kept_logits)
    return Distilled(adapter, schedule, active_inputs(selection, compute), first)


def check(adapter: Adapter, settings: EfficientDMSettings, given: Schedule | None) -> Selection:
    """What will be quantized.

    Raises RecipeError where no input would be, ScheduleError for a schedule from which none can be learned, what
    `select` raises.
    """
    selection = select_as(adapter, settings)
    if not selection.num_inputs:
        raise RecipeError("efficientdm learns step sizes of inputs, and none is left; pass fewer --keep")
    if given is not None and settings.relearn != "keep" and given.compute.all():
        raise ScheduleError(
            "the schedule given to --with-cache reuses nothing, so there is none to learn; leave it out, or pass "
            "--keep-schedule"
        )
    return selection


def amax_under(setting: Setting, selection: Selection, walk: Walk) -> Tensor:
    """Ranges [T, K] of the inputs on the walk; what a mask never runs keeps its range without the mask."""
    seen = observe(setting.adapter, selection, walk)
    amax = start_amax(seen, selection)
    if walk.compute is None:
        return amax
    dense = observe(setting.adapter, selection, replace(walk, compute=None))
    return torch.where(seen.ran, amax, start_amax(dense, selection))


def active_inputs(selection: Selection, compute: NDArray[np.bool_]) -> Tensor:
    """bool[T, K]: the inputs that each call of a run under `compute` [T, N] reads."""
    branch_of = {layer.name: layer.branch for layer in selection.layers}
    active = np.ones((len(compute), selection.num_inputs), bool)  # an input outside all branches always is
    for column in range(selection.num_inputs):
        branches = {branch_of[name] for name in selection.readers(column)}
        if None not in branches:
            active[:, column] = compute[:, [branch for branch in branches if branch is not None]].any(axis=1)
    return torch.from_numpy(active)


def router_settings(given: Schedule, settings: EfficientDMSettings) -> HarmoniCaSettings:
    """As `given` was learned, steered to its CUR; shorter and with no ramp where its logits are refined.

    A schedule that no router made, such as a rule's, takes the defaults with the proxy of the shipped recipes.
    """
    goals = {"beta", "target_cur", "target_speedup"}
    known = given.method if given.method.get("method") == "harmonica" else {"proxy": "sensitivity"}
    known = {key: value for key, value in known.items() if key in HarmoniCaSettings.model_fields.keys() - goals}
    if settings.relearn == "refine":
        known |= {"trajectories": REFINE_TRAJECTORIES, "ramp": 1 / REFINE_TRAJECTORIES}
    return HarmoniCaSettings.model_validate(known | {"target_cur": given.cur})


def first_logits(given: Schedule, settings: HarmoniCaSettings) -> NDArray[np.float32]:
    """The logits of `given` [T, N]; of a mask alone, some that say the same and are not too sure to change."""
    if given.logits is not None:
        return given.logits
    edge = float(np.log(settings.threshold / (1 - settings.threshold)))
    return np.where(given.compute, settings.clamp / 2, (edge - settings.clamp) / 2).astype(np.float32)


def _finish(stage: Iterator[Any], name: str, trajectories: int, report: Report) -> None:
    for progress in stage:
        report(name, trajectories, progress)
