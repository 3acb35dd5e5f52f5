"""What freezing the model and the teacher saves: one SDT iteration against the released code's way of running it.

The released code freezes the network only by giving the optimiser the router alone: all weight gradients are still
computed, and the teacher builds a graph. Expected: a frozen iteration is teacher forward + student forward + input
gradient, 3 units against 6 (caching.md, section 15 of the design notes; HarmoniCa@5d7f78d, train_router.py).

Each variant runs in a process of its own. Memory is the peak of the resident set during the iterations, less what is
resident once the model is loaded.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from contextlib import nullcontext
from typing import Any

from hcompress.recipe import Recipe
from hcompress.setting import setting_of

WARM_UP = 2


def training_cost(recipe: Recipe, iterations: int = 20) -> dict[str, Any]:
    """Medians over `iterations`: {"speedup", "memory_ratio", "frozen": {...}, "unfrozen": {...}}."""
    setting_of(recipe)  # what is wrong with it shows here, and not in the other process
    context = multiprocessing.get_context("spawn")
    measured = {}
    for variant in ("frozen", "unfrozen"):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(recipe, variant == "frozen", iterations, sender))
        process.start()
        sender.close()
        measured[variant] = json.loads(receiver.recv())
        process.join()
    frozen, unfrozen = measured["frozen"], measured["unfrozen"]
    return {
        "speedup": unfrozen["iteration_ms"] / frozen["iteration_ms"],
        "memory_ratio": frozen["peak_memory_bytes"] / unfrozen["peak_memory_bytes"],
        **measured,
    }


def _measure(recipe: Recipe, frozen: bool, iterations: int, sender: Any) -> None:
    """Run SDT iterations of one variant and send their median time and peak memory as JSON."""
    import torch

    from hcompress.caching.harmonica import Training
    from hcompress.caching.settings import HarmoniCaSettings
    from hcompress.meter import CLEAR, resident_bytes
    from hcompress.train import problem_of

    setting = setting_of(recipe)
    assert isinstance(recipe.caching, HarmoniCaSettings)
    training = Training(problem_of(setting, recipe.seed), recipe.caching)
    training.router.lambdas[1:] = 1.0
    if not frozen:
        setting.adapter.requires_grad_(True)
        training.teacher_mode = nullcontext
    condition, start, noises = training.draw(0)
    before = resident_bytes("VmRSS")
    CLEAR.write_text("5")  # resets the peak of the resident set
    steps = training.steps(condition, start, noises)
    for _ in range(WARM_UP):
        next(steps)
    milliseconds = []
    for _ in range(iterations):
        begun = time.perf_counter()
        if next(steps, None) is None:
            steps = training.steps(condition, start, noises)
            continue
        milliseconds.append(1e3 * (time.perf_counter() - begun))
    figures = {
        "iteration_ms": statistics.median(milliseconds),
        "peak_memory_bytes": resident_bytes("VmHWM") - before,
        "threads": torch.get_num_threads(),
    }
    sender.send(json.dumps(figures))
