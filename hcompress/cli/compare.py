"""`hcompress compare`: several methods in one table, with plots."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from types import FrameType

    from hcompress.comparison import Comparison


def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="Recipes, or one comparison: shipped ones or files.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs and the report.", show_default=False)],
    budgets: Annotated[
        str | None, typer.Option(help="Target CURs, such as 0.2,0.3,0.4.", show_default="the recipes'")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of training and of noise.", show_default="0,1,2")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="To measure with, a row and seed.", show_default="the recipes', or 500")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Real pictures or their statistics: adds FID, IS, ...")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Cut and scale a folder's pictures to this side.")] = None,
    inception: Annotated[
        str | None, typer.Option(help="Inception's weights as torch-fidelity has them; fetched if not given.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Text models: a CLIP, a local folder or a hub id; adds the CLIP score.")
    ] = None,
    runner: Annotated[
        str | None, typer.Option(help="What samples and is timed: torch or onnxruntime.", show_default="torch")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which cells there are, and run nothing.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON object on stdout.")] = False,
) -> None:
    """Train, sample and measure every recipe at every budget with every seed; leave compare.html, .md and .json in OUT.

    The same command goes on where it stopped. What was trained is kept; cells that were judged by another reference or
    CLIP are sampled anew, those that were timed with other settings or on another machine timed anew. On several GPUs:
    accelerate launch -m hcompress.cli.main compare ...

    Example: hcompress compare fashion-dit_ddim20 --out runs/compare-20
    """
    from hcompress.comparison import load_comparison, numbers

    flags = {
        "budgets": numbers("--budgets", budgets, float),
        "seeds": numbers("--seeds", seeds, int),
        "samples": samples,
        "reference": reference,
        "size": size,
        "inception": inception,
        "clip": clip,
        "runner": runner,
    }
    comparison = load_comparison(recipes, flags)
    if dry_run:
        plan = _plan(comparison)
        print(json.dumps(plan) if as_json else "\n".join([*plan["folders"], *plan["left_out"]]))
        return
    from hcompress.compare import compare as run
    from hcompress.report.comparison_progress import ComparisonDisplay

    speaks = os.environ.get("RANK", "0") == "0"  # of several processes one
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with ComparisonDisplay(speaks=speaks) as display:
            report = run(comparison, out, display, device=device)
    except KeyboardInterrupt as stopped:
        print(f"stopped; finished rows are in {out / 'compare.html'}: the same command goes on", file=sys.stderr)
        raise typer.Exit(128 + next(iter(stopped.args), signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if speaks:
        print(json.dumps(report) if as_json else out / "compare.html")


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """As Ctrl-C does, which leaves the report behind."""
    raise KeyboardInterrupt(number)


def _plan(comparison: Comparison) -> dict[str, Any]:
    """The cells of a run, by their folders, and what is left out of it; of fewer steps the models' MACs say how many.

    Without torch, or a model, these are left out of the plan, with the reason.
    """
    from hcompress.comparison import cells_of
    from hcompress.errors import AbsentModel, MissingExtra, missing

    cells, left_out = cells_of(comparison)
    lines = [f"{one.name} {one.point}: {one.reason}" for one in left_out]
    if comparison.fewer_steps and any(cell.budget is not None for cell in cells):
        try:
            if find_spec("torch") is None:
                raise missing("torch", "train")
            from hcompress.compare import Settings, with_fewer_steps

            cells = with_fewer_steps(comparison, cells, Settings("cpu"))
        except (AbsentModel, MissingExtra) as error:
            lines.append(f"fewer steps, as many as each budget pays for: {error}")
    folders = [str(cell.folder) for cell in cells]
    return {"cells": len(cells), "folders": folders, "left_out": lines, "comparison": comparison.model_dump()}
