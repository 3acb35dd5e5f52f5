"""Which layers can bear few bits, as bars: the most sensitive on top, those proposed to be kept in another colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hcompress.quant.analysis import Sensitivity

SHOWN, BORNE, PROPOSED = 40, "#1f4e79", "#c0504d"


def save_bars(ranked: Sequence[Sensitivity], path: Path, title: str) -> None:
    """Write the first SHOWN of `ranked` as a PNG, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = ranked[:SHOWN][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.2 * len(shown)), layout="constrained")
    colours = [PROPOSED if one.proposed else BORNE for one in shown]
    axes.barh([one.name for one in shown], [max(one.error, 1e-12) for one in shown], color=colours)
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("relative squared error of the guided output, this layer alone in few bits")
    axes.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
