"""A training run as a picture: CUR, error, beta and hard score over rounds (trajectories, sweeps)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def save_training_curves(records: Sequence[dict[str, Any]], path: Path, target_cur: float | None = None) -> None:
    """Write a PNG of the metrics.jsonl `records` of one run, of those that are rounds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = [record for record in records if "round" in record]
    steps = [record["round"] for record in records]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    left.plot(steps, [100 * r["hard_cur"] for r in records], label="hard (deployed)")
    left.plot(steps, [100 * r["expected_cur"] for r in records], label="expected (soft)")
    left.plot(steps, [100 * r["unpolarised"] for r in records], label="undecided r", linewidth=1)
    if target_cur is not None:
        left.axhline(100 * target_cur, color="black", linewidth=0.8, linestyle=":", label="target")
    left.set_ylabel("CUR (%)")
    left.legend(fontsize=8)
    middle.semilogy(steps, [r["mse"] for r in records], label="mean squared error")
    middle.semilogy(steps, [r["beta"] for r in records], label="beta")
    middle.legend(fontsize=8)
    scored = [(r["round"], r["score_db"]) for r in records if r["score_db"] is not None]
    right.plot([s for s, _ in scored], [db for _, db in scored], marker="o")
    right.set_ylabel("hard schedule against uncached (dB)")
    for axes in (left, middle, right):
        axes.set_xlabel("round")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
