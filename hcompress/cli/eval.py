"""`hcompress eval`: what a schedule costs in quality and saves in arithmetic, and how good finished pictures are."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

    from hcompress.report.published import Judge

CLIP = "openai/clip-vit-base-patch16"
SHOWN = (
    *("psnr_db", "ssim", "relative_l2"),
    *("fd64", "accuracy", "precision", "recall"),
    *("emoji_clip", "retrieval", "fd_efflite0", "kid_efflite0"),
    *("inception_score", "fid", "sfid", "kid", "inception_precision", "inception_recall", "clip_score"),
    *("cur", "mac_ratio"),
)


def evaluate(
    model: Annotated[
        str, typer.Argument(help="zoo:NAME, a folder or a hub id; or pictures: a folder or an npz.", show_default=False)
    ],
    schedule: Annotated[
        Path | None, typer.Option(help="A run, or a schedule.safetensors; none: MODEL's own, or MODEL uncached.")
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="MODEL uncached, though it has a schedule of its own.")
    ] = False,
    solver: Annotated[str | None, typer.Option(help="The schedule's solver; ddim if not given.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="The schedule's own if not given, else 20.")] = None,
    cfg: Annotated[
        float | None, typer.Option(help="Guidance scale; the schedule's own if not given, else 1.5.")
    ] = None,
    reuse: Annotated[
        str | None, typer.Option(help="Run its mask under another rule: plain, taylor.", show_default="its own")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="How many; even shares of the classes.", show_default="500")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the noise; sample i is the same for every schedule.", show_default="0")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Real pictures, a folder or npz, or ADM's npz of statistics: FID, sFID, IS, ...")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe or a YAML file: its solver, guidance and metrics.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Cut and scale a folder's pictures to this side.")] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception's weights as torch-fidelity has them; fetched if not given.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Pictures only: a line of text for each, for CLIP score.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="A CLIP, a local folder or a hub id; scores a text MODEL too.", show_default=f"pictures: {CLIP}"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare cached samples with uncached ones from the same noise, and both with real images; or judge pictures.

    Example: hcompress eval zoo:fashion-dit --schedule runs/first --samples 2000
    Example: hcompress eval samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    """
    from rich.console import Console
    from rich.progress import Progress

    from hcompress.errors import InputError
    from hcompress.models.loading import is_model
    from hcompress.rundir import schedule_for

    pictures = Path(model).exists() and not is_model(model)
    given = {"solver": solver, "steps": steps, "cfg": cfg, "samples": samples}
    asked = _asked(recipe) if recipe else {}
    if pictures and prompts is None:
        _refuse({"clip": clip}, "there are no --prompts")
    measured = {"reference": reference, "clip": clip}
    asked |= {name: value for name, value in (given | measured).items() if value is not None}
    reference, clip = asked.get("reference"), asked.get("clip")
    if pictures and (schedule or not (reference or prompts)):
        raise InputError(
            f"{model} is no MODEL, so it should hold pictures, which are judged by --reference REAL, --prompts FILE or "
            "both, and have no schedule; of a run folder pass the MODEL and --schedule"
        )
    if prompts and not pictures:
        raise InputError("--prompts is for finished pictures: generate them, then hcompress eval FOLDER --prompts FILE")
    if pictures:
        nothing = given | {"seed": seed, "reuse": reuse, "dense": dense or None}
        _refuse(nothing, f"{model} holds finished pictures, and none are generated")
    else:
        schedule = schedule_for(model, schedule, dense=dense, on_notice=partial(print, file=sys.stderr))
    if not pictures and schedule is None:
        _refuse({"reuse": reuse}, "it is how a schedule's mask runs, so pass --schedule")
    if reference is None:
        _refuse({"inception": inception} | ({} if pictures else {"size": size}), "there is no --reference")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        judge = _judge(reference, inception, size, device, bars) if reference else None
        if pictures:
            return _pictures(Path(model), judge, clip or CLIP, prompts, size, device, bars, as_json)
        result = _samples(model, schedule, asked, reuse, seed or 0, judge, device, bars)
    columns: dict[str, dict[str, Any]] = {name: result.pop(name) for name in ("uncached", "cached") if name in result}
    if as_json:
        print(json.dumps(columns.get("cached", {}) | {"uncached": columns["uncached"]} | result))
        return
    _print(columns, f"{model}, {result['num_samples']} samples, seed {result['seed']}")


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise InputError where one of these is given, which would do nothing."""
    from hcompress.errors import InputError

    if given := [f"--{name}" for name, value in options.items() if value is not None]:
        raise InputError(f"{', '.join(given)} would do nothing: {why}")


def _asked(recipe: str) -> dict[str, Any]:
    """What a recipe says of samples and their metrics."""
    from hcompress.recipe import MetricsSettings, find, resolve_any

    resolved = resolve_any(find(recipe))
    metrics = resolved.metrics or MetricsSettings()
    asked = {"solver": resolved.solver.name, "steps": resolved.solver.steps, "cfg": resolved.cfg}
    reference = {"reference": Path(metrics.reference)} if metrics.reference else {}
    return asked | {"samples": metrics.samples} | reference | ({"clip": metrics.clip} if metrics.clip else {})


def _samples(
    model: str,
    schedule: Path | None,
    asked: dict[str, Any],
    reuse: str | None,
    seed: int,
    judge: Judge | None,
    device: str,
    bars: Progress,
) -> dict[str, Any]:
    """MODEL's samples, uncached and under the schedule. What is not asked for is the schedule's, or MODEL's own."""
    from hcompress.report.published import ByPrompt, check_judged, judged
    from hcompress.report.quality import evaluate as measure
    from hcompress.report.quality import left_out
    from hcompress.rundir import own_flags
    from hcompress.schedule import Schedule
    from hcompress.setting import open_setting

    samples, loaded = asked.get("samples", 500), Schedule.load(schedule, reuse=reuse) if schedule else None
    own = {"solver.name": "ddim", "solver.steps": 20, "cfg": 1.5} | own_flags(model)
    if loaded:
        own |= loaded.flags
    solver, steps = asked.get("solver", own["solver.name"]), asked.get("steps", own["solver.steps"])
    setting = open_setting(model, solver, steps, asked.get("cfg", own["cfg"]), device=device)
    if loaded:
        loaded.check_fits(setting.adapter.graph, setting.identity)
        loaded = loaded.reusing(reuse, setting.adapter.graph)
    clip = asked.get("clip")
    check_judged(setting, samples, reference=judge is not None, clip=bool(clip))
    judges: list[Judge | ByPrompt] = [judge] if judge else []
    judges += [ByPrompt(clip, device, _show(bars))] if clip else []
    for note in filter(None, (left_out(setting, samples), loaded.fitted_elsewhere(setting.cfg) if loaded else None)):
        print(note, file=sys.stderr)
    tasks = {what: bars.add_task(what, total=samples) for what in ("uncached", *(["cached"] if loaded else []))}
    said = {"model": model, "solver": solver, "steps": steps, "cfg": setting.cfg, "reuse": loaded and loaded.reuse}
    said |= {"order": loaded and loaded.order} | ({"clip": clip} if clip else {})
    return said | measure(
        setting,
        loaded,
        samples,
        seed,
        lambda what, done: bars.update(tasks[what], completed=done),
        lambda made, what: judged(judges, setting, made, what),
    )


def _pictures(
    pictures: Path,
    judge: Judge | None,
    clip: str,
    prompts: Path | None,
    size: int | None,
    device: str,
    bars: Progress,
    as_json: bool,
) -> None:
    from hcompress.report.published import judge_pictures

    show = _show(bars)
    figures = judge_pictures(
        pictures, judge, clip if prompts else None, prompts, size=size, device=device, say=_say(bars), show=show
    )
    bars.stop()
    if as_json:
        print(json.dumps(figures))
        return
    left = f", {figures['left_out']} left out" if figures["left_out"] else ""
    _print({"": figures}, f"{pictures}, {figures['num_samples']} pictures{left}")


def _judge(reference: Path, weights: Path | None, size: int | None, device: str, bars: Progress) -> Judge:
    from hcompress.report.published import Judge

    return Judge(reference, weights, size, device, _say(bars), _show(bars))


def _say(bars: Progress) -> Any:
    return lambda line: bars.console.print(line, highlight=False, soft_wrap=True, markup=False)


def _show(bars: Progress) -> Any:
    """A bar for each thing that is read."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(f"judging {what}", total=total)
        bars.update(tasks[what], completed=done)

    return show


def _print(columns: dict[str, dict[str, Any]], title: str) -> None:
    """A row a metric; the floor is that of the last column."""
    from rich.console import Console
    from rich.table import Table

    last = list(columns.values())[-1]
    floors = any(f"{name}_floor" in last for name in SHOWN)
    table = Table("", *columns, *(["real, same number"] if floors else []), title=title)
    for name in SHOWN:
        values = [column.get(name) for column in columns.values()]
        if any(value is not None for value in values):
            shown = [*values, *([last.get(f"{name}_floor")] if floors else [])]
            table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in shown))
    Console().print(table)
