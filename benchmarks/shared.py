"""What the benchmarks of bundles share: times of several in turns, and how results are kept."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hcompress.report.comparison import COLUMNS, written
from hcompress.rundir import environment
from hcompress_runtime import Runtime
from hcompress_runtime.measure import interleaved

PLACES = ("work", "results", "routers")  # settings that are folders of this machine
PLACE_FLAGS = {f"--{place}" for place in PLACES}


def generation_ms(
    runtimes: Mapping[str, Runtime], batch: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, NDArray[Any]]:
    """The milliseconds of each round of `batch` samples, all bundles in turns."""
    labels = [7 * index for index in range(batch)]
    contenders: dict[str, Callable[[], object]] = {
        name: lambda runtime=runtime: runtime.generate(labels, batch=batch)  # type: ignore[misc]
        for name, runtime in runtimes.items()
    }
    return interleaved(contenders, rounds, clock=clock)


def described(args: argparse.Namespace, figures: Mapping[str, Any]) -> dict[str, Any]:
    """`figures` with the date, the machine and what was asked for."""
    settings = {key: value for key, value in vars(args).items() if key not in PLACES}
    command = [
        part for before, part in zip(["", *sys.argv], sys.argv, strict=False) if not {before, part} & PLACE_FLAGS
    ]
    made_on = environment() | {"command": command}
    return {"date": str(date.today()), "environment": made_on, "settings": settings, **figures}


def keep(folder: Path, name: str, result: Mapping[str, Any], markdown: str | None = None) -> None:
    """Write `name`.json and, where there is one, its table beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    if markdown is not None:
        (folder / f"{name}.md").write_text(markdown)


def quality_lines(title: str, rows: Mapping[str, Mapping[str, Any]], unshown: Collection[str] = ()) -> list[str]:
    """Markdown of rows of figures, each a mean and spread; columns are those of every comparison that some row has."""
    present = {key for row in rows.values() for key in row} - {*unshown}
    columns = {key: column for key, column in COLUMNS.items() if key in present}
    lines = [f"| {title} | " + " | ".join(column.head for column in columns.values()) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for name, row in rows.items():
        lines.append(
            f"| {name} | " + " | ".join(written(row.get(key), column) for key, column in columns.items()) + " |"
        )
    return lines
