"""`hcompress inspect`: what a schedule, a run, a bundle or a model is made of."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from hcompress.errors import InputError


def inspect(
    subject: Annotated[str, typer.Argument(help="A run folder, a bundle, a schedule file or a MODEL.")],
    png: Annotated[Path | None, typer.Option(help="Write the schedule's heat-map here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print a schedule as a grid, or a model's branches and their MACs.

    Example: hcompress inspect runs/first --png heatmap.png
    """
    path = Path(subject)
    file = path / "schedule.safetensors" if path.is_dir() else path
    if file.name.endswith(".safetensors") and (file.exists() or path.suffix == ".safetensors"):
        _schedule(file, png, as_json)
    elif (path / "manifest.json").exists():
        from hcompress_runtime.bundle import open_bundle

        model = open_bundle(path).manifest["identity"]["model"]
        raise InputError(f"{subject} is a dense bundle, which has no schedule; inspect one that has, or MODEL: {model}")
    elif png:
        raise InputError(f"--png pictures a schedule, and {subject} is none: pass a run, a bundle or a schedule file")
    else:
        _model(subject, as_json)


def _schedule(file: Path, png: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from hcompress.report.heatmap import reuse_line, save_heatmap, terminal_grid
    from hcompress.schedule import Schedule

    schedule = Schedule.load(file)
    if png:
        save_heatmap(schedule, png)
    if as_json:
        described = {"cur": schedule.cur, "method": schedule.method, "identity": asdict(schedule.identity)}
        described |= {"reuse": schedule.reuse, "order": schedule.order, "fallbacks": schedule.fallbacks}
        rows = ["".join("01"[int(flag)] for flag in row) for row in schedule.compute]
        print(json.dumps(described | {"branches": schedule.names, "compute": rows}))
        return
    solver = schedule.identity.solver
    console = Console(highlight=False)
    console.print(
        f"{schedule.identity.model}, {solver.get('class')}, {schedule.num_calls} calls, "
        f"CFG {schedule.identity.cfg}, {schedule.method.get('name', 'imported')}: CUR {100 * schedule.cur:.2f} %, "
        f"{reuse_line(schedule)}"
    )
    console.print(terminal_grid(schedule))


def _model(name: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from hcompress.models.loading import load_model

    adapter = load_model(name).adapter
    graph, plan = adapter.graph, adapter.config().get("quantization")
    if as_json:
        branches = [{"name": b.name, "macs": b.macs, "shape": b.shape} for b in graph.branches]
        described = {"model": name, "branches": branches, "other_macs": graph.other_macs}
        print(json.dumps(described | ({"quantization": plan} if plan else {})))
        return
    total = graph.call_macs
    table = Table("branch", "MMACs", "share", "slot", title=f"{name}: {len(graph)} branches, {total / 1e6:.1f} MMACs")
    for branch in graph.branches:
        slot = " x ".join(map(str, branch.shape))
        table.add_row(branch.name, f"{branch.macs / 1e6:.2f}", f"{100 * branch.macs / total:.1f} %", slot)
    table.add_row("(always computed)", f"{graph.other_macs / 1e6:.2f}", f"{100 * graph.other_macs / total:.1f} %", "")
    Console().print(table)
    if plan:
        kinds = Counter(f"{layer['weight']} / {layer['activation'] or 'float'}" for layer in plan["layers"].values())
        layers = ", ".join(f"{count} layers {kind}" for kind, count in kinds.items())
        solver = plan["solver"]
        print(
            f"{plan['method']['name']}, weights / inputs: {layers}; for {solver['class']} with {solver['steps']} steps"
        )
