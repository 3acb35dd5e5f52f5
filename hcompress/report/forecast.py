"""What a run of a caching method will take, worked out before it starts: `hcompress train --dry-run`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hcompress.caching import CACHING
from hcompress.caching.settings import HarmoniCaSettings, LearningToCacheSettings, SmoothCacheSettings
from hcompress.caching.tune import BATCH
from hcompress.errors import AbsentModel
from hcompress.recipe import Recipe, Run
from hcompress.setting import Setting, setting_of
from hcompress.solver import make_scheduler, probe, solver_identity
from hcompress.train import problem_of


def forecast(recipe: Recipe, device: str = "cpu") -> dict[str, Any]:
    """Model calls, slots and bytes of a run, and the most that its method may reuse; of a rule, what it comes to."""
    setting = setting_of(recipe, device=device)
    graph, calls, settings = setting.adapter.graph, setting.table.num_calls, recipe.caching
    reusing, _ = settings.reusing_steps(calls)
    laziest = np.zeros((calls, len(graph)), bool)  # the most that may be reused
    laziest[: calls - reusing] = True
    work = _work(recipe, setting)
    return {
        "model": recipe.model,
        "solver": f"{setting.identity.solver['class']}, {recipe.solver.steps} steps, {calls} calls",
        "method": settings.method,
        "reuse": settings.reuse,
        **({} if settings.order == 1 else {"order": settings.order}),
        "branches": len(graph),
        "entries": calls * len(graph),
        **work,
        **_fits(recipe, calls),
        "slot_bytes": sum(math.prod(branch.shape) for branch in graph.branches) * work["rows_per_call"] * 4,
        "macs_dense": graph.call_macs,
        "highest_cur": float(1 - laziest.mean()),
        "highest_mac_ratio": graph.mac_ratio(laziest),
    }


def _fits(recipe: Recipe, calls: int) -> dict[str, int]:
    """Model calls that fit and that tune corrections, and the rows of each; none for rules without a fit."""
    settings = recipe.caching
    if settings.reuse != "corrected":
        return {}
    fits = 1
    if isinstance(settings, HarmoniCaSettings):  # at each refresh, and to score what would be left
        fits += 2 * math.ceil(settings.trajectories / max(1, settings.refresh // calls))
    passes = 1 if recipe.cfg == 1.0 else 2
    return {
        "fit_calls": fits * calls,
        "rows_per_fit_call": settings.fit_samples * passes,
        "tune_calls": settings.fit_steps * 4 * calls,  # uncached, cached, that again on the way back, and gradient
        "rows_per_tune_call": BATCH * passes,
    }


def outline(recipe: Run, absent: AbsentModel) -> dict[str, Any]:
    """What can be said of a run while its model is out of reach: that it fits together, and its solver's calls."""
    scheduler = make_scheduler(recipe.solver.name, {})
    calls = probe(scheduler, recipe.solver.steps).num_calls
    kind = solver_identity(scheduler, recipe.solver.steps)["class"]
    told: dict[str, Any] = recipe.model_dump(exclude_none=True)
    return {
        "model": recipe.model,
        "solver": f"{kind}, {recipe.solver.steps} steps, {calls} calls",
        **{f"{section}.{name}": value for section in told for name, value in _settings(told[section])},
        "left_out": f"branches, MACs and sizes: {absent}",
    }


def _settings(section: Any) -> list[tuple[str, Any]]:
    return list(section.items()) if isinstance(section, dict) and "steps" not in section else []


def _work(recipe: Recipe, setting: Setting) -> dict[str, Any]:
    """What the method will do. An input gradient counts as a model call; rules make none."""
    settings, calls, passes = recipe.caching, setting.table.num_calls, 1 if recipe.cfg == 1.0 else 2
    match settings:
        case HarmoniCaSettings():
            refreshes = math.ceil(settings.trajectories / max(1, settings.refresh // calls))
            return {
                "updates": settings.trajectories * (calls - 1),
                "updates_per_row": settings.trajectories,
                "refreshes": refreshes,
                # teacher, student and gradient an update; a full call a trajectory
                "model_calls": settings.trajectories * (3 * calls - 2) + refreshes * (calls + calls * (calls - 1) // 2),
                "rows_per_call": settings.batch * passes,
            }
        case LearningToCacheSettings():
            updates = settings.sweeps * (calls // 2)
            return {
                "updates": updates,
                "updates_per_row": settings.sweeps,
                "images_drawn": updates * settings.batch,
                "model_calls": 4 * updates,  # the call that fills the slots, teacher, student and gradient
                "rows_per_call": settings.batch,
            }
        case SmoothCacheSettings():
            return {"samples": settings.samples, "model_calls": calls, "rows_per_call": settings.samples * passes}
    found = CACHING[settings.method](problem_of(setting, recipe.seed), settings).found().compute
    reached = {"cur": float(1 - found.mean()), "mac_ratio": setting.adapter.graph.mac_ratio(found)}
    return {"model_calls": 0, "rows_per_call": 0, **reached}
