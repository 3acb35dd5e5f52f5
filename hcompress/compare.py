"""Run a comparison: each cell of its table is made, sampled from the noise that all share, measured, and kept.

OUT/comparison.yaml            what was asked; its presence makes the folder a comparison
OUT/GROUP/METHOD_POINT_seed-S  the run folder of a cell (hcompress.rundir), where an interrupted cell goes on; in it
    row-N-RUNNER.json          the finished cell: figures of N samples, what its making took, the weights that it is of,
                               and how, when and on what it was measured
    samples.png                its first ten samples, decoded where the model is latent
    samples-N-RUNNER.npy       of an uncached cell: what the others of its group and seed are compared with
OUT/compare.{json,md,html}     the report, of all cells that are finished

Cells are independent but for the uncached ones, so a comparison can be killed, gone on with, extended by seeds, budgets
and recipes, and divided: under `accelerate launch` cell i belongs to process i modulo their number, which trains it
alone, and files are all that they share. Training of seed s uses seed s; all is measured on the noise of 100 + s.
Times are those of this call's settings and machine: a finished cell with others is timed anew, and keeps its samples'
figures. One that was judged by another reference or CLIP is measured anew, and keeps what was made. Cells of other
weights are refused.

Legend: N samples.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from hcompress.comparison import (
    UNCACHED,
    Cell,
    Comparison,
    cells_of,
    fewer_steps,
    group_name,
    in_order,
    read_row,
    row_file,
)
from hcompress.errors import HcompressError, RunError
from hcompress.lowbit.artefact import network_bytes
from hcompress.makers import MAKERS, Impossible, Made, Tell
from hcompress.models.decoder import load_decoder
from hcompress.models.prompts import fingerprint
from hcompress.recipe import Run, first_difference
from hcompress.report.comparison import write_report
from hcompress.report.judges import JUDGED_BY, Judges, judged_so
from hcompress.report.quality import cost, distribution, left_out, paired
from hcompress.rundir import environment
from hcompress.runners import RUNNERS, Draw
from hcompress.schedule import Schedule
from hcompress.setting import Setting, setting_of, under_solver
from hcompress.train import Launched, launched_ranks
from hcompress_runtime.files import write_atomically
from hcompress_runtime.images import COLUMNS, png
from hcompress_runtime.measure import interleaved

NOISE = 100  # seed s is measured on the noise of NOISE + s
SAMPLED = 32  # at once
TIMED = ("batch", "rounds", "device", "device_name", "threads")  # what times depend on
VERSIONS = ("hcompress", "torch")  # that a row records, with that of its runner
PICTURE = "samples.png"  # one row of a grid
PATIENCE = timedelta(days=30)  # with the slowest process
COMPARISON = "comparison.yaml"


class Watch(Protocol):
    """Who is told how a comparison goes."""

    def start(self, cells: Sequence[Cell]) -> None:
        """These are this process's."""

    def doing(self, cell: Cell, what: str, done: int, total: int) -> None:
        """How far `cell` is with `what`."""

    def finished(self, cell: Cell, row: dict[str, Any]) -> None:
        """Now, or by an earlier call."""

    def notice(self, line: str) -> None:
        """Something else that a person should know."""


def compare(comparison: Comparison, out: Path, watch: Watch, *, device: str = "cpu") -> dict[str, Any]:
    """Finish all cells that are not finished, and write and return the report (hcompress.report.comparison).

    A cell that fails leaves the others alone; all that did are named in a RunError at the end, when the report is
    written. So it is after an interruption. Raises RecipeError, ModelError, SolverError, DataError before anything is
    run, and RunError where `out` holds something else or a cell was made by another recipe.
    """
    cells, impossible = cells_of(comparison)
    ranks = launched_ranks(PATIENCE)
    if ranks.rank == 0:
        _open_folder(out, comparison)
    failures: list[str] = []
    with Bench(comparison, out, watch, device) as bench:
        for group in _groups(cells):
            if line := left_out(bench.setting(group), comparison.samples):
                watch.notice(line)
        cells = with_fewer_steps(comparison, cells, bench.setting)
        mine = cells[ranks.rank :: ranks.world]
        kept = [bench.kept(cell) for cell in mine]
        if None in kept:
            bench.open_judges(_groups(mine))
        watch.start(mine)
        try:
            for cell, row in zip(mine, kept, strict=True):
                try:
                    bench.finish(cell, row)
                except HcompressError as error:
                    if cell.name == UNCACHED or isinstance(error, RunError):
                        raise
                    failures.append(f"{' '.join(filter(None, cell.row[1:]))} with seed {cell.seed}: {error}")
                    watch.notice(failures[-1])
            if isinstance(ranks, Launched):
                ranks.leave()
        finally:
            if ranks.rank == 0:
                report = write_report(comparison, cells, impossible, out)
    if failures:
        raise RunError(f"{len(failures)} of {len(mine)} cells failed, and the same command goes on; {failures[0]}")
    return report if ranks.rank == 0 else {}


def with_fewer_steps(comparison: Comparison, cells: list[Cell], setting: Callable[[Run], Setting]) -> list[Cell]:
    """`cells` and, where the comparison asks for them, those of fewer steps; `setting` opens a group's model."""
    if not comparison.fewer_steps:
        return cells
    graphs = {group_name(group): setting(group).adapter.graph for group in _groups(cells)}
    share = {name: float(graph.macs.sum() / graph.call_macs) for name, graph in graphs.items()}
    paid = {cell.folder: cell for cell in fewer_steps(cells, share)}  # in place of those that were asked for
    return in_order([*(cell for cell in cells if cell.folder not in paid), *paid.values()], comparison.seeds)


def _groups(cells: Sequence[Cell]) -> list[Run]:
    return [*{group_name(cell.group): cell.group for cell in cells}.values()]


@final
class Settings:
    """Opens the uncached model of a group; of one model under several solvers there is one copy."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._opened: dict[str, Setting] = {}

    def __call__(self, group: Run) -> Setting:
        """Its setting, the same each time. Raises ModelError, SolverError."""
        name = group_name(group)
        if name not in self._opened:
            same = next((one for one in self._opened.values() if one.model.name == group.model), None)
            if same is None:
                self._opened[name] = setting_of(group, device=self.device)
            else:
                self._opened[name] = under_solver(same.model, group.solver.name, group.solver.steps, group.cfg)
        return self._opened[name]


@final
class Bench:
    """What the cells of a comparison share: opened models and, for timing, their uncached runners."""

    def __init__(self, comparison: Comparison, out: Path, watch: Watch, device: str) -> None:
        self.comparison, self.out, self.watch, self.device = comparison, out, watch, device
        self._settings = Settings(device)
        self._dense: dict[str, Draw] = {}
        self._judges: Judges | None = None
        self._runners = ExitStack()

    def notice(self, line: str) -> None:
        """Something that a person should know."""
        self.watch.notice(line)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runners.close()

    def setting(self, group: Run) -> Setting:
        """The uncached model of `group`."""
        return self._settings(group)

    def open_judges(self, groups: Sequence[Run]) -> None:
        """Read what the pictures of `groups` are judged by, where the comparison asks for that. Raises as Judges."""
        self._judges = Judges(self.comparison, map(self.setting, groups), self.device, self.notice)

    def finish(self, cell: Cell, row: dict[str, Any] | None) -> None:
        """Make, sample and measure `cell`, as far as `row`, what is kept of it, does not hold that."""
        if row is None or self._timed_otherwise(row):
            row = {
                "group": group_name(cell.group),
                "name": cell.name,
                "point": cell.point,
                "seed": cell.seed,
                "budget": cell.budget,
                "recipe": cell.recipe.model_dump(exclude_none=True),
                **{key: getattr(self.comparison, key) if row is None else row.get(key) for key in JUDGED_BY},
                "weights": self.setting(cell.own).identity.weight_hash,
                "prompts": fingerprint(self.setting(cell.group).model.folder),
                **self._outcome(cell, row),
            }
            write_atomically(row_file(self.out, cell, self.comparison), json.dumps(row, indent=1).encode())
        self.watch.finished(cell, row)

    def kept(self, cell: Cell) -> dict[str, Any] | None:
        """The finished row; None where there is none, or none with all that is asked for by now.

        Raises RunError where another recipe, other weights or other prompts made it.
        """
        file = row_file(self.out, cell, self.comparison)
        if not file.exists() or (cell.name == UNCACHED and not self._reference(cell).exists()):
            return None
        if (row := read_row(file)) is None:
            self.notice(f"{file} is cut off or no row; it is measured anew, from what was made")
            return None
        try:
            made_by = type(cell.recipe).model_validate(row.get("recipe"))
        except ValidationError as error:
            raise RunError(f"{file} is of another version of hcompress; delete it to measure anew") from error
        if difference := first_difference(made_by, cell.recipe):
            raise RunError(f"{file.parent} was made by another recipe: {difference}; pass another --out")
        if "weights" not in row:  # as earlier versions left it
            return None
        if (weights := self.setting(cell.own).identity.weight_hash) != row["weights"]:
            raise RunError(
                f"{file.parent} was measured with other weights of {cell.own.model} ({row['weights'][:12]}, now "
                f"{str(weights)[:12]}); pass another --out"
            )
        if row.get("prompts", now := fingerprint(self.setting(cell.group).model.folder)) != now:
            raise RunError(f"{file.parent} is of other prompts than {cell.group.model} has now; pass another --out")
        return row if judged_so(row, self.comparison) else None

    def _timed_otherwise(self, row: Mapping[str, Any]) -> bool:
        """Whether the times of a finished row are of other settings, or of another machine, than those of this call."""
        now = self._conditions()
        return "figures" in row and any(row["measured"][key] != now[key] for key in TIMED)

    def _conditions(self) -> dict[str, Any]:
        """What a row records of how it is measured: TIMED, date and versions. On a GPU CPU threads do not count."""
        on_gpu, installed = torch.device(self.device).type == "cuda", environment()
        versions = (*VERSIONS, *(["onnxruntime"] if self.comparison.runner == "onnxruntime" else []))
        return {
            "date": str(date.today()),
            "batch": self.comparison.batch,
            "rounds": self.comparison.rounds,
            "device": torch.device(self.device).type,
            "device_name": torch.cuda.get_device_name(self.device) if on_gpu else installed["cpu"],
            "threads": None if on_gpu else torch.get_num_threads(),
            "packages": {name: installed["packages"][name] for name in versions},
        }

    def _outcome(self, cell: Cell, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """Its figures and what it took, or why there is no such schedule. `known`: a row that is timed anew."""
        tell = partial(self.watch.doing, cell)
        try:
            made = MAKERS[type(cell.recipe)](self, cell, tell)
        except Impossible as error:
            return {"impossible": str(error)}
        folder = self.out / cell.folder
        folder.mkdir(parents=True, exist_ok=True)
        with RUNNERS[self.comparison.runner](made.setting, made.schedule, folder) as draw:
            figures = known["figures"] if known else self._figures(cell, made, draw, tell)
            times = self._times(cell, draw, tell)
        notes = known.get("notes", []) if known else self._notes(cell)
        return {"figures": figures | times, "notes": notes, "training": made.training, "measured": self._conditions()}

    def _times(self, cell: Cell, draw: Draw, tell: Tell) -> dict[str, float]:
        """latency_ms, and speedup over the uncached model, in turns with it."""
        batch, rounds = self.comparison.batch, self.comparison.rounds
        timed: dict[str, Callable[[], object]] = {"ours": lambda: draw(batch, NOISE, batch, _unseen)}
        if cell.name != UNCACHED:
            timed["dense"] = lambda: self._dense_runner(cell.group)(batch, NOISE, batch, _unseen)
        times = interleaved(timed, rounds, lambda done: tell("timing", done, rounds))
        latency_ms = {name: float(np.median(each)) for name, each in times.items()}
        ours = latency_ms["ours"]
        return {"latency_ms": ours, "speedup": latency_ms.get("dense", ours) / ours}

    def _figures(self, cell: Cell, made: Made, draw: Draw, tell: Tell) -> dict[str, float]:
        """All but times."""
        group, setting, count = self.setting(cell.group), made.setting, self.comparison.samples
        samples = draw(count, NOISE + cell.seed, SAMPLED, lambda done: tell("sampling", done, count))
        tell("measuring", 0, 1)
        figures = cost(setting, _mask(setting, made.schedule))
        figures |= {
            "mac_ratio": cost(group, _mask(group))["macs"] / figures["macs"],
            "megabytes": network_bytes(setting.adapter) / 1e6,
            **distribution(group, samples),
            **(self._judges.of_samples(group, samples, f"{cell.name} {cell.point}".strip()) if self._judges else {}),
        }
        reference = self._reference(cell)
        if cell.name == UNCACHED:
            write_atomically(reference, _npy(samples))
        else:
            while not reference.exists():  # another process is at it
                time.sleep(1)
            figures |= paired(group, samples, torch.from_numpy(np.load(reference)))
        _save_picture(self.out / cell.folder / PICTURE, samples[:COLUMNS], group.model.folder)
        return figures

    def _reference(self, cell: Cell) -> Path:
        """The uncached samples that `cell` is compared with."""
        file = row_file(self.out, replace(cell, name=UNCACHED, point=""), self.comparison)
        return file.with_name(file.name.replace("row", "samples")).with_suffix(".npy")

    def _notes(self, cell: Cell) -> list[str]:
        """What to know about the figures of `cell`, all of them taken."""
        own = left_out(self.setting(cell.group), self.comparison.samples)
        return [*([own] if own else []), *(self._judges.said if self._judges else [])]

    def _dense_runner(self, group: Run) -> Draw:
        name = group_name(group)
        if name not in self._dense:
            runner = RUNNERS[self.comparison.runner](self.setting(group), None, self.out)
            self._dense[name] = self._runners.enter_context(runner)
        return self._dense[name]


def _mask(setting: Setting, schedule: Schedule | None = None) -> NDArray[np.bool_]:
    """bool[T, N], what is computed."""
    everything = np.ones((setting.table.num_calls, len(setting.adapter.graph)), np.bool_)
    return everything if schedule is None else schedule.compute


def _save_picture(path: Path, samples: Tensor, model: Path) -> None:
    """A strip of samples; none of latents that have no decoder."""
    decoder = load_decoder(model)
    with torch.no_grad():
        pixels = samples.float() if decoder is None else decoder(samples.float())
    if pixels.shape[1] in (1, 3):
        write_atomically(path, png(pixels.numpy()))


def _npy(samples: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, samples.numpy())
    return file.getvalue()


def _unseen(done: int) -> None:
    """Progress that nobody watches."""


def _open_folder(out: Path, comparison: Comparison) -> None:
    """Raise RunError where `out` holds something else; what is asked for may change from one call to the next."""
    try:
        found = sorted(name for name in os.listdir(out) if not name.startswith(".")) if out.exists() else []
    except OSError as error:
        raise RunError(f"cannot use {out} for a comparison: {error.strerror}") from error
    if found and COMPARISON not in found:
        raise RunError(f"{out} holds {found[0]} but no {COMPARISON}, so it is no comparison; pass another --out")
    write_atomically(
        out / COMPARISON, yaml.safe_dump(comparison.model_dump(exclude_none=True), sort_keys=False).encode()
    )
