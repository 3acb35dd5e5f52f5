"""From a recipe to a run folder with a network of fewer heads and units in it, which is a MODEL from then on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hcompress.adapter import Adapter
from hcompress.checkpoint import resumed
from hcompress.errors import ModelError, RunError
from hcompress.images import ImageStream, open_images
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.process import Process, at
from hcompress.prune.finetune import STREAMS, FineTune, Progress
from hcompress.prune.parts import in_parts
from hcompress.prune.settings import PruneSettings
from hcompress.prune.taylor import importance, most_important, ratios_for
from hcompress.pruned import FILE, Kept, Widths, load_pruned, narrowed, save_pruned
from hcompress.recipe import PruneRecipe
from hcompress.rundir import RunDir, open_run
from hcompress.setting import Setting, setting_of, with_adapter
from hcompress_runtime.files import write_atomically
from hcompress_runtime.noise import gaussian

STAGE = "finetune"


@dataclass(frozen=True)
class Pruned:
    """A model before and after, under one solver and guidance; what was measured on the way is in the run's metrics."""

    original: Setting
    pruned: Setting


def open_original(recipe: PruneRecipe, *, device: str = "cpu") -> Setting:
    """The setting that is to be pruned. Raises ModelError where it cannot be."""
    setting = setting_of(recipe, device=device)
    if isinstance(setting.adapter, QuantizedAdapter):
        raise ModelError(f"{recipe.model} is quantized; prune {setting.model.folder} first, then quantize the result")
    if (Path(recipe.model) / FILE).is_file():
        raise ModelError(f"{recipe.model} is pruned already; prune what it came from with a larger ratio")
    Widths.of(setting.adapter.network)
    setting.adapter.recount()
    return setting


def prune(
    recipe: PruneRecipe,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    on_taylor: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_progress: Callable[[str, int, Progress], None] = lambda stage, rounds, progress: None,
    on_notice: Callable[[str], object] = lambda line: None,
) -> Pruned:
    """Prune and fine-tune as `recipe` says and leave `out`/pruned.safetensors. With `resume`, it goes on or is opened.

    on_taylor:   told of each step whose gradients count, of how many, and its loss
    on_progress: told of each round of the fine-tune
    on_notice:   told of images that cannot be read or have no caption, and of what takes its time

    Raises RunError where `out` cannot be used and in one of several processes, ModelError, DataError for images,
    MissingExtra without torch-pruning.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RunError(f"pruning runs in one process, and this is one of {processes}; start it without a launcher")
    setting, settings = open_original(recipe, device=device), recipe.prune
    if resume and RunDir(out).pruned.is_file():
        run = open_run(out, recipe, resume=True)
        return Pruned(setting, with_adapter(setting, load_pruned(run.pruned, setting.adapter), str(out)))
    images = open_images(setting, recipe.seed, settings.images, on_notice)
    run = open_run(out, recipe, resume=resume)
    process = whole_process(setting)
    file = kept_of(out)
    if file.is_file():
        kept = read_kept(file)
    else:
        run.rewind(0)  # killed before importance was found, a run starts over
        kept = find_kept(setting, images, process, recipe, run, on_taylor)
        write_atomically(file, json.dumps([[list(heads), list(units)] for heads, units in kept]).encode())
    tuning = FineTune(
        setting.adapter,
        narrowed(setting.adapter, kept),
        process,
        lambda first, count: images.batch(settings.calibration + first, count, flip=settings.flip),
        settings,
        setting.table,
        setting.cfg,
        recipe.seed,
    )
    for progress in resumed(run, STAGE, tuning, tuning.run()):
        on_progress("fine-tune", tuning.rounds, progress)
    run.rewind(1 + tuning.rounds)  # what a kill left between this line and the model
    run.log({"stage": "pruned", "images": images.count, "images_skipped": len(images.broken)})
    save_pruned(tuning.pruned, recipe.model, run.pruned)
    return Pruned(setting, with_adapter(setting, tuning.pruned, str(out)))


def kept_of(out: Path) -> Path:
    """The file of a run that says which heads and units stay, once that is known."""
    return out / "kept.json"


def read_kept(file: Path) -> Kept:
    """What stays, as `file` says. Raises RunError where it is damaged."""
    try:
        return [([*map(int, heads)], [*map(int, units)]) for heads, units in json.loads(file.read_bytes())]
    except (ValueError, TypeError) as error:
        raise RunError(f"{file} cannot be read ({error}); delete it to start over") from error


def whole_process(setting: Setting) -> Process:
    """How the model's training noised images, at every one of its timesteps."""
    config: dict[str, Any] = setting.model.scheduler_config
    return at(config, np.arange(int(config.get("num_train_timesteps", 1000)), dtype=np.float64))


def find_kept(
    setting: Setting,
    images: ImageStream,
    process: Process,
    recipe: PruneRecipe,
    run: RunDir,
    on_taylor: Callable[[int, int, float], None],
) -> Kept:
    """What stays, by Taylor importance on the first images of the run; how many steps it took is logged."""
    settings, adapter = recipe.prune, setting.adapter
    ratios = ratios_of(adapter, settings)
    read = partial(images.batch, flip=False)
    x0, told = in_parts(read, 0, settings.calibration, settings.micro_batch)
    streams = range(STREAMS - settings.calibration, STREAMS)
    noise = torch.from_numpy(gaussian(recipe.seed, streams, tuple(x0.shape[1:]))).to(x0.device)
    rng = np.random.default_rng(recipe.seed)
    condition = adapter.image_condition(told, np.zeros(len(x0), np.bool_), rng)
    steps: list[float] = []

    def on_step(step: int, loss: float) -> None:
        steps.append(loss)
        on_taylor(step, len(process.alpha), loss)

    found = importance(
        adapter, process, x0, condition, noise, settings.threshold, on_step, micro_batch=settings.micro_batch
    )
    kept = most_important(found, ratios, settings.multiple)
    run.log({"stage": "taylor", "steps": len(steps), "highest_loss": max(steps), "ratios": ratios} | widths_of(kept))
    return kept


def ratios_of(adapter: Adapter, settings: PruneSettings) -> tuple[float, float]:
    """The shares of heads and of units to take out."""
    if settings.ratio is not None:
        return settings.ratio, settings.ratio
    return ratios_for(adapter, settings.target_speedup or 1.0, settings.multiple)


def widths_of(kept: Kept) -> dict[str, list[int]]:
    """How many heads and units of each block stay."""
    return {"heads": [len(heads) for heads, _ in kept], "units": [len(units) for _, units in kept]}


def figures_of(original: Adapter, pruned: Adapter) -> dict[str, float]:
    """MACs of a call and parameters, before and after."""
    before, after = original.graph, pruned.graph
    return {
        "mac_ratio": before.call_macs / after.call_macs,
        "call_macs": after.call_macs,
        "params": after.total_params,
        "params_before": before.total_params,
    }
