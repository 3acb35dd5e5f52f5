"""`hcompress eval`: what a schedule costs in quality and saves in arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

SHOWN = (
    *("psnr_db", "ssim"),
    *("fd64", "accuracy", "precision", "recall"),
    *("emoji_clip", "retrieval", "fd_efflite0", "kid_efflite0"),
    *("cur", "mac_ratio"),
)


def evaluate(
    model: Annotated[str, typer.Argument(help="zoo:NAME, a local diffusers folder or a hub id.", show_default=False)],
    schedule: Annotated[Path, typer.Option(help="A schedule.safetensors.", show_default=False)],
    solver: Annotated[str, typer.Option(help="The schedule's solver.")] = "ddim",
    cfg: Annotated[float | None, typer.Option(help="Guidance scale; the schedule's own if not given.")] = None,
    reuse: Annotated[
        str | None, typer.Option(help="Run its mask under another rule: plain, taylor.", show_default="its own")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many; even shares of the classes.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the noise; sample i is the same for every schedule.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare cached samples with uncached ones from the same noise, and both with real images.

    Example: hcompress eval zoo:fashion-dit --schedule runs/first/schedule.safetensors --samples 2000
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from hcompress.report.quality import evaluate as measure
    from hcompress.report.quality import left_out
    from hcompress.schedule import Schedule
    from hcompress.setting import open_setting

    loaded = Schedule.load(schedule)
    guidance = cfg if cfg is not None else loaded.identity.cfg or 1.0
    setting = open_setting(model, solver, int(loaded.identity.solver["steps"]), guidance, device=device)
    loaded.check_fits(setting.adapter.graph, setting.identity)
    loaded = loaded.reusing(reuse, setting.adapter.graph)
    for note in filter(None, (left_out(setting), loaded.fitted_elsewhere(setting.cfg))):
        print(note, file=sys.stderr)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks = {what: bars.add_task(what, total=samples) for what in ("uncached", "cached")}
        result = measure(setting, loaded, samples, seed, lambda what, done: bars.update(tasks[what], completed=done))
    if as_json:
        print(json.dumps(result["cached"] | {"uncached": result["uncached"], "num_samples": samples, "seed": seed}))
        return
    table = Table("", "uncached", "cached", "real, same number", title=f"{model}, {samples} samples, seed {seed}")
    for name in SHOWN:
        if name in result["cached"]:
            floor = result["cached"].get(f"{name}_floor")
            before = result["uncached"].get(name)
            table.add_row(name, *("-" if x is None else f"{x:.3f}" for x in (before, result["cached"][name], floor)))
    Console().print(table)
