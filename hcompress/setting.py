"""A setting: one model under one solver at one number of steps and one guidance scale.

It is what a schedule belongs to (caching, freezing and evaluation all start from it), opened from names that a user
types.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from hcompress.adapter import Adapter
from hcompress.caching.rules import parse_rule
from hcompress.device import checked_device
from hcompress.errors import InputError, SolverError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.models.loading import Model, load_model
from hcompress.recipe import Run, resolve
from hcompress.rundir import RunDir
from hcompress.schedule import Identity, Schedule
from hcompress.solver import make_scheduler, probe, solver_identity
from hcompress_runtime.table import SolverTable


@dataclass(frozen=True)
class Setting:
    """model under `table` at guidance `cfg`; `identity` names all of it."""

    model: Model
    table: SolverTable
    cfg: float
    identity: Identity

    @property
    def adapter(self) -> Adapter:
        """The denoiser."""
        return self.model.adapter


def open_setting(model: str, solver: str, steps: int, cfg: float, *, device: str = "cpu") -> Setting:
    """Load MODEL and probe its solver.

    Raises ModelError or SolverError where either does not fit the other, InputError for a device that is not there.
    """
    place = checked_device(device)
    loaded = load_model(model)
    loaded.adapter.to(place)
    return under_solver(loaded, solver, steps, cfg)


def under_solver(model: Model, solver: str, steps: int, cfg: float) -> Setting:
    """The setting of a loaded model. Raises SolverError where the solver does not fit it, InputError for the scale."""
    if not 0 <= cfg < math.inf:
        raise InputError(f"--cfg {cfg} should be a finite number, 0 or more; 1 is no guidance")
    scheduler = make_scheduler(solver, model.scheduler_config)
    solver_of = dict(solver_identity(scheduler, steps))
    if isinstance(model.adapter, QuantizedAdapter):
        _check_grid(model.name, model.adapter, solver, solver_of)
    identity = model.adapter.identity(model.name, solver_of, cfg)
    return Setting(model, probe(scheduler, steps), cfg, identity)


def _check_grid(model: str, adapter: QuantizedAdapter, asked: str, solver: Mapping[str, Any]) -> None:
    """Raise SolverError where a quantized model's step sizes are those of another solver's calls."""
    own = adapter.plan["solver"]
    if own != solver:
        raise SolverError(
            f"{model} holds step sizes for the calls of {own['class']} with {own['steps']} steps, not for "
            f"{solver['class']} with {solver['steps']}; use its own, or take the nearest: hcompress quantize "
            f"{quote(model)} --resample-steps --solver {asked} --steps {solver['steps']} --out OTHER"
        )


def setting_of(recipe: Run, *, device: str = "cpu") -> Setting:
    """The setting that a recipe asks for."""
    return open_setting(recipe.model, recipe.solver.name, recipe.solver.steps, recipe.cfg, device=device)


def with_adapter(setting: Setting, adapter: Adapter, name: str) -> Setting:
    """`setting` with another adapter, whose model is called `name`."""
    identity = adapter.identity(name, setting.identity.solver, setting.cfg)
    return replace(setting, model=replace(setting.model, name=name, adapter=adapter), identity=identity)


def open_finished(run: Path, *, reuse: str | None = None) -> tuple[Setting, Schedule]:
    """The setting and the learned schedule of a finished RUN folder, checked to fit each other; read for `reuse`."""
    folder = RunDir(run)
    setting = setting_of(resolve(folder.recipe))
    schedule = Schedule.load(folder.schedule, reuse=reuse)
    schedule.check_fits(setting.adapter.graph, setting.identity)
    return setting, schedule


def open_with(
    model: str, schedule: str, solver: str, steps: int, cfg: float, *, reuse: str | None = None
) -> tuple[Setting, Schedule]:
    """The setting of MODEL and a schedule for it: a schedule.safetensors, a run of one, or a rule (`random:0.375`).

    A file brings its own solver steps, which must be those asked for, and is read for `reuse`. Raises ModelError,
    ScheduleError.
    """
    setting = open_setting(model, solver, steps, cfg)
    if Path(schedule).exists():
        learned = Schedule.load(Path(schedule), reuse=reuse)
        learned.check_fits(setting.adapter.graph, setting.identity)
        return setting, learned
    return setting, ruled(setting, schedule)


def ruled(setting: Setting, rule: str) -> Schedule:
    """The schedule that a rule such as `random:0.375` gives the model of `setting`. Raises ScheduleError."""
    graph = setting.adapter.graph
    compute = parse_rule(rule, setting.table.num_calls, graph)
    return Schedule(compute, graph.names, setting.identity, {"name": "rule", "rule": rule})
