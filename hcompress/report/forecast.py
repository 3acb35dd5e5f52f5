"""What a training run will take, worked out before it starts: `hcompress train --dry-run`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hcompress.recipe import Recipe
from hcompress.setting import setting_of


def forecast(recipe: Recipe, device: str = "cpu") -> dict[str, Any]:
    """Model calls, slots and bytes of a run. An update costs a teacher call, a student call and its input gradient."""
    setting = setting_of(recipe, device=device)
    graph, calls, settings = setting.adapter.graph, setting.table.num_calls, recipe.caching
    rows = settings.batch * (1 if recipe.cfg == 1.0 else 2)
    refreshes = math.ceil(settings.trajectories / max(1, settings.refresh // calls))
    laziest = np.zeros((calls, len(graph)), bool)  # the most that may be reused: all but the first call
    laziest[0] = True
    elements = sum(math.prod(branch.shape) for branch in graph.branches)
    return {
        "model": recipe.model,
        "solver": f"{setting.identity.solver['class']}, {recipe.solver.steps} steps, {calls} calls",
        "branches": len(graph),
        "router_logits": calls * len(graph),
        "updates": settings.trajectories * (calls - 1),
        "updates_per_row": settings.trajectories,
        "refreshes": refreshes,
        "model_calls": settings.trajectories * (3 * calls - 2) + refreshes * (calls + calls * (calls - 1) // 2),
        "rows_per_call": rows,
        "slot_bytes": elements * rows * 4,
        "macs_dense": graph.call_macs,
        "highest_cur": float(1 - laziest.mean()),
        "highest_mac_ratio": graph.mac_ratio(laziest),
    }
