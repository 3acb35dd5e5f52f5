"""From a recipe to a run folder with a network in few bits in it, which is a MODEL from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch

from hcompress.adapter import Adapter
from hcompress.distil import Report, check, distil
from hcompress.errors import ModelError, ScheduleError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.artefact import FILE, Origin, load_quantized, read_origin, save_quantized
from hcompress.models.loading import load_model
from hcompress.quant import QUANTIZERS
from hcompress.quant.balance import folds_of
from hcompress.quant.calibration import Walk
from hcompress.quant.selection import Selection, select_as
from hcompress.quant.settings import EfficientDMSettings, Quant
from hcompress.recipe import QuantRecipe, SolverSettings, resolve_quant
from hcompress.rundir import RunDir, environment, open_run
from hcompress.schedule import Schedule
from hcompress.setting import Setting, open_setting, setting_of, with_adapter
from hcompress.solver import make_scheduler, probe, solver_identity


@dataclass(frozen=True)
class Quantized:
    """A model before and after, under one solver and guidance.

    schedule: that the result was made for, and fits it
    first:    where there is one, the model as it was when it ran under the float model's schedule; `quantized` itself
              where that is kept
    """

    dense: Setting
    quantized: Setting
    schedule: Schedule | None = None
    first: Setting | None = None


def walk_of(setting: Setting, settings: Quant, seed: int, schedule: Schedule | None = None) -> Walk:
    """The trajectory that a recipe calibrates on: uncached, or under `schedule`."""
    compute = None if schedule is None else schedule.compute
    return Walk(setting.table, setting.cfg, settings.samples, settings.batch, seed, compute)


def open_float(recipe: QuantRecipe, *, device: str = "cpu") -> Setting:
    """The setting that is to be quantized. Raises ModelError where it already is, RecipeError for a setting unused."""
    recipe.quant.check_used()
    if (Path(recipe.model) / FILE).is_file():
        base = read_origin(Path(recipe.model) / FILE).base.model
        raise ModelError(
            f"{recipe.model} is quantized already; quantize {base}, which it came from, or pass --resample-steps "
            "to give it another solver or number of steps"
        )
    return setting_of(recipe, device=device)


def quantize(
    recipe: QuantRecipe,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    schedule: Schedule | None = None,
    on_start: Callable[[Setting, int], None] = lambda setting, calls: None,
    on_call: Callable[[int], None] = lambda done: None,
    on_progress: Report = lambda stage, trajectories, progress: None,
) -> Quantized:
    """Quantize as `recipe` says and leave `out`/quantized.safetensors. With `resume`, it goes on or is opened.

    schedule:    of the float model, whose mask the calibration runs under; None: uncached, or that of the recipe
    on_start:    gets the opened setting and the number of model calls that calibrate, `on_call` how many are done
    on_progress: told of each trajectory of a method that is trained

    A recipe with a schedule of its own (`with_cache`) leaves `out`/schedule.safetensors too.

    Raises RunError where `out` cannot be used, ScheduleError for a schedule of another model, ModelError, RecipeError.
    """
    setting, settings = open_float(recipe, device=device), recipe.quant
    if isinstance(settings, EfficientDMSettings) and settings.with_cache:
        schedule = Schedule.load(Path(settings.with_cache))
    if schedule is not None:
        schedule.check_fits(setting.adapter.graph, setting.identity)
        if schedule.corrections is not None:
            raise ScheduleError(
                f"a schedule of {schedule.reuse} reuse belongs to the float model; quantize under its plain mask, for "
                f"which nothing is trained: hcompress train {quote(recipe.model)} --schedule {_file_of(settings)} "
                f"--out PLAIN, then fit to what came out: hcompress train {quote(str(out))} "
                f"--schedule {quote(str(out))} --reuse corrected --out FITTED"
            )
    selection = selected(setting.adapter, settings, schedule)  # or there is a folder in the way of the mended command
    run = open_run(out, recipe, resume=resume)
    if isinstance(settings, EfficientDMSettings):
        on_start(setting, 0)
        return _distil(setting, settings, recipe.seed, run, schedule, on_progress)
    walk = walk_of(setting, settings, recipe.seed, schedule)
    on_start(setting, num_calls(setting.adapter, selection, settings.method, walk))
    if resume and run.quantized.is_file():
        adapter = load_quantized(run.quantized, setting.adapter)
    else:
        adapter = QUANTIZERS[settings.method](setting.adapter, walk, settings, on_call)
        adapter.plan["solver"] = setting.identity.solver
        save_quantized(adapter, setting.adapter, origin_of(setting, adapter, schedule), run.quantized)
    return Quantized(setting, with_adapter(setting, adapter, str(out)))


def _file_of(settings: Quant) -> str:
    """The schedule that a command names."""
    named = settings.with_cache if isinstance(settings, EfficientDMSettings) else None
    return quote(named) if named else "SCHEDULE"


def selected(adapter: Adapter, settings: Quant, schedule: Schedule | None = None) -> Selection:
    """What would be quantized. Raises RecipeError, ModelError, ScheduleError for what the method cannot take."""
    if isinstance(settings, EfficientDMSettings):
        return check(adapter, settings, schedule)
    return select_as(adapter, settings)


def num_calls(adapter: Adapter, selection: Selection, method: str, walk: Walk) -> int:
    """How many model calls calibrate: none where no input is rounded; PTQ4DiT walks twice where it can balance."""
    balances = method == "ptq4dit" and bool(folds_of(adapter, selection))
    return walk.num_calls * (1 + balances) if selection.num_inputs else 0


def _distil(
    setting: Setting, settings: EfficientDMSettings, seed: int, run: RunDir, given: Schedule | None, report: Report
) -> Quantized:
    """Stages that are finished are not run again: of a finished run this opens the result."""
    made = distil(setting, settings, seed, run, given, report)
    if not run.quantized.is_file():
        if made.schedule is not None:
            made.schedule.save(run.schedule)
        origin = origin_of(setting, made.adapter, made.schedule)
        save_quantized(made.adapter, setting.adapter, origin, run.quantized, active=made.active)
    result = with_adapter(setting, made.adapter, str(run.path))
    first = result if made.first is made.adapter else with_adapter(setting, made.first, str(run.path))
    return Quantized(setting, result, made.schedule, first if made.schedule else None)


def origin_of(setting: Setting, adapter: QuantizedAdapter, schedule: Schedule | None = None) -> Origin:
    """Where `adapter` comes from: the float model of `setting`, under `schedule`."""
    fingerprint = None if schedule is None else schedule.fingerprint
    return Origin(setting.identity, adapter.plan, environment()["packages"], fingerprint)


@dataclass(frozen=True)
class Resampled:
    """A quantized model on the calls of another solver, over `base`, the float model it came from."""

    base: Adapter
    adapter: QuantizedAdapter
    origin: Origin


def resampled(model: str, solver: str, steps: int) -> Resampled:
    """A quantized MODEL for another solver or number of steps: each call has the nearest timestep's step sizes.

    Raises ModelError for a model that is not quantized, ScheduleError for one that was made for a schedule of another
    number of calls: there is none that it could run under.
    """
    file = Path(model) / FILE
    if not file.is_file():
        raise ModelError(f"--resample-steps is for a folder of `hcompress quantize`, and {model} is none")
    origin = read_origin(file)
    base = load_model(origin.base.model)
    adapter = load_quantized(file, base.adapter)
    scheduler = make_scheduler(solver, base.scheduler_config)
    timesteps = torch.from_numpy(probe(scheduler, steps).timesteps).float()
    if origin.schedule is not None and len(timesteps) != len(adapter.timesteps):
        raise ScheduleError(
            f"{model} was made for a schedule of {len(adapter.timesteps)} calls, which no run of {len(timesteps)} can "
            f"have; train one on {origin.base.model} at {steps} steps, then quantize that with --with-cache"
        )
    nearest = (timesteps[:, None] - adapter.timesteps).abs().argmin(dim=1)
    plan = adapter.plan | {"solver": dict(solver_identity(scheduler, steps)), "resampled": origin.plan["solver"]}
    taken = QuantizedAdapter(adapter.original, adapter.log_scales.detach()[nearest], timesteps, adapter.scales, plan)
    return Resampled(base.adapter, taken, replace(origin, plan=plan))


def resample(model: str, solver: str, steps: int, cfg: float, out: Path, *, resume: bool = False) -> Setting:
    """`resampled` as a MODEL in `out`. Raises what that does, and RunError where `out` cannot be used."""
    made = resampled(model, solver, steps)
    run = open_run(out, recipe_of(RunDir(Path(model)), solver, steps, cfg), resume=resume)
    if not run.quantized.is_file():
        save_quantized(made.adapter, made.base, made.origin, run.quantized)
    return open_setting(str(out), solver, steps, cfg)


def recipe_of(run: RunDir, solver: str, steps: int, cfg: float) -> QuantRecipe:
    """The recipe of a quantized run with another solver, number of steps and guidance."""
    recipe = resolve_quant(run.recipe)
    return recipe.model_copy(update={"solver": SolverSettings(name=solver, steps=steps), "cfg": cfg})
