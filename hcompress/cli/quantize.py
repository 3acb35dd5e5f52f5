"""`hcompress quantize`: a model in few bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from hcompress.quant.settings import EfficientDMSettings
    from hcompress.recipe import QuantRecipe

SHOWN = (
    *("psnr_db", "ssim", "relative_l2", "fd64", "accuracy", "precision", "recall", "emoji_clip", "kid_efflite0"),
    "megabytes",
)


RESAMPLING = {"model", "out", "solver", "steps", "cfg", "resample_steps", "resume", "dry_run", "as_json"}


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="zoo:NAME, a local diffusers folder or a hub id.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Run folder; it is a MODEL from then on.", show_default=False)],
    method: Annotated[
        str | None,
        typer.Option(help="int8-max, int8-percentile, int8-smoothquant, fp8, int4-wo, ptq4dit, efficientdm."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="w8a8, w4a8, ...; the method's own if not given.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Glob of layers that stay in float; repeat.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Glob of layers to quantize, no others; repeat.")] = None,
    one_scale: Annotated[
        bool | None, typer.Option("--one-scale/--per-step", help="One range of an input, or one for each call.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="ddim, dpm++, unipc, ...")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps T.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noises that calibrate.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A shipped recipe or a YAML file.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Override: quant.samples=32")] = None,
    with_cache: Annotated[
        Path | None, typer.Option(help="A schedule of MODEL: make both for each other, with efficientdm.")
    ] = None,
    relearn: Annotated[bool, typer.Option("--relearn", help="--with-cache: learn its schedule from scratch.")] = False,
    keep_schedule: Annotated[bool, typer.Option("--keep-schedule", help="--with-cache: learn no schedule.")] = False,
    teacher: Annotated[str | None, typer.Option(help="--with-cache: of the schedule; quantized or fp.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="To compare with the float model at the end; 0: none.")] = 200,
    analyze: Annotated[bool, typer.Option("--analyze", help="Rank layers by the harm they do; make nothing.")] = False,
    resample_steps: Annotated[
        bool, typer.Option("--resample-steps", help="MODEL is quantized: give it another solver or steps.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where --out left off.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be quantized.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Put MODEL's layers into few bits, and compare what it makes with what it made. OUT trains and exports as it is.

    Example: hcompress quantize zoo:fashion-dit --method int8-max --steps 20 --cfg 1.5 --out runs/int8
    """
    from rich.console import Console

    from hcompress.errors import RecipeError
    from hcompress.quant.settings import EfficientDMSettings
    from hcompress.recipe import find, resolve_quant
    from hcompress.rundir import own_flags
    from hcompress.schedule import Schedule

    console = Console(stderr=True)
    if resample_steps:
        _refuse_others(context, RESAMPLING, "--resample-steps")
        made = _resample(model, solver, steps, cfg, out, resume, dry_run)
        print(json.dumps(made) if as_json else made.get("out") or "\n".join(f"{k:22} {v}" for k, v in made.items()))
        return
    flags: dict[str, Any] = {
        "model": model,
        "solver.name": solver,
        "solver.steps": steps,
        "cfg": cfg,
        "seed": seed,
        "quant.method": method,
        "quant.format": format,
        "quant.keep": keep or None,
        "quant.only": only or None,
        "quant.one_scale": one_scale,
        "quant.teacher": teacher,
    }
    if with_cache:
        flags |= {"quant.method": method or "efficientdm", "quant.with_cache": str(with_cache)}
        if flags["quant.method"] != "efficientdm":
            raise RecipeError(f"--with-cache distils; for {method}, quantize first and then: hcompress train {out}")
        its = {} if recipe else Schedule.load(with_cache).flags
        flags |= {key: value for key, value in its.items() if flags[key] is None}
    own = {} if recipe else own_flags(model)
    flags |= {key: value for key, value in own.items() if flags[key] is None}
    if keep_schedule and (relearn or teacher):
        other = "--relearn" if relearn else "--teacher"
        raise RecipeError(f"{other} is about learning a schedule, which --keep-schedule forgoes; pass one of the two")
    if relearn or keep_schedule:
        flags["quant.relearn"] = "keep" if keep_schedule else "scratch"
    if resume and not recipe and (out / "recipe.yaml").is_file():
        recipe = str(out / "recipe.yaml")  # its own, under what else is given
    resolved = resolve_quant(find(recipe) if recipe else None, flags, sets or [])
    if dry_run:
        return _print_plan(resolved, device, as_json)
    if analyze:
        return _analyze(resolved, out, device, resume, console, as_json)
    if isinstance(resolved.quant, EfficientDMSettings):
        return _distil(resolved, resolved.quant, out, resume, device, samples, console, as_json)
    from hcompress.quantize import quantize as run
    from hcompress.report.quality import against_float, left_out
    from hcompress_runtime.files import write_atomically

    with _bars(console) as bars:
        task = bars.add_task("calibrating", total=None)
        result = run(
            resolved,
            out,
            resume=resume,
            device=device,
            on_start=lambda setting, calls: bars.update(task, total=calls),
            on_call=lambda done: bars.update(task, completed=done),
        )
        if samples:
            if note := left_out(result.dense, samples):
                console.print(note, highlight=False, soft_wrap=True, markup=False)
            tasks = {what: bars.add_task(what, total=samples) for what in ("float", "quantized")}
            figures = against_float(
                result.dense,
                result.quantized,
                samples,
                resolved.seed,
                lambda what, done: bars.update(tasks[what], completed=done),
            )
            write_atomically(out / "quality.json", json.dumps(figures, indent=1).encode())
    if as_json:
        print(json.dumps({"out": str(out)} | (figures if samples else {})))
        return
    if samples:
        _print_table(figures, f"{resolved.model}, {resolved.quant.method}, {samples} samples, seed {resolved.seed}")
    print(out)


def _distil(
    recipe: QuantRecipe,
    settings: EfficientDMSettings,
    out: Path,
    resume: bool,
    device: str,
    samples: int,
    console: Console,
    as_json: bool,
) -> None:  # fmt: skip
    from hcompress.quantize import quantize as run
    from hcompress.report.progress import StagesDisplay
    from hcompress.report.quality import against_float, left_out, rows_with_cache, with_cache
    from hcompress.rundir import RunDir
    from hcompress.schedule import Schedule
    from hcompress_runtime.files import write_atomically

    try:
        with StagesDisplay() as display:
            made = run(recipe, out, resume=resume, device=device, on_progress=display.show)
    except KeyboardInterrupt:
        print(f"stopped; add --resume to go on in {out} from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    figures: dict[str, Any] = {}
    title = f"{recipe.model}, efficientdm {settings.resolved_format}, {samples} samples, seed {recipe.seed}"
    if samples:
        if note := left_out(made.dense, samples):
            console.print(note, highlight=False, soft_wrap=True, markup=False)
        with _bars(console) as bars:
            names = rows_with_cache(made) if made.schedule else ("float", "quantized")
            tasks = {what: bars.add_task(what, total=samples) for what in names}

            def show(what: str, done: int) -> None:
                bars.update(tasks[what], completed=done)

            if made.schedule:
                given = Schedule.load(Path(str(settings.with_cache)))
                figures = with_cache(made, given, samples, recipe.seed, show)
            else:
                figures = against_float(made.dense, made.quantized, samples, recipe.seed, show)
        write_atomically(out / "quality.json", json.dumps(figures, indent=1).encode())
    if as_json:
        schedule = {"schedule": str(RunDir(out).schedule), "cur": made.schedule.cur} if made.schedule else {}
        print(json.dumps({"out": str(out)} | schedule | figures))
        return
    if samples and made.schedule:
        _print_with_cache(figures["rows"], title)
        if made.schedule.method.get("kept") == "given":
            scores = made.schedule.method["score_db"]
            better = f"{scores['given']:.1f} dB on held-out noise against {scores['learned']:.1f} learned anew"
            console.print(f"the float model's schedule is kept: {better}", highlight=False)
    elif samples:
        _print_table(figures, title)
    print(out)


def _print_with_cache(rows: dict[str, dict[str, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = [name for name in (*SHOWN, "fd64_floor", "cur", "mac_ratio") if any(name in row for row in rows.values())]
    table = Table("", *shown, title=title)
    for row, figures in rows.items():
        table.add_row(row, *(f"{figures[name]:.3f}" if name in figures else "-" for name in shown))
    Console().print(table)


def _bars(console: Console) -> Any:
    from rich.progress import Progress

    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _print_table(figures: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "float", "quantized", "real, same number", title=title)
    for name in SHOWN:
        values = [figures["float"].get(name), figures["quantized"].get(name), figures["quantized"].get(f"{name}_floor")]
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    Console().print(table)


def _print_plan(recipe: QuantRecipe, device: str, as_json: bool) -> None:
    """Which layers would be quantized, and how large the result would be."""
    from hcompress.errors import AbsentModel
    from hcompress.quant.settings import EfficientDMSettings
    from hcompress.quantize import num_calls, open_float, selected, walk_of
    from hcompress.report.forecast import outline

    try:
        setting = open_float(recipe, device=device)
    except AbsentModel as absent:
        plan = outline(recipe, absent)
        print(json.dumps(plan) if as_json else "\n".join(f"{key:22} {value}" for key, value in plan.items()))
        return
    selection = selected(setting.adapter, recipe.quant)
    walk = walk_of(setting, recipe.quant, recipe.seed)
    plan = {
        "model": recipe.model,
        "method": recipe.quant.method,
        "solver": f"{setting.identity.solver['class']}, {recipe.solver.steps} steps, {setting.table.num_calls} calls",
        "layers": len(selection.formats),
        "inputs": selection.num_inputs,
        "quantized_weights": selection.num_weights(setting.adapter),
        "all_weights": setting.adapter.graph.total_params,
        "model_calls": num_calls(setting.adapter, selection, recipe.quant.method, walk),
    }
    if isinstance(recipe.quant, EfficientDMSettings):
        plan |= {"updates": recipe.quant.updates, "noises_an_update": recipe.quant.batch}
    if as_json:
        print(json.dumps(plan | {"formats": selection.plan()}))
        return
    print("\n".join(f"{key:22} {value}" for key, value in plan.items()))
    for name, format in selection.formats.items():
        print(f"{format.weight}/{format.activation or 'float':8} {name}")


def _analyze(recipe: QuantRecipe, out: Path, device: str, resume: bool, console: Console, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from hcompress.quant.analysis import analyze
    from hcompress.quant.selection import select_as
    from hcompress.quantize import open_float, walk_of
    from hcompress.report.sensitivity import save_bars
    from hcompress.rundir import open_run

    setting = open_float(recipe, device=device)
    selection = select_as(setting.adapter, recipe.quant)
    run = open_run(out, recipe, resume=resume)
    with _bars(console) as bars:
        task = bars.add_task("layers", total=len(selection.layers))
        ranked = analyze(
            setting.adapter,
            selection,
            walk_of(setting, recipe.quant, recipe.seed),
            lambda done, total: bars.update(task, completed=done, total=total),
        )
    run.log({"sensitivity": [asdict(one) for one in ranked]})
    picture = out / "sensitivity.png"
    save_bars(ranked, picture, f"{recipe.model}, {recipe.quant.resolved_format}, {setting.table.num_calls} calls")
    proposed = [one.name for one in ranked if one.proposed]
    if as_json:
        print(json.dumps({"layers": [asdict(one) for one in ranked], "keep": proposed, "png": str(picture)}))
        return
    table = Table(
        "layer", "error", "bits of weight / input", "weights", "", title=f"{recipe.model}, one layer at a time"
    )
    for one in ranked:
        table.add_row(one.name, f"{one.error:.2e}", one.format, str(one.weights), "keep" if one.proposed else "")
    Console().print(table)
    print(" ".join(f"--keep {name}" for name in proposed) or "no layer stands out: nothing need be kept")
    print(picture)


def _resample(
    model: str, solver: str | None, steps: int | None, cfg: float | None, out: Path, resume: bool, dry_run: bool
) -> dict[str, Any]:  # fmt: skip
    """What came of it, or would."""
    from hcompress.quantize import resample, resampled
    from hcompress.rundir import own_flags

    own = own_flags(model)
    solver, steps = solver or own.get("solver.name", "ddim"), steps or own.get("solver.steps", 20)
    if dry_run:
        plan = resampled(model, solver, steps).adapter.plan
        return {"model": model, "solver": plan["solver"]["class"], "steps": steps, "of": plan["resampled"]["steps"]}
    setting = resample(model, solver, steps, cfg if cfg is not None else own.get("cfg", 1.5), out, resume=resume)
    return {"out": str(out), "solver": setting.identity.solver["class"], "steps": steps}


def _refuse_others(context: typer.Context, known: set[str], flag: str) -> None:
    """Raise RecipeError where the command line holds a flag that has no meaning beside `flag`."""
    from hcompress.errors import RecipeError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in known and source is not None and source.name == "COMMANDLINE":
            raise RecipeError(f"{parameter.opts[0]} has no meaning with {flag}; leave it out")
