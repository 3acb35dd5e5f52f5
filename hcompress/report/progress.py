"""Training as a person watches it: a rich progress line on a terminal, plain lines in a log. Always on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hcompress.caching.problem import Method
from hcompress.caching.problem import Progress as Round
from hcompress.setting import Setting

PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class _Display:
    """Bars on a terminal; elsewhere a line now and then."""

    def __init__(self, *, speaks: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not speaks)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.printed = 0.0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def line(self, text: str, *, finished: bool) -> None:
        """Print what the bar would show, where there is none: the last such line, and one every PLAIN_SECONDS."""
        if not self.console.is_terminal and (finished or time.monotonic() - self.printed > PLAIN_SECONDS):
            self.printed = time.monotonic()
            self.console.print(text, highlight=False, soft_wrap=True)


class TrainingDisplay(_Display):
    """Shows each round's loss, CUR, beta and time left; keeps the last figures. `unit` is what a round is called."""

    def __init__(self, unit: str, *, speaks: bool = True) -> None:
        super().__init__(speaks=speaks)
        self.unit, self.rounds = unit, 0
        self.task = self.bar.add_task("training", total=None, figures="", visible=False)
        self.last: Round | None = None
        self.score_db: float | None = None

    def start(self, setting: Setting, method: Method) -> None:
        """Called once the model is open; `method.done` rounds came from a checkpoint."""
        graph, calls = setting.adapter.graph, setting.table.num_calls
        self.rounds = method.rounds
        going = f", resuming after {method.done} {self.unit}" if method.done else f", {self.rounds} {self.unit}"
        self.notice(f"{setting.model.name}: {len(graph)} branches x {calls} calls" + (going if self.rounds else ""))
        self.bar.update(self.task, completed=method.done, total=self.rounds, visible=bool(self.rounds))

    def notice(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def show(self, progress: Round) -> None:
        """One more round is done."""
        self.last = progress
        self.score_db = progress.score_db if progress.score_db is not None else self.score_db
        figures = _router_figures(progress) + _score(self.score_db)
        of = max(progress.round, self.rounds)  # steering goes on until it meets its goal
        self.bar.update(self.task, completed=progress.round, total=of, figures=figures)
        self.line(f"{progress.round}/{of}  {figures}", finished=progress.round >= self.rounds)


class StagesDisplay(_Display):
    """Several stages, one after the other, each with its own line: loss, what else it has to say, and time left."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: dict[str, TaskID] = {}
        self.score_db: dict[str, float | None] = {}

    def count(self, stage: str, total: int, done: int, figures: str) -> None:
        """`done` of `total` steps of a stage, which goes on beyond that where it is steered to a goal."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(stage, total=total, figures="")
        self.bar.update(self.tasks[stage], completed=done, total=max(done, total), figures=figures)

    def show(self, stage: str, trajectories: int, progress: Any) -> None:
        """One more trajectory of `stage` is done: figures of a router's training or of a distillation."""
        score = progress.score_db if progress.score_db is not None else self.score_db.get(stage)
        self.score_db[stage] = score
        figures = _router_figures(progress) if isinstance(progress, Round) else f"loss {progress.loss:.2e}"
        figures += _score(score)
        self.count(stage, trajectories, progress.round, figures)
        of = max(progress.round, trajectories)
        self.line(f"{stage} {progress.round}/{of}  {figures}", finished=progress.round >= trajectories)


def _router_figures(progress: Round) -> str:
    return (
        f"loss {progress.loss:.2e}  CUR {100 * progress.hard_cur:.1f} % (soft {100 * progress.expected_cur:.1f})  "
        f"beta {progress.beta:.1e}  undecided {100 * progress.unpolarised:.0f} %"
    )


def _score(score_db: float | None) -> str:
    return "" if score_db is None else f"  {score_db:.1f} dB"
