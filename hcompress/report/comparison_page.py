"""A comparison as one HTML file: plots, tables, schedules and samples. It needs no network, nor its own script."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hcompress.comparison import FEWER_STEPS, POINTS, UNCACHED
from hcompress.report.comparison import (
    REAL,
    SPREAD,
    TRAINING,
    Column,
    best_rows,
    columns_of,
    floors_of,
    left_out_lines,
    meaning,
    note_lines,
    point_of,
    trained_rows,
    training_table,
    written,
)
from hcompress.report.measured import described
from hcompress.report.page import write_page
from hcompress.report.scatter import MARKERS, Level, Point, colour, marker, scatter_svg
from hcompress.schedule import Schedule
from hcompress_runtime.images import COLUMNS, GAP

COSTS = {"mac_ratio": "uncached MACs over MACs", "speedup": "uncached latency over latency"}
COMPUTED = (0x3C, 0x7F, 0xB1)  # of a schedule's picture; what is reused is transparent
RANKED = "The best of each budget is coloured, of the rows that kept to it; at equal cost, see the plots."
THUMBNAIL = 96  # most pixels of a sample's side


@dataclass(frozen=True)
class Html:
    """A part of a page that is written already."""

    text: str

    def html(self) -> str:
        """The text."""
        return self.text


def write_comparison_page(report: Mapping[str, Any], out: Path, path: Path) -> None:
    """Write `path` from a report of hcompress.report.comparison and the run folders in `out`."""
    parts = [Html(_facts(report)), *(Html(_group(group, out, report)) for group in report["groups"])]
    write_page(path, report["title"], _lead(report), parts, Path(__file__).with_name("comparison.js"))


def _lead(report: Mapping[str, Any]) -> str:
    methods = dict.fromkeys(name for group in report["groups"] for name in group["methods"])
    compared = [name for name in methods if name not in (UNCACHED, FEWER_STEPS)]
    others = [name for name in (FEWER_STEPS, UNCACHED) if name in methods]
    against = f", against {' and '.join(f'the {n} model' if n == UNCACHED else n for n in others)}" if others else ""
    return f"{', '.join(compared)}{against}. Every row starts from the same noise."


def _facts(report: Mapping[str, Any]) -> str:
    missing, found = report["cells"] - report["finished"], report["measured"]
    facts = {
        "Samples": f"{report['samples']} a row and seed",
        "Seeds": ", ".join(map(str, report["seeds"])) + (f"; mean ± {SPREAD}" if len(report["seeds"]) > 1 else ""),
        "Measured": f"{described(found, 'date')}, {report['runner']}",
        "Machine": described(found, "machine"),
        "Software": described(found, "software"),
        "Finished": f"{report['finished']} of {report['cells']} cells" if missing else "all cells",
    }
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _group(group: Mapping[str, Any], out: Path, report: Mapping[str, Any]) -> str:
    series = [name for name in group["methods"] if name != UNCACHED]
    left_out = [f'<p class="note">{escape(line)}</p>' for line in left_out_lines(report, group)]
    parts = [f"<h2>{escape(group['name'])}</h2>", *left_out]
    if group["rows"]:
        parts[1:1] = [
            _plots(group, series),
            "<h3>All figures</h3>",
            _table(group),
            f'<p class="note">{escape(meaning(report, group))} {RANKED}</p>',
            *(f'<p class="note">{escape(line)}</p>' for line in note_lines(group)),
        ]
        parts += [_sheets(group, out, report["samples"]), _training(group)]
    return f"<section>{''.join(parts)}</section>"


def _plots(group: Mapping[str, Any], series: Sequence[str]) -> str:
    """A panel a metric, each against arithmetic and against time."""
    metrics = {key: column for key, column in columns_of(group).items() if column.kind == "quality" and column.better}
    keys = "".join(
        f'<button data-series="s{number}" aria-pressed="true"><b style="color: {colour(number)}">'
        f"{MARKERS[marker(number)]}</b>{escape(name)}</button>"
        for number, name in enumerate(series)
    )
    panels = []
    for key, column in metrics.items():
        drawn = [_figure(group, series, key, column, cost) for cost in COSTS]
        if all(drawn):
            panels.append(_panel(column.head, f'<div class="plots">{"".join(drawn)}</div>'))
    if not panels:
        return ""
    note = (
        "Bars are one sample standard deviation over seeds. Lines join the budgets of a method. What reuses nothing is "
        "in the table alone. A button takes a method out."
    )
    return (
        f'<h3>Quality against cost</h3><div class="keys">{keys}</div><div data-panels="0">{"".join(panels)}</div>'
        f'<p class="note">{note}</p>'
    )


def _figure(group: Mapping[str, Any], series: Sequence[str], key: str, column: Column, cost: str) -> str:
    points: dict[str, list[Point]] = {name: [] for name in series}
    for row in group["rows"]:
        if row["name"] in points and {key, cost} <= row["figures"].keys() and not row["reused_nothing"]:
            x, y = row["figures"][cost], row["figures"][key]
            said = f"{row['name']} {point_of(row)}\n{column.title} {written(y, column)}\n{cost_said(row)}"
            scale = column.scale
            points[row["name"]].append(Point(x["mean"], scale * y["mean"], x["std"], scale * y["std"], said))
    if not any(points.values()):
        return ""
    uncached = next((row["figures"].get(key) for row in group["rows"] if row["name"] == UNCACHED), None)
    found = {"uncached": uncached, "real images": floors_of(group).get(key)}
    levels = [Level(column.scale * figure["mean"], name) for name, figure in found.items() if figure]
    svg = scatter_svg([*points.values()], levels, COSTS[cost], column.head)
    return f"<figure>{svg}</figure>"


def cost_said(row: Mapping[str, Any]) -> str:
    """CUR, arithmetic and time of a row, in a line."""
    figures = row["figures"]
    said = [f"CUR {100 * figures['cur']['mean']:.1f} %", f"MACs / {figures['mac_ratio']['mean']:.2f}"]
    return ", ".join([*said, f"speed × {figures['speedup']['mean']:.2f}"])


def _table(group: Mapping[str, Any]) -> str:
    """Sortable; the best of a budget stands out; real data at the end."""
    columns = columns_of(group)
    ranked = {
        key: best_rows(group, key) for key, column in columns.items() if column.better and column.kind == "quality"
    }
    heads = [_head("method", text=True), _head("budget", text=True)]
    heads += [_head(column.head, first="up" if column.better == "lower" else "down") for column in columns.values()]
    rows, budget = [], None
    for index, row in enumerate(group["rows"]):
        cells = [_cell(row["name"], text=True), _cell(point_of(row), text=True)]
        for key, column in columns.items():
            figure = row["figures"].get(key)
            value = figure["mean"] if figure else None
            cells.append(_cell(written(figure, column), value, best=index in ranked.get(key, ())))
        starts = ' class="starts"' if index and row["budget"] != budget else ""
        budget = row["budget"]
        rows.append(f"<tr{starts}>{''.join(cells)}</tr>")
    if floors := floors_of(group):
        cells = [_cell(REAL, text=True), _cell("", text=True)]
        cells += [_cell(written(floors.get(key), column)) for key, column in columns.items()]
        rows.append(f'<tr class="real starts">{"".join(cells)}</tr>')
    return _scrolling(heads, rows)


def _training(group: Mapping[str, Any]) -> str:
    table = training_table(group)
    if len(table) == 1:
        return ""
    heads = [_head(name, text=number < 2) for number, name in enumerate(table[0])]
    rows = []
    for line, row in zip(table[1:], trained_rows(group), strict=True):
        cells = [_cell(text, text=True) for text in line[:2]]
        values = [row["training"].get(key, {}).get("mean") for key in TRAINING]
        cells += [_cell(text, value) for text, value in zip(line[2:], values, strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "Of one seed. Images are those that a method was shown, of its training set; minutes are wall-clock time of "
        "training or calibration, with scoring and the fit of corrections, which ms / update is without; memory is "
        "what it adds at its peak, on a GPU that of all tensors."
    )
    return f'<h3>Training cost</h3>{_scrolling(heads, rows)}<p class="note">{note}</p>'


def _sheets(group: Mapping[str, Any], out: Path, samples: int) -> str:
    """For each budget, the schedule of every method and samples from equal noise."""
    rows = group["rows"]
    budgets = [*dict.fromkeys(row["budget"] for row in rows if row["budget"] is not None)]
    always = [row for row in rows if row["budget"] is None]
    panels = []
    for budget in budgets or [None]:
        shown = [*always[:1], *(row for row in rows if row["budget"] == budget is not None), *always[1:]]
        title = "samples" if budget is None else POINTS["target_cur"](budget)
        lines = [line for row in shown if (line := _sheet_line(row, out, title, samples))]
        if lines:
            panels.append(_panel(title, f'<div class="sheet">{"".join(lines)}</div>'))
    if not panels:
        return ""
    note = (
        "Rows of a schedule are model calls, the first at the top, columns are branches in order; dark is computed, "
        "light is reused, and shades between are seeds that differ. Samples are of the first seed, each column from "
        "the same noise."
    )
    middle = len(panels) // 2
    return (
        f'<h3>Schedules and samples</h3><div data-panels="{middle}">{"".join(panels)}</div><p class="note">{note}</p>'
    )


def _sheet_line(row: Mapping[str, Any], out: Path, title: str, samples: int) -> str:
    """One row of a sheet; empty where it left neither."""
    folders = [out / folder for folder in row["folders"]]
    schedules = [Schedule.load(file) for folder in folders if (file := folder / "schedule.safetensors").exists()]
    point = point_of(row) if row["point"] != title or row["missed"] else ""
    figures = [point, *cost_said(row).split(", ")] if row["name"] != UNCACHED else []
    if psnr := row["figures"].get("psnr_db"):
        figures.insert(1, f"{psnr['mean']:.1f} dB PSNR")
    name = f"<strong>{escape(row['name'])}</strong>" + "".join(
        f"<span>{escape(said)}</span>" for said in figures if said
    )
    label = escape(f"{row['name']} {row['point']}".strip())
    mask = strip = "<span></span>"
    if schedules:
        mask = f'<img class="crisp mask" src="{_schedule_png(schedules)}" alt="schedule of {label}">'
    if (folders[0] / "samples.png").exists():
        strip = f'<img class="crisp" src="{_strip_png(folders[0] / "samples.png", samples)}" alt="samples of {label}">'
    elif not schedules:
        return ""
    return f"<div><div>{name}</div><div>{mask}</div><div>{strip}</div></div>"


def _schedule_png(schedules: Sequence[Schedule]) -> str:
    """T x N pixels whose opacity is the share of seeds that compute there, as a data URI."""
    share = np.mean([schedule.compute for schedule in schedules], axis=0)
    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = COMPUTED
    pixels[..., 3] = np.rint(255 * share)
    return _data_uri(Image.fromarray(pixels))


def _strip_png(path: Path, samples: int) -> str:
    """A strip of samples, no larger than it has to be and with nothing between them, as a data URI."""
    with Image.open(path) as opened:
        image = opened.convert("LA" if opened.mode == "L" else "RGBA")
    width = (image.width + GAP) // min(samples, COLUMNS)
    for gap in range(width - GAP, image.width, width):
        image.paste((0,) * len(image.mode), (gap, 0, gap + GAP, image.height))
    size = (image.width * min(image.height, THUMBNAIL) // image.height, min(image.height, THUMBNAIL))
    return _data_uri(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _panel(title: str, content: str) -> str:
    return f'<div class="panel" data-title="{escape(title)}"><h4>{escape(title)}</h4>{content}</div>'


def _head(title: str, *, text: bool = False, first: str = "up") -> str:
    kind = ' class="text"' if text else ""
    return f'<th{kind} data-first="{first}"><button>{escape(title)}</button></th>'


def _cell(shown: str, value: float | None = None, *, text: bool = False, best: bool = False) -> str:
    mean, sign, spread = shown.partition(" ± ")
    kinds = " ".join(name for name, holds in (("text", text), ("best", best)) if holds)
    kind = f' class="{kinds}"' if kinds else ""
    number = f"{value:.9g}" if value is not None else escape(shown) if text else ""
    small = f" <small>± {escape(spread)}</small>" if sign else ""
    return f'<td{kind} data-value="{number}">{escape(mean)}{small}</td>'


def _scrolling(heads: Sequence[str], rows: Sequence[str]) -> str:
    head, body = "".join(heads), "".join(rows)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
