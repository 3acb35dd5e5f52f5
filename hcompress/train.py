"""From a recipe to a run folder with a schedule in it, by any caching method: killed, resumed and watched if it trains.

A checkpoint is written after every round (it is a few kilobytes), so at most one round is done twice. Under
`accelerate launch` each process walks its own noises or images; gradients and lambdas are averaged, rank 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hcompress import process
from hcompress.caching import CACHING
from hcompress.caching.correct import Corrected, correct
from hcompress.caching.problem import Found, Method, OneProcess, Problem, Progress, Ranks, check_first_call
from hcompress.checkpoint import read_checkpoint, write_checkpoint
from hcompress.images import open_images
from hcompress.lowbit.artefact import FILE, read_origin
from hcompress.meter import Meter
from hcompress.recipe import Recipe
from hcompress.report.heatmap import save_heatmap
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
        from accelerate import PartialState
        from accelerate.utils import reduce

        meeting_place = PartialState().device  # where GPUs talk to each other, nothing on a CPU is sent
        mean: Tensor = reduce(tensor.to(meeting_place), "mean")
        return mean.to(tensor.device)

    def leave(self) -> None:
        """Wait for the others and end the group; a process that just exits may abort those still talking to it."""
        from accelerate import PartialState

        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()


def launched_ranks(patience: timedelta = timedelta(minutes=30)) -> Ranks:
    """This process among those of `accelerate launch`, or the only one. `patience`: how long one waits for another."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return OneProcess()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
    return Launched(state.process_index, state.num_processes)


def train(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    ranks: Ranks | None = None,
    on_start: Callable[[Setting, Method], None] = lambda setting, method: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_notice: Callable[[str], None] = lambda line: None,
) -> Schedule:
    """Run the recipe's method to its end and leave `out`/schedule.safetensors.

    ranks: who trains it together; None: all processes of `accelerate launch`

    on_start gets the opened setting and the method as it starts or goes on, on_progress each round's figures, on_notice
    a line on what was left out, such as an image that cannot be read, and on what takes its time.
    Raises RunError where `out` cannot be used or its checkpoint cannot be read, DataError for images, ModelError
    where the model's output is not finite.
    """
    ranks = ranks or launched_ranks()
    writes = ranks.rank == 0
    run = open_run(out, recipe, resume=resume) if writes else RunDir(out)
    setting = setting_of(recipe, device=device)
    problem = problem_of(setting, recipe.seed, ranks, on_notice)
    check_first_call(problem)
    method = CACHING[recipe.caching.method](problem, recipe.caching)
    meter = Meter(setting.adapter.device)  # not before: the images that a method opens are no memory of its training
    if resume and run.checkpoint.exists():
        method.restore(read_checkpoint(run.checkpoint))
    if writes:
        run.rewind(method.done)
    on_start(setting, method)
    file = Path(recipe.model) / FILE
    if recipe.caching.method != "given" and file.is_file() and read_origin(file).schedule:
        on_notice(
            f"step sizes of {recipe.model} were learned under its own schedule: another can be evaluated on it, not "
            "exported; for that, train on the float model and quantize --with-cache"
        )
    for progress in method.run():
        if writes:
            run.log(asdict(progress) | meter.lap())
            write_checkpoint(run.checkpoint, method.state())
        on_progress(progress)
    found, finding = method.found(), meter.lap()
    if recipe.caching.reuse == "corrected":
        on_notice(
            f"fitting corrections on {recipe.caching.fit_samples} samples, {recipe.caching.fit_steps} steps of tuning"
        )
    schedule = _schedule(recipe, setting, found, correct(problem, found.compute, recipe.caching))
    fitting = [{"stage": "corrections"} | meter.lap()] if recipe.caching.reuse == "corrected" else []
    if writes:
        figures = {"cur": schedule.cur, "mac_ratio": schedule.method["mac_ratio"]} | finding
        for record in [*([] if method.rounds else [*found.records, figures]), *fitting]:
            run.log(record)
        save_heatmap(schedule, run.heatmap)
        schedule.save(run.schedule)
    if isinstance(ranks, Launched):
        ranks.leave()
    return schedule


def problem_of(
    setting: Setting, seed: int, ranks: Ranks | None = None, on_notice: Callable[[str], None] = lambda line: None
) -> Problem:
    """What a caching method is given in `setting`; images and the forward process are opened where it asks for them."""
    return Problem(
        setting.adapter,
        setting.table,
        setting.cfg,
        seed,
        process=partial(process.at, setting.model.scheduler_config, setting.table.timesteps),
        images=lambda folder: open_images(setting, seed, folder, on_notice),
        ranks=ranks or OneProcess(),
        notice=on_notice,
        identity=setting.identity,
    )


def _schedule(recipe: Recipe, setting: Setting, found: Found, corrected: Corrected) -> Schedule:
    """What was found, with its history."""
    graph, settings = setting.adapter.graph, recipe.caching.model_dump(exclude_none=True, exclude={"order"})
    history = {
        **settings,
        "name": recipe.caching.method,
        **found.history,
        **corrected.history,
        "seed": recipe.seed,
        "mac_ratio": graph.mac_ratio(found.compute),
    }
    return Schedule(found.compute, graph.names, setting.identity, history, found.logits, corrected.corrections)
