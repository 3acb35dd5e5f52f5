"""A comparison as a person watches it: a table that fills, and what the present cell does. Always on stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hcompress.comparison import Cell, group_name, missed

PLAIN_SECONDS = 30.0  # between lines where there is no terminal
FIGURES = {
    "cur": "CUR (%)",
    "mac_ratio": "MACs /",
    "psnr_db": "PSNR (dB)",
    "relative_l2": "relative L2",  # of latents that nothing decodes, which have no PSNR
    "speedup": "speed-up",
}


@final
class ComparisonDisplay:
    """Rows with the seeds that are finished and their mean figures. `speaks`: of several processes one."""

    def __init__(self, *, speaks: bool = True) -> None:
        self.console = Console(stderr=True, quiet=not speaks)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console)
        self.all, self.one = self.bar.add_task("cells", total=None), self.bar.add_task("", total=None)
        self.cells: Sequence[Cell] = ()
        self.rows: dict[Path, dict[str, Any]] = {}  # by the folder of a cell
        self.live = Live(self.bar, console=self.console, refresh_per_second=4)
        self.printed = time.monotonic()

    def __enter__(self) -> ComparisonDisplay:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def start(self, cells: Sequence[Cell]) -> None:
        """These are to be finished."""
        self.cells = cells
        self.bar.update(self.all, total=len(cells))
        self._show()

    def doing(self, cell: Cell, what: str, done: int, total: int) -> None:
        """How far `cell` is with `what`."""
        described, total = f"{_said(cell)}: {what}", total and max(done, total)
        self.bar.update(self.one, description=described, completed=done, total=total or None)
        if not self.console.is_terminal and time.monotonic() - self.printed > PLAIN_SECONDS:
            self._print(f"{described} {done}/{total}")

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        """Show its figures, or why there are none."""
        self.rows[cell.folder] = row.get("figures", {})
        self.bar.update(self.all, completed=len(self.rows))
        self._show()
        if not self.console.is_terminal:
            shown = self._figures().items()
            figures = "  ".join(f"{title} {_of([self.rows[cell.folder]], key)}" for key, title in shown)
            said = row.get("impossible") or "  ".join(filter(None, (figures, _missed(cell, [self.rows[cell.folder]]))))
            self._print(f"{len(self.rows)}/{len(self.cells)}  {_said(cell)}  {said}")

    def notice(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def _figures(self) -> dict[str, str]:
        """Those of FIGURES that are shown."""
        decoded = any("psnr_db" in figures for figures in self.rows.values())
        compared = any("relative_l2" in figures for figures in self.rows.values())
        left_out = "psnr_db" if compared and not decoded else "relative_l2"
        return {key: title for key, title in FIGURES.items() if key != left_out}

    def _print(self, line: str) -> None:
        self.printed = time.monotonic()
        self.notice(line)

    def _show(self) -> None:
        """The last rows that fit on the screen, and the bars."""
        rows: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.cells:
            rows.setdefault(cell.row, []).append(cell)
        groups = {group_name(cell.group) for cell in self.cells}
        shown = self._figures()
        table = Table("", "budget", "seeds", *shown.values(), box=None, header_style="dim")
        begun = {row: cells for row, cells in rows.items() if any(cell.folder in self.rows for cell in cells)}
        for (group, name, point), cells in [*begun.items()][-max(4, self.console.height - 6) :]:
            found = [self.rows[cell.folder] for cell in cells if cell.folder in self.rows]
            figures = (_of(found, key) for key in shown)
            where = f"{name}, {group}" if len(groups) > 1 else name
            table.add_row(where, _missed(cells[0], found) or point, f"{len(found)}/{len(cells)}", *figures)
        self.live.update(Group(table, self.bar))


def _said(cell: Cell) -> str:
    return " ".join(filter(None, (cell.name, cell.point, f"seed {cell.seed}")))


def _missed(cell: Cell, found: Sequence[dict[str, float]]) -> str | None:
    cur, mac_ratio = (_mean(found, key) for key in ("cur", "mac_ratio"))
    return None if cur is None or mac_ratio is None else missed(cell.recipe, cur, mac_ratio)


def _mean(found: Sequence[dict[str, float]], key: str) -> float | None:
    values = [figures[key] for figures in found if key in figures]
    return sum(values) / len(values) if values else None


def _of(found: Sequence[dict[str, float]], key: str) -> str:
    mean = _mean(found, key)
    return "-" if mean is None else f"{(100 if key == 'cur' else 1) * mean:.2f}"
