"""`hcompress train`: find out when and where a model may reuse, by any of the caching methods."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcompress.caching import CACHING

if TYPE_CHECKING:
    from hcompress.caching.settings import CachingSettings
    from hcompress.schedule import Schedule

SAID = ("reuse", "order", "start", "fallbacks", "degenerate_channels", "alpha", "images_used", "images_skipped")
"""What is told of a schedule's history, as far as it has it."""


def train(
    model: Annotated[str, typer.Argument(help="zoo:NAME, a local diffusers folder or a hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Run folder; schedule.safetensors is left there.", show_default=False)],
    method: Annotated[str | None, typer.Option(help=f"{', '.join(CACHING)}.", show_default="harmonica")] = None,
    solver: Annotated[str | None, typer.Option(help="ddim, dpm++, unipc, ...")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps T.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    target_cur: Annotated[float | None, typer.Option(help="Cache utilisation ratio to reach.")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Ratio of MACs to reach.")] = None,
    reuse: Annotated[
        str | None, typer.Option(help="plain, taylor or corrected: what a reused branch yields.", show_default="plain")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Find none: take this one's mask, and fit --reuse corrected to it.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Fixed beta, the paper's protocol.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder, for learning-to-cache.", show_default="zoo data")] = None,
    seed: Annotated[int | None, typer.Option(help="Of router, noises and labels.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe or a YAML file.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Override: caching.lr=0.05")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --out left off.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Find a schedule for MODEL, learned with HarmoniCa or by another method. Ctrl-C loses nothing; --resume goes on.

    Example: hcompress train zoo:fashion-dit --solver ddim --steps 20 --cfg 1.5 --target-cur 0.4 --out runs/first
    """
    from hcompress.errors import RecipeError
    from hcompress.recipe import find, resolve
    from hcompress.rundir import own_flags
    from hcompress.schedule import Schedule

    flags: dict[str, Any] = {
        "model": model,
        "solver.name": solver,
        "solver.steps": steps,
        "cfg": cfg,
        "seed": seed,
        "caching.method": method,
        "caching.reuse": reuse,
        "caching.schedule": schedule,
        "caching.images": images,
        "caching.beta": beta,
        "caching.target_cur": target_cur,
        "caching.target_speedup": target_speedup,
    }
    own = {} if recipe else own_flags(model)
    if schedule:
        others = {"--method": method, "--target-cur": target_cur, "--target-speedup": target_speedup, "--beta": beta}
        if finding := [name for name, value in others.items() if value not in (None, "given")]:
            raise RecipeError(
                f"--schedule takes the mask that there is: {', '.join(finding)} would do nothing; leave out"
            )
        flags["caching.method"] = "given"
        own |= Schedule.load(Path(schedule), reuse="plain").flags
    flags |= {key: value for key, value in own.items() if flags[key] is None}
    if resume and not recipe and (out / "recipe.yaml").is_file():
        recipe = str(out / "recipe.yaml")  # its own, under what else is given
    resolved = resolve(find(recipe) if recipe else None, flags, sets or [])
    if dry_run:
        from hcompress.errors import AbsentModel
        from hcompress.report.forecast import forecast, outline

        try:
            plan = forecast(resolved, device)
        except AbsentModel as absent:
            plan = outline(resolved, absent)
        print(json.dumps(plan) if as_json else "\n".join(f"{key:22} {value}" for key, value in plan.items()))
        return
    from hcompress.report.heatmap import reuse_line
    from hcompress.report.progress import TrainingDisplay
    from hcompress.train import train as run

    speaks = os.environ.get("RANK", "0") == "0"  # of several processes one
    unit = "sweeps" if resolved.caching.method == "learning-to-cache" else "trajectories"
    display = TrainingDisplay(unit, speaks=speaks)
    try:
        with display:
            made = run(
                resolved,
                out,
                resume=resume,
                device=device,
                on_start=display.start,
                on_progress=display.show,
                on_notice=display.notice,
            )
    except KeyboardInterrupt:
        print(f"stopped; all but the last of the {unit} is in {out}: add --resume to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    if not speaks:
        return
    if missed := _missed(resolved.caching, made):
        print(missed, file=sys.stderr)
    found = made.method
    result: dict[str, Any] = {
        "schedule": str(out / "schedule.safetensors"),
        "method": found["name"],
        "cur": made.cur,
        "mac_ratio": found["mac_ratio"],
        **{name: found[name] for name in SAID if name in found},
    }
    if display.last:
        result |= {"beta": found["final_beta"], "unpolarised": display.last.unpolarised, "score_db": display.score_db}
    if as_json:
        print(json.dumps(result))
        return
    corrected = f", {reuse_line(made)}" if made.corrections else ""
    print(f"{result['schedule']}  CUR {100 * made.cur:.1f} %, MACs / {found['mac_ratio']:.2f}{corrected}")


def _missed(settings: CachingSettings, made: Schedule) -> str | None:
    """A line of warning where a router was to reach a goal and did not; None where it did."""
    from hcompress.caching.settings import MISSED

    rounds = {"harmonica": "trajectories", "learning-to-cache": "sweeps"}.get(settings.method)
    cur, speedup = getattr(settings, "target_cur", None), getattr(settings, "target_speedup", None)
    wanted = cur or (speedup and 1 - 1 / speedup)
    reached = made.cur if cur else 1 - 1 / made.method["mac_ratio"]
    if not rounds or not wanted or abs(reached - wanted) <= MISSED:
        return None
    asked = f"CUR {100 * cur:.0f} %" if cur else f"MACs / {speedup:.2f}"
    return f"{asked} was not reached; give it more {rounds}, such as --set caching.{rounds}={2 * made.method[rounds]}"
