"""A run's folder: what was asked, on which machine, what happened, and where the results lie.

RUN/recipe.yaml            the resolved recipe; its presence makes the folder a run
RUN/env.json               versions and hardware at the start
RUN/metrics.jsonl          one JSON object a line, in order
RUN/checkpoint.pt          all that a resumed run needs, replaced atomically; of a stage RUN/STAGE.pt
RUN/schedule.safetensors   the result of training
RUN/heatmap.png            and a picture of it
RUN/quantized.safetensors  the result of quantizing, which makes the folder a MODEL
RUN/kept.json              of pruning, what stays, once that is known
RUN/pruned.safetensors     the result of pruning, which does likewise
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hcompress.claim import Claim, claim
from hcompress.errors import InputError, RunError
from hcompress.recipe import Run, dump, first_difference, resolve_any
from hcompress_runtime.files import write_atomically

PACKAGES = (
    "hcompress",
    "numpy",
    "torch",
    "diffusers",
    "accelerate",
    "transformers",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
)
PARTS = {".env.json.part", ".recipe.yaml.part"}
REMAINS = PARTS | {"env.json"}  # of a start that was killed before recipe.yaml


@dataclass(frozen=True)
class RunDir:
    """The folder of one run, by path; `open_run` makes or reopens it, and holds it for this process."""

    path: Path
    claim: Claim | None = field(default=None, repr=False, compare=False)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """Where training left off."""
        return self.path / "checkpoint.pt"

    @property
    def schedule(self) -> Path:
        """The finished schedule."""
        return self.path / "schedule.safetensors"

    @property
    def quantized(self) -> Path:
        """The finished network in few bits."""
        return self.path / "quantized.safetensors"

    @property
    def pruned(self) -> Path:
        """The finished network with fewer heads and units."""
        return self.path / "pruned.safetensors"

    @property
    def heatmap(self) -> Path:
        """A picture of it."""
        return self.path / "heatmap.png"

    def log(self, record: dict[str, Any]) -> None:
        """Append `record` to the metrics; a kill afterwards does not lose it."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.metrics}: {error.strerror}; pass --resume once it can grow") from error

    def records(self) -> list[dict[str, Any]]:
        """The metrics so far, without a last line that a kill cut short."""
        return [json.loads(line) for line in self._lines()]

    def rewind(self, num_records: int) -> None:
        """Drop the metrics after the first `num_records`: a resumed run writes those again."""
        if self.metrics.exists():
            write_atomically(self.metrics, b"".join(self._lines()[:num_records]))

    def _lines(self) -> list[bytes]:
        lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        return [line for line in lines if line.endswith(b"\n")]


def open_run(path: Path, recipe: Run, *, resume: bool = False) -> RunDir:
    """A new run in `path`, which must be absent or empty, or with `resume` the run that is there.

    A run that did nothing yet counts as empty: its command failed, and the mended one should not meet it. `resume`
    where there is nothing to resume starts the run, so one command serves a job that may be killed at any moment.
    Raises RunError where `path` holds something else, or a run of another recipe, or one that another process is at.
    """
    run = RunDir(Path(path))
    try:
        there = set(os.listdir(run.path)) if run.path.exists() else set()
    except OSError as error:
        raise RunError(f"cannot use {run.path} as a run folder: {error.strerror}") from error
    foreign = sorted(there - REMAINS)
    if {"env.json", "recipe.yaml"} == there - PARTS and not resume:
        foreign = []
    if foreign and not resume:
        raise RunError(f"{run.path} is not empty; pass --resume or another --out")
    if foreign and not run.recipe.exists():
        raise RunError(f"{run.path} holds {foreign[0]} but no recipe.yaml, so it is no run; pass another --out")
    if not foreign:
        write_atomically(run.path / "env.json", json.dumps(environment(), indent=2).encode())
        write_atomically(run.recipe, dump(recipe).encode())
    elif difference := first_difference(resolve_any(run.recipe), recipe):
        raise RunError(f"{run.path} was started with another recipe: {difference}; pass the same or another --out")
    return replace(run, claim=claim(run.path))


def own_flags(model: str) -> dict[str, Any]:
    """Solver, steps and guidance that a quantized or pruned MODEL is for, as flags of a recipe; of others none."""
    run = RunDir(Path(model))
    if not run.recipe.is_file() or not (run.quantized.is_file() or run.pruned.is_file()):
        return {}
    return flags_of(resolve_any(run.recipe))


def own_schedule(model: str) -> Path | None:
    """The schedule that a quantized MODEL's step sizes were made for; None where there is none."""
    run = RunDir(Path(model))
    return run.schedule if own_flags(model) and run.schedule.is_file() else None


def schedule_for(model: str, schedule: Path | None, *, dense: bool, on_notice: Callable[[str], None]) -> Path | None:
    """`schedule`, or unless `dense` MODEL's own, of which `on_notice` is told. Raises InputError for both."""
    if dense and schedule:
        raise InputError("--dense runs without a schedule; leave out --dense or --schedule")
    own = None if dense or schedule else own_schedule(model)
    if own:
        on_notice(f"under {own}, the schedule that its step sizes were made for; --dense leaves it out")
    return schedule or own


def flags_of(recipe: Run) -> dict[str, Any]:
    """Solver, steps and guidance of `recipe`."""
    return {"solver.name": recipe.solver.name, "solver.steps": recipe.solver.steps, "cfg": recipe.cfg}


def environment() -> dict[str, Any]:
    """Versions and hardware, for `env.json`. Imports none of the libraries it names."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "packages": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor's model name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
