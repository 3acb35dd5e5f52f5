"""The table of a comparison as JSON and Markdown: mean and spread over seeds of every row that is finished."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hcompress.comparison import (
    FEWER_STEPS,
    UNCACHED,
    Cell,
    Comparison,
    LeftOut,
    group_name,
    missed,
    read_row,
    row_file,
)
from hcompress.recipe import Recipe
from hcompress.report.measured import UNRECORDED, described, listed, recorded
from hcompress_runtime.files import write_atomically

FLOOR = "_floor"  # ends the name of what real data scores by a metric
REAL = "real, same number"
NEAR = 0.03  # of its budget: fewer steps whose share of steps saved comes no nearer are not ranked
SHORT = 1.0  # seconds that are no training cost
JUDGED = "FID, sFID, KID, precision and recall compare with"
BY_CLIP = "CLIP is 100 times the cosine of picture and prompt, at least 0, by"
SPREAD = "sample standard deviation (n - 1)"  # what stands behind ±


@dataclass(frozen=True)
class Column:
    """How a figure is written. better: which way, where one is; kind: what it says something about."""

    title: str
    digits: int
    better: Literal["higher", "lower"] | None = None
    kind: Literal["quality", "cost"] = "quality"
    scale: float = 1.0

    @property
    def head(self) -> str:
        """The title, with an arrow the better way."""
        return self.title + {"higher": " ↑", "lower": " ↓", None: ""}[self.better]


COLUMNS = {
    "cur": Column("CUR (%)", 1, None, "cost", 100),
    "mac_ratio": Column("MACs /", 2, "higher", "cost"),
    "latency_ms": Column("latency (ms)", 1, "lower", "cost"),
    "speedup": Column("speed-up", 2, "higher", "cost"),
    "megabytes": Column("size (MB)", 1, "lower", "cost"),
    "psnr_db": Column("PSNR (dB)", 2, "higher"),
    "ssim": Column("SSIM", 3, "higher"),
    "relative_l2": Column("rel. L2", 3, "lower"),
    "inception_score": Column("IS", 2, "higher"),  # these seven: the published networks, and the published names
    "fid": Column("FID", 2, "lower"),
    "sfid": Column("sFID", 2, "lower"),
    "kid": Column("KID × 1000", 2, "lower"),
    "inception_precision": Column("Prec.", 2, "higher", scale=100),
    "inception_recall": Column("Recall", 2, "higher", scale=100),
    "clip_score": Column("CLIP", 2, "higher"),
    "fd64": Column("FD-64", 3, "lower"),  # and these: networks of ours, comparable with nothing else
    "accuracy": Column("accuracy", 3, "higher"),
    "precision": Column("precision", 3, "higher"),
    "recall": Column("recall", 3, "higher"),
    "class_score": Column("class score", 2, "higher"),
    "emoji_clip": Column("emoji-CLIP", 2, "higher"),
    "retrieval": Column("retrieval", 3, "higher"),
    "fd_efflite0": Column("FD-EffLite0", 3, "lower"),
    "kid_efflite0": Column("KID-EffLite0 × 1000", 2, "lower"),
}
UNSHOWN = {"macs"}  # said by mac_ratio
TRAINING = {
    "images": Column("images", 0, None, "cost"),
    "updates": Column("updates", 0, None, "cost"),
    "seconds": Column("minutes", 1, "lower", "cost", 1 / 60),
    "update_ms": Column("ms / update", 1, "lower", "cost"),
    "peak_memory_bytes": Column("peak memory (MB)", 0, "lower", "cost", 1e-6),
}


def summarise(comparison: Comparison, cells: Sequence[Cell], left_out: Iterable[LeftOut], out: Path) -> dict[str, Any]:
    """The whole report as one JSON object; figures are {"mean", "std", "seeds"}, see `spread`.

    {"title", "samples", "runner", "seeds", "finished", "cells", "measured": see hcompress.report.measured, "groups":
    [{"name", "methods", "rows": [{"name", "point", "budget", "missed": see hcompress.comparison, "seeds",
    "reused_nothing": of the seeds those whose schedule is uncached, "folders", "figures", "training", "references" of
    FID and its kin, "clips" of CLIP scores, "notes": what to know about its figures}], "left_out": [{"name", "point",
    "seeds", "reason"}]}]}
    """
    groups: dict[str, dict[str, Any]] = {}

    def group_of(name: str) -> dict[str, Any]:
        return groups.setdefault(name, {"name": name, "methods": [], "rows": [], "left_out": []})

    finished = [(cell, row) for cell in cells if (row := read_row(row_file(out, cell, comparison)))]
    rows: dict[tuple[str, str, str], list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, row in finished:
        rows.setdefault(cell.row, []).append((cell, row))
    for cell in sorted(cells, key=lambda cell: cell.name == FEWER_STEPS):
        group = group_of(group_name(cell.group))
        group["methods"] += [cell.name] * (cell.name not in group["methods"])
    for (where, name, point), found in rows.items():
        if kept := [(cell, row) for cell, row in found if "figures" in row]:
            figures = spread([row["figures"] for _, row in kept])
            cached = [(cell.seed, row["figures"]["cur"]) for cell, row in kept if isinstance(cell.recipe, Recipe)]
            group_of(where)["rows"].append(
                {
                    "name": name,
                    "point": point,
                    "budget": kept[0][0].budget,
                    "missed": missed(kept[0][0].recipe, figures["cur"]["mean"], figures["mac_ratio"]["mean"]),
                    "seeds": [cell.seed for cell, _ in kept],
                    "reused_nothing": [seed for seed, cur in cached if cur == 0],
                    "folders": [str(cell.folder) for cell, _ in kept],
                    "figures": figures,
                    "training": spread([_with_update_ms(row["training"]) for _, row in kept]),
                    "references": [*dict.fromkeys(_reference(row) for _, row in kept if "fid" in row["figures"])],
                    "clips": [*dict.fromkeys(row["clip"] for _, row in kept if "clip_score" in row["figures"])],
                    "notes": [*dict.fromkeys(note for _, row in kept for note in row.get("notes", []))],
                }
            )
        reasons: dict[str, list[int]] = {}
        for cell, row in found:
            if reason := row.get("impossible"):
                reasons.setdefault(reason, []).append(cell.seed)
        for reason, seeds in reasons.items():
            group_of(where)["left_out"].append({"name": name, "point": point, "seeds": seeds, "reason": reason})
    for one in left_out:
        group_of(group_name(one.group))["left_out"].append(
            {"name": one.name, "point": one.point, "seeds": comparison.seeds, "reason": one.reason}
        )
    for group in groups.values():
        group["rows"].sort(key=_table_order)
    every = [one for found in rows.values() for one in found]
    return {
        "title": comparison.title,
        "samples": comparison.samples,
        "runner": comparison.runner,
        "seeds": comparison.seeds,
        "finished": len(finished),
        "cells": len(cells),
        "measured": recorded((_name(cell, len(groups) > 1), row) for cell, row in every if "figures" in row),
        "groups": list(groups.values()),
    }


def write_report(
    comparison: Comparison, cells: Sequence[Cell], left_out: Iterable[LeftOut], out: Path
) -> dict[str, Any]:
    """Write OUT/compare.{json,md,html} from the rows that are finished, and return what the first holds."""
    from hcompress.report.comparison_page import write_comparison_page

    report = summarise(comparison, cells, left_out, out)
    write_atomically(out / "compare.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(out / "compare.md", markdown(report).encode())
    write_comparison_page(report, out, out / "compare.html")
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report."""
    parts = [f"# {report['title']}", provenance(report)]
    for group in report["groups"]:
        parts.append(f"## {group['name']}")
        if group["rows"]:
            parts += [_markdown_table(quality_table(group)), meaning(report, group), *note_lines(group)]
        if len(cost := training_table(group)) > 1:
            parts += ["Training, a seed:", _markdown_table(cost)]
        parts += left_out_lines(report, group)
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(report: Mapping[str, Any]) -> str:
    """Where the figures come from."""
    seeds, found = report["seeds"], report["measured"]
    over = f"mean ± {SPREAD} over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    missing = report["cells"] - report["finished"]
    measured = (
        f"; measured {described(found, 'date')} on {described(found, 'machine')}, by {report['runner']}, with "
        f"{described(found, 'software')}"
    )
    return f"{report['samples']} samples a row and seed, {over}{measured if found['date'] else ''}." + (
        f" **{missing} of {report['cells']} cells are not finished.**" if missing else ""
    )


def meaning(report: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """What the columns of a table are."""
    present = columns_of(group)
    latents = "relative_l2" in present and "psnr_db" not in present
    said = "Relative L2 compares" if latents else "PSNR, SSIM and relative L2 compare"
    said += " with the uncached sample from the same noise"
    said += "; latents without a VAE have no PSNR and no SSIM. " if latents else ". "
    said += (
        f"CUR is the share of branch evaluations that are reused; latency is of "
        f"{described(report['measured'], 'timing')}; speed-up is over the uncached model, timed in turns."
    )
    if floors_of(group):
        said += (
            " The distribution metrics use small networks of our own and are not FID, IS or CLIP; what real images "
            "score at the same number of samples is the floor."
        )
    return said


def note_lines(group: Mapping[str, Any]) -> list[str]:
    """What the rows say of their figures: reference, CLIP, and what too few samples do; of which, where not of all."""
    found: dict[str, list[str]] = {}
    for row in group["rows"]:
        judges = [*(f"{JUDGED} {one}" for one in row["references"]), *(f"{BY_CLIP} {one}" for one in row["clips"])]
        for line in (*judges, *row["notes"]):
            found.setdefault(line, []).append(f"{row['name']} {row['point']}".strip())
    return [
        f"{line}{'' if len(names) == len(group['rows']) else f' ({listed(names)})'}." for line, names in found.items()
    ]


def left_out_lines(report: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    """A sentence on each row that could not be, wholly or with some of the seeds, and why."""
    lines = []
    for one in group["left_out"]:
        what = " at ".join(filter(None, (one["name"], one["point"])))
        some = f" with seed {', '.join(map(str, one['seeds']))}" if one["seeds"] != report["seeds"] else ""
        lines.append(f"{what}{some} is left out: {one['reason']}.")
    return lines


def columns_of(group: Mapping[str, Any]) -> dict[str, Column]:
    """The columns that some row of a group has a figure for, cost first: a page is not as wide as all metrics."""
    present = dict.fromkeys(key for row in group["rows"] for key in row["figures"])
    known = {key: column for key, column in COLUMNS.items() if key in present}
    return known | {
        key: Column(key, 3) for key in present if key not in COLUMNS and not key.endswith(FLOOR) and key not in UNSHOWN
    }


def quality_table(group: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows as text; the last row is what real data scores, where a metric says so."""
    columns = columns_of(group)
    table = [["method", "budget", *(column.head for column in columns.values())]]
    for row in group["rows"]:
        table.append([row["name"], point_of(row), *(written(row["figures"].get(key), columns[key]) for key in columns)])
    if floors := floors_of(group):
        table.append([REAL, "", *(written(floors.get(key), columns[key]) for key in columns)])
    return table


def training_table(group: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows as text of what was trained or calibrated."""
    table = [["method", "budget", *(column.title for column in TRAINING.values())]]
    for row in trained_rows(group):
        cells = [written(row["training"].get(key), column) for key, column in TRAINING.items()]
        table.append([row["name"], point_of(row), *cells])
    return table


def point_of(row: Mapping[str, Any]) -> str:
    """At which budget a row is; by how much it missed that."""
    said: str = row["missed"] or row["point"]
    return said


def trained_rows(group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that took time to make."""
    return [row for row in group["rows"] if row["training"].get("seconds", {}).get("mean", 0) >= SHORT]


def floors_of(group: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What real data scores, by metric."""
    figures = {key: value for row in reversed(group["rows"]) for key, value in row["figures"].items()}
    return {key.removesuffix(FLOOR): value for key, value in figures.items() if key.endswith(FLOOR)}


def written(figure: Mapping[str, float] | None, column: Column) -> str:
    """A mean with its spread, where there is one."""
    if figure is None:
        return ""
    mean, std = (f"{column.scale * figure[key]:.{column.digits}f}" for key in ("mean", "std"))
    return mean if figure["seeds"] == 1 or float(std) == 0 else f"{mean} ± {std}"


def best_rows(group: Mapping[str, Any], key: str) -> set[int]:
    """Numbers of the rows whose mean is the best of their budget as it is written, among several that kept to it.

    Rows that share it are the best together, unless all do.
    """
    column = columns_of(group)[key]
    budgets: dict[float, list[int]] = {}
    for index, row in enumerate(group["rows"]):
        if row["budget"] is None or row["missed"] or key not in row["figures"]:
            continue
        saved = 1 - 1 / row["figures"]["mac_ratio"]["mean"]
        if row["name"] != FEWER_STEPS or abs(saved - row["budget"]) <= NEAR:
            budgets.setdefault(row["budget"], []).append(index)
    sign, best = -1 if column.better == "lower" else 1, set()
    for indices in budgets.values():
        means = {index: group["rows"][index]["figures"][key]["mean"] for index in indices}
        shown = {index: sign * round(column.scale * mean, column.digits) for index, mean in means.items()}
        if len({*shown.values()}) > 1:
            best |= {index for index, mean in shown.items() if mean == max(shown.values())}
    return best


def _name(cell: Cell, several: bool) -> str:
    """What a sentence calls a cell, of one among `several` groups."""
    name = " ".join(filter(None, (cell.name, cell.point, f"seed {cell.seed}")))
    return f"{cell.row[0]}: {name}" if several else name


def _reference(row: Mapping[str, Any]) -> str:
    """What the pictures of a finished row were judged by."""
    return row.get("reference", UNRECORDED) + (f", cut to {row['size']} pixels" if row.get("size") else "")


def _table_order(row: Mapping[str, Any]) -> tuple[int, bool, float, bool]:
    """Uncached, with the steps asked for, fewer, as budgets pay for last in each; then what has no budget.

    Otherwise as it was asked for.
    """
    budget, fewer = row["budget"], row["name"] == FEWER_STEPS
    first = 0 if row["name"] == UNCACHED else 1 if fewer and budget is None else 2
    return first, budget is None, budget or 0.0, fewer


def spread(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (n - 1; 0 of one) of each figure over the n seeds that have it."""
    keys = dict.fromkeys(key for one in found for key in one)
    values = {key: [one[key] for one in found if key in one] for key in keys}
    return {
        key: {
            "mean": statistics.fmean(each),
            "std": statistics.stdev(each) if len(each) > 1 else 0.0,
            "seeds": len(each),
        }
        for key, each in values.items()
    }


def _with_update_ms(training: Mapping[str, float]) -> dict[str, float]:
    found = dict(training)
    if found.get("updates"):
        found["update_ms"] = 1e3 * (found["seconds"] - found.get("fitting_seconds", 0)) / found["updates"]
    return found


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
