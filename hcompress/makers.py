"""How each kind of recipe becomes a model to measure, for comparisons (hcompress.compare)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hcompress.caching.problem import Method, OneProcess
from hcompress.comparison import Cell
from hcompress.errors import NoSchedule, RunError, ScheduleError, SolverError
from hcompress.prune.finetune import ROUND
from hcompress.pruning import prune
from hcompress.quantize import quantize
from hcompress.recipe import PruneRecipe, QuantRecipe, Recipe, Run
from hcompress.rundir import RunDir, open_run
from hcompress.schedule import Schedule
from hcompress.setting import Setting
from hcompress.train import train

Tell = Callable[[str, int, int], None]
"""(what is being done, how much of it is, how much there is)"""


class Place(Protocol):
    """Where cells are made: in folders of `out`, on `device`."""

    @property
    def out(self) -> Path:
        """The comparison's folder."""

    @property
    def device(self) -> str:
        """cpu or cuda."""

    def setting(self, group: Run) -> Setting:
        """The model of `group` under its solver, loaded once."""

    def notice(self, line: str) -> None:
        """Something that a person should know."""


@dataclass(frozen=True)
class Made:
    """What a recipe came to: a model under a solver, perhaps with a schedule, and what that took.

    training: rounds, updates, seconds, of which fitting_seconds on corrections, images and peak_memory_bytes, as far as
              they are known
    """

    setting: Setting
    schedule: Schedule | None = None
    training: dict[str, float] = field(default_factory=dict)


class Impossible(Exception):
    """There is no such row: a rule without a schedule near its budget, or a solver that does not go with the model."""


def _as_it_is(place: Place, cell: Cell, tell: Tell) -> Made:
    try:
        return Made(place.setting(cell.recipe))
    except SolverError as error:
        raise Impossible(error) from error


def _cached(place: Place, cell: Cell, tell: Tell) -> Made:
    recipe, total = cell.recipe, 0
    assert isinstance(recipe, Recipe)

    def on_start(setting: Setting, method: Method) -> None:
        nonlocal total
        total = method.rounds
        tell("training", method.done, total)

    setting, run = place.setting(cell.own), open_run(place.out / cell.folder, recipe, resume=True)
    if run.schedule.exists():
        schedule = _learned(run, setting)
    else:
        try:
            schedule = train(
                recipe,
                run.path,
                resume=True,
                device=place.device,
                ranks=OneProcess(),
                on_start=on_start,
                on_progress=lambda progress: tell("training", progress.round, total),
                on_notice=place.notice,
            )
        except NoSchedule as error:
            raise Impossible(error) from error
    learns = recipe.caching.reusing_steps(setting.table.num_calls)[0]
    return Made(setting, schedule, _training(run, learns) | {"images": schedule.method.get("images_used", 0)})


def _quantized(place: Place, cell: Cell, tell: Tell) -> Made:
    calls = 0

    def on_start(setting: Setting, num_calls: int) -> None:
        nonlocal calls
        calls = num_calls

    assert isinstance(cell.recipe, QuantRecipe)
    made = quantize(
        cell.recipe,
        place.out / cell.folder,
        resume=True,
        device=place.device,
        on_start=on_start,
        on_call=lambda done: tell("calibrating", done, calls),
        on_progress=lambda stage, trajectories, progress: tell(stage, progress.round, trajectories),
    )
    training = _training(RunDir(place.out / cell.folder), made.dense.table.num_calls)
    return Made(made.quantized, made.schedule, training | {"images": 0})


def _pruned(place: Place, cell: Cell, tell: Tell) -> Made:
    assert isinstance(cell.recipe, PruneRecipe)
    made = prune(
        cell.recipe,
        place.out / cell.folder,
        resume=True,
        device=place.device,
        on_taylor=lambda step, steps, loss: tell("importance", step, steps),
        on_progress=lambda stage, rounds, progress: tell(stage, progress.round, rounds),
        on_notice=place.notice,
    )
    run = RunDir(place.out / cell.folder)
    shown = next((record["images"] for record in run.records() if record.get("stage") == "pruned"), 0)
    return Made(made.pruned, training=_training(run, ROUND) | {"images": shown})


# How each kind of recipe becomes a model to measure.
MAKERS: dict[type[Run], Callable[[Place, Cell, Tell], Made]] = {
    Run: _as_it_is,
    Recipe: _cached,
    QuantRecipe: _quantized,
    PruneRecipe: _pruned,
}


def _learned(run: RunDir, setting: Setting) -> Schedule:
    """The schedule of a finished training. Raises RunError where that was of other weights."""
    schedule = Schedule.load(run.schedule)
    try:
        schedule.check_fits(setting.adapter.graph, setting.identity)
    except ScheduleError as error:
        raise RunError(f"{run.path} was trained on another model, pass another --out: {error}") from error
    return schedule


def _training(run: RunDir, updates_per_round: int) -> dict[str, float]:
    """What the records of a run say that it took; nothing where they do not say."""
    records = [record for record in run.records() if "seconds" in record]
    if not records:
        return {}
    rounds = sum("round" in record for record in records)
    return {
        "rounds": rounds,
        "updates": rounds * updates_per_round,
        "seconds": sum(record["seconds"] for record in records),
        "fitting_seconds": sum(record["seconds"] for record in records if record.get("stage") == "corrections"),
        "peak_memory_bytes": max(record.get("peak_memory_bytes", 0) for record in records),
    }
