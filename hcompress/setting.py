"""A setting: one model under one solver at one number of steps and one guidance scale.

It is what a schedule belongs to (caching, freezing and evaluation all start from it), opened from names that a user
types.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hcompress.adapter import Adapter
from hcompress.caching.rules import parse_rule
from hcompress.errors import ModelError
from hcompress.models.loading import Model, load_model
from hcompress.recipe import Recipe, resolve
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
    """Load MODEL and probe its solver. Raises ModelError or SolverError where either does not fit."""
    loaded = load_model(model)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("no CUDA device is available; pass --device cpu")
    loaded.adapter.to(device)
    scheduler = make_scheduler(solver, loaded.scheduler_config)
    identity = loaded.adapter.identity(model, dict(solver_identity(scheduler, steps)), cfg)
    return Setting(loaded, probe(scheduler, steps), cfg, identity)


def setting_of(recipe: Recipe, *, device: str = "cpu") -> Setting:
    """The setting that a recipe asks for."""
    return open_setting(recipe.model, recipe.solver.name, recipe.solver.steps, recipe.cfg, device=device)


def open_finished(run: Path) -> tuple[Setting, Schedule]:
    """The setting and the learned schedule of a finished RUN folder, checked to fit each other."""
    folder = RunDir(run)
    setting = setting_of(resolve(folder.recipe))
    schedule = Schedule.load(folder.schedule)
    schedule.check_fits(setting.adapter.graph, setting.identity)
    return setting, schedule


def open_with(model: str, schedule: str, solver: str, steps: int, cfg: float) -> tuple[Setting, Schedule]:
    """The setting of MODEL and a schedule for it: a schedule.safetensors, or a rule such as `random:0.375`.

    A file brings its own solver steps and guidance, which must be those asked for. Raises ModelError, ScheduleError.
    """
    setting = open_setting(model, solver, steps, cfg)
    graph = setting.adapter.graph
    if Path(schedule).is_file():
        learned = Schedule.load(Path(schedule))
        learned.check_fits(graph, setting.identity)
        return setting, learned
    compute = parse_rule(schedule, setting.table.num_calls, graph)
    return setting, Schedule(compute, graph.names, setting.identity, {"name": "rule", "rule": schedule})
