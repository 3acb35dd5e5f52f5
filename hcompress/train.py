"""From a recipe to a run folder with a schedule in it: training that can be killed, resumed and watched.

A checkpoint is written after every trajectory (it is a few kilobytes), so at most one trajectory is done twice. Under
`accelerate launch` each process walks its own noises; gradients and lambdas are averaged, rank 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from hcompress.caching.harmonica import OneProcess, Progress, Ranks, Training
from hcompress.checkpoint import read_checkpoint, write_checkpoint
from hcompress.recipe import Recipe
from hcompress.rundir import RunDir, open_run
from hcompress.schedule import Schedule
from hcompress.setting import Setting, setting_of


@dataclass(frozen=True)
class Launched:
    """Ranks of a run started by `accelerate launch`."""

    rank: int
    world: int

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all processes."""
        from accelerate.utils import reduce

        return reduce(tensor, "mean")

    def leave(self) -> None:
        """Wait for the others and end the group; a process that just exits may abort those still talking to it."""
        from accelerate import PartialState

        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()


def launched_ranks() -> Ranks:
    """This process among those of `accelerate launch`, or the only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return Launched(state.process_index, state.num_processes)


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    on_start: Callable[[Setting, int], None] = lambda setting, done: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Schedule:
    """Train until the recipe's last trajectory and leave `out`/schedule.safetensors.

    on_start gets the opened setting and the trajectories already done, on_progress each trajectory's figures.
    Raises RunError where `out` cannot be used or its checkpoint cannot be read.
    """
    ranks = launched_ranks()
    writes = ranks.rank == 0
    run = open_run(out, recipe, resume=resume) if writes else RunDir(out)
    setting = setting_of(recipe, device=device)
    training = Training(setting.adapter, setting.table, recipe.cfg, recipe.caching, recipe.seed, ranks)
    if resume and run.checkpoint.exists():
        training.router.restore(read_checkpoint(run.checkpoint))
        if writes:
            run.rewind(training.router.trajectory)
    on_start(setting, training.router.trajectory)
    for progress in training.run():
        if writes:
            run.log(asdict(progress))
            write_checkpoint(run.checkpoint, training.router.state())
        on_progress(progress)
    schedule = _schedule(recipe, setting, training)
    if writes:
        schedule.save(run.schedule)
    if isinstance(ranks, Launched):
        ranks.leave()
    return schedule


def _schedule(recipe: Recipe, setting: Setting, training: Training) -> Schedule:
    """The hard schedule that the router has learned, with its history."""
    settings = recipe.caching
    compute = training.router.hard(settings.threshold)
    graph = setting.adapter.graph
    history = {
        **settings.model_dump(exclude_none=True),
        "name": settings.method,
        "final_beta": training.router.beta,
        "seed": recipe.seed,
        "mac_ratio": graph.mac_ratio(compute),
    }
    return Schedule(compute, graph.names, setting.identity, history, training.router.logits())
