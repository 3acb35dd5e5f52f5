"""Training as a person watches it: a rich progress line on a terminal, plain lines in a log. Always on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hcompress.caching.harmonica import Progress as Trajectory
from hcompress.setting import Setting

PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class TrainingDisplay:
    """Shows each trajectory's loss, CUR, beta and time left; keeps the last figures."""

    def __init__(self, trajectories: int, *, speaks: bool = True) -> None:
        self.trajectories = trajectories
        self.console = Console(stderr=True, quiet=not speaks)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=trajectories, figures="")
        self.last: Trajectory | None = None
        self.score_db: float | None = None
        self.printed = 0.0

    def __enter__(self) -> TrainingDisplay:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def start(self, setting: Setting, done: int) -> None:
        """Called once the model is open; `done` trajectories came from a checkpoint."""
        graph, calls = setting.adapter.graph, setting.table.num_calls
        self.console.print(
            f"{setting.model.name}: {len(graph)} branches x {calls} calls, "
            + (f"resuming after {done} trajectories" if done else f"{self.trajectories} trajectories"),
            highlight=False,
        )
        self.bar.update(self.task, completed=done)

    def show(self, progress: Trajectory) -> None:
        """One more trajectory is done."""
        self.last = progress
        self.score_db = progress.score_db if progress.score_db is not None else self.score_db
        figures = _router_figures(progress) + _score(self.score_db)
        self.bar.update(self.task, completed=progress.trajectory, figures=figures)
        finished = progress.trajectory == self.trajectories
        if not self.console.is_terminal and (finished or time.monotonic() - self.printed > PLAIN_SECONDS):
            self.printed = time.monotonic()
            self.console.print(f"{progress.trajectory}/{self.trajectories}  {figures}", highlight=False, soft_wrap=True)


class StagesDisplay:
    """Several stages, one after the other, each with its own line: loss, what else it has to say, and time left."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.score_db: dict[str, float | None] = {}
        self.printed = 0.0

    def __enter__(self) -> StagesDisplay:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, stage: str, trajectories: int, progress: Any) -> None:
        """One more trajectory of `stage` is done: figures of a router's training or of a distillation."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=trajectories, figures="")
        score = progress.score_db if progress.score_db is not None else self.score_db.get(stage)
        self.score_db[stage] = score
        figures = _router_figures(progress) if isinstance(progress, Trajectory) else f"loss {progress.loss:.2e}"
        figures += _score(score)
        self.bar.update(self.tasks[stage], completed=progress.trajectory, figures=figures)
        ended = progress.trajectory >= trajectories
        if not self.console.is_terminal and (ended or time.monotonic() - self.printed > PLAIN_SECONDS):
            self.printed = time.monotonic()
            line = f"{stage} {progress.trajectory}/{trajectories}  {figures}"
            self.console.print(line, highlight=False, soft_wrap=True)


def _router_figures(progress: Trajectory) -> str:
    return (
        f"loss {progress.loss:.2e}  CUR {100 * progress.hard_cur:.1f} % (soft {100 * progress.expected_cur:.1f})  "
        f"beta {progress.beta:.1e}  undecided {100 * progress.unpolarised:.0f} %"
    )


def _score(score_db: float | None) -> str:
    return "" if score_db is None else f"  {score_db:.1f} dB"
