"""A schedule as a picture: one row a model call, one column a branch; dark computed, light reused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.text import Text

from hcompress.schedule import Schedule
from hcompress_runtime.files import write_atomically

COMPUTED, REUSED = "#1f4e79", "#dce9f5"


def reuse_line(schedule: Schedule) -> str:
    """What reused branches yield, and how many of them, and of the channels of others, have less than that takes."""
    fallbacks = f", {schedule.fallbacks} entries without an older value for it" if schedule.fallbacks else ""
    degenerate = schedule.method.get("degenerate_channels") if schedule.corrections else None
    constant = f", {degenerate} channels that fell to plain reuse" if degenerate else ""
    order = " of order 2" if schedule.order == 2 else ""
    return f"{schedule.reuse} reuse{order}{fallbacks}{constant}"


def terminal_grid(schedule: Schedule) -> Text:
    """The grid as coloured blocks, a line a call, with the number of branches computed at the end."""
    kinds = sorted({name.rpartition(".")[2] for name in schedule.names})
    columns = [[i for i, name in enumerate(schedule.names) if name.rpartition(".")[2] == kind] for kind in kinds]
    text = Text("call  " + "  ".join(f"{kind:{len(c)}}" for kind, c in zip(kinds, columns, strict=True)) + "\n")
    for call, row in enumerate(schedule.compute):
        text.append(f"{call:4}  ")
        for indices in columns:
            for index in indices:
                text.append("█" if row[index] else "·", style=COMPUTED if row[index] else "grey62")
            text.append("  ")
        text.append(f"{int(row.sum()):3}\n")
    return text


def save_heatmap(schedule: Schedule, path: Path) -> None:
    """Write the grid as a PNG; where logits are known, shades between show how sure the router was.

    Raises DiskError where the disk refuses.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    calls, branches = schedule.compute.shape
    values = schedule.compute.astype(float)
    figure, axes = pyplot.subplots(figsize=(1.8 + 0.24 * branches, 1.4 + 0.24 * calls), layout="constrained")
    axes.imshow(values, cmap=LinearSegmentedColormap.from_list("reuse", [REUSED, COMPUTED]), vmin=0, vmax=1)
    axes.set_xticks(range(branches), schedule.names, rotation=90, fontsize=7)
    axes.set_yticks(range(calls), [str(call) for call in range(calls)], fontsize=7)
    axes.set_xticks(np.arange(-0.5, branches), minor=True)
    axes.set_yticks(np.arange(-0.5, calls), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("model call (first at the top)")
    shades = f"computed dark, reused light, CUR {100 * schedule.cur:.1f} %"
    axes.set_title(f"{schedule.identity.model}: {shades}\n{reuse_line(schedule)}", fontsize=9)
    try:
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    finally:
        pyplot.close(figure)
