"""`hcompress prune`: a model with fewer heads and MLP units."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hcompress.recipe import PruneRecipe

SHOWN = ("psnr_db", "ssim", "relative_l2", "fd64", "accuracy", "precision", "recall", "emoji_clip", "kid_efflite0")


def prune(
    model: Annotated[str, typer.Argument(help="zoo:NAME, a local diffusers folder or a hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Run folder; it is a MODEL from then on.", show_default=False)],
    ratio: Annotated[float | None, typer.Option(help="Share of each block's heads and MLP units to take out.")] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Ratio of MACs to come nearest to.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of real images.", show_default="zoo data")] = None,
    threshold: Annotated[float | None, typer.Option(help="Steps count while L_t / L_max is above this.")] = None,
    updates: Annotated[int | None, typer.Option(help="Of the fine-tune; 0: none.")] = None,
    solver: Annotated[str | None, typer.Option(help="ddim, dpm++, unipc, ...")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps T.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of images, noises and labels.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe or a YAML file.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Override: prune.lr=1e-4")] = None,
    samples: Annotated[int, typer.Option(min=0, help="To compare with MODEL at the end; 0: none.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --out left off.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would stay.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Take heads and MLP units out of MODEL (Diff-Pruning) and train what is left. OUT trains and exports as it is.

    Example: hcompress prune zoo:fashion-dit --target-speedup 1.64 --steps 20 --out runs/pruned
    """
    from rich.console import Console
    from rich.progress import Progress

    from hcompress.recipe import find, resolve_prune

    flags: dict[str, Any] = {
        "model": model,
        "solver.name": solver,
        "solver.steps": steps,
        "cfg": cfg,
        "seed": seed,
        "prune.ratio": ratio,
        "prune.target_speedup": target_speedup,
        "prune.images": images,
        "prune.threshold": threshold,
        "prune.updates": updates,
    }
    resolved = resolve_prune(find(recipe) if recipe else None, flags, sets or [])
    if dry_run:
        return _print_plan(resolved, device, as_json)
    from hcompress.pruning import figures_of, kept_of
    from hcompress.pruning import prune as run
    from hcompress.report.progress import StagesDisplay
    from hcompress.report.quality import against_original, left_out
    from hcompress_runtime.files import write_atomically

    console = Console(stderr=True)
    try:
        with StagesDisplay() as display:
            made = run(
                resolved,
                out,
                resume=resume,
                device=device,
                on_taylor=lambda step, total, loss: display.count("importance", total, step, f"loss {loss:.3f}"),
                on_progress=display.show,
                on_notice=lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False),
            )
    except KeyboardInterrupt:
        left = "the fine-tune goes on from there" if kept_of(out).is_file() else "importance is measured from the start"
        print(f"stopped; add --resume to go on in {out}: {left}", file=sys.stderr)
        raise typer.Exit(130) from None
    figures: dict[str, Any] = figures_of(made.original.adapter, made.pruned.adapter)
    if samples:
        if note := left_out(made.original, samples):
            console.print(note, highlight=False, soft_wrap=True, markup=False)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
            tasks = {what: bars.add_task(what, total=samples) for what in ("original", "pruned")}
            figures |= against_original(
                made.original,
                made.pruned,
                samples,
                resolved.seed,
                lambda what, done: bars.update(tasks[what], completed=done),
            )
    write_atomically(out / "quality.json", json.dumps(figures, indent=1).encode())
    if as_json:
        print(json.dumps({"out": str(out)} | figures))
        return
    if samples:
        _print_table(figures, f"{resolved.model}, diff-pruning, {samples} samples, seed {resolved.seed}")
    print(f"{out}  MACs / {figures['mac_ratio']:.2f}, {figures['params'] / 1e6:.2f} M parameters")


def _print_plan(recipe: PruneRecipe, device: str, as_json: bool) -> None:
    """What would stay, before anything is measured: importance decides which heads and units, not how many."""
    from hcompress.errors import AbsentModel
    from hcompress.prune.taylor import most_important, uniform
    from hcompress.pruned import narrowed
    from hcompress.pruning import figures_of, open_original, ratios_of, widths_of
    from hcompress.report.forecast import outline

    try:
        adapter, settings = open_original(recipe, device=device).adapter, recipe.prune
    except AbsentModel as absent:
        return _print_values(outline(recipe, absent), as_json)
    kept = most_important(uniform(adapter), ratios_of(adapter, settings), settings.multiple)
    plan: dict[str, Any] = {"model": recipe.model, "method": settings.method, "updates": settings.updates}
    plan |= {**widths_of(kept), **figures_of(adapter, narrowed(adapter, kept))}
    _print_values(plan, as_json)


def _print_values(plan: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(plan) if as_json else "\n".join(f"{key:22} {value}" for key, value in plan.items()))


def _print_table(figures: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "original", "pruned", "real, same number", title=title)
    before, after = figures["original"], figures["pruned"]
    for name in SHOWN:
        values = [before.get(name), after.get(name), after.get(f"{name}_floor")]
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    Console().print(table)
