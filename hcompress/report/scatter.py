"""Quality against cost as SVG that belongs to a page: its colours are the page's, and its points say what they are."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "p": "⬟", "*": "★", "h": "⬢"}
COLOURS = 10  # that page.css has, --s0 and on; series after them begin again with the next marker
INK, MUTED, RULE = "#010101", "#020202", "#030303"  # stand for the page's colours until the SVG is written
THEMED = {INK: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)"}


@dataclass(frozen=True)
class Point:
    """A mean with its spread either way, and what a person is told of it."""

    x: float
    y: float
    x_std: float
    y_std: float
    said: str


@dataclass(frozen=True)
class Level:
    """A value of y that holds everywhere, such as the uncached model's."""

    y: float
    name: str


def marker(series: int) -> str:
    """Matplotlib's marker of series number `series`; of those that share a colour each has another."""
    return list(MARKERS)[(series + series // COLOURS) % len(MARKERS)]


def colour(series: int) -> str:
    """Its colour, as CSS."""
    return f"var(--s{series % COLOURS})"


def scatter_svg(
    series: Sequence[Sequence[Point]], levels: Sequence[Level], x_label: str, y_label: str, *, first: int = 0
) -> str:
    """One curve a series through its points, ordered by x; marks of series i have the classes `s{first + i}` and `pt`.

    Drawn by matplotlib, with stand-ins for colours that follow the page, in light as in dark.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "hcompress", "font.size": 9, "axes.edgecolor": MUTED}
    settings |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED}
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(4.6, 3.4), layout="constrained")
        for level in levels:
            axes.axhline(level.y, color=MUTED, linewidth=1, dashes=(4, 3))
            at = {"xy": (1, level.y), "xycoords": ("axes fraction", "data"), "xytext": (-2, 2), "ha": "right"}
            axes.annotate(level.name, **at, textcoords="offset points", color=MUTED, fontsize=8)
        for number, points in enumerate(series):
            stand_in, drawn = f"#0001{number:02x}", sorted(points, key=lambda point: point.x)
            x, y = [point.x for point in drawn], [point.y for point in drawn]
            axes.plot(x, y, color=stand_in, linewidth=1.4, gid=f"ln-{number}")
            if any(point.y_std or point.x_std for point in drawn):
                spread = {"xerr": [point.x_std for point in drawn], "yerr": [point.y_std for point in drawn]}
                bars = axes.errorbar(x, y, **spread, fmt="none", ecolor=stand_in, elinewidth=0.9, alpha=0.7)
                for bar in bars.lines[2]:
                    bar.set_gid(f"er-{number}")
            for index, point in enumerate(drawn):
                style = {"marker": marker(number), "markersize": 6, "markeredgewidth": 0, "linestyle": ""}
                axes.plot([point.x], [point.y], color=stand_in, gid=f"pt-{number}-{index}", **style)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.locator_params(nbins=6)
        axes.xaxis.set_major_formatter("{x:g}×")
        axes.grid(color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
        axes.margins(x=0.08, y=0.1)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
        pyplot.close(figure)
    said = [[point.said for point in sorted(points, key=lambda point: point.x)] for points in series]
    return _themed(file.getvalue(), said, first, f"{y_label} against {x_label}")


def _themed(svg: str, said: Sequence[Sequence[str]], first: int, label: str) -> str:
    """The drawing alone, to be put into a page: stand-ins become its colours, groups the classes of their series."""

    def mark(found: re.Match[str]) -> str:
        kind, number, index = found[1], int(found[2]), found[3]
        classes = f"s{first + number}" + (" pt" if kind == "pt" else "")
        tip = f' data-tip="{escape(said[number][int(index)])}"' if kind == "pt" else ""
        return f'<g class="{classes}"{tip}>'

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(label)}">', svg, count=1
    )
    svg = re.sub(r'<g id="(ln|er|pt)-(\d+)(?:-(\d+))?">', mark, svg)
    svg = re.sub(r"#0001([0-9a-f]{2})", lambda found: colour(first + int(found[1], 16)), svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, themed in THEMED.items():
        svg = svg.replace(stand_in, themed)
    return svg
