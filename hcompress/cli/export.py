"""`hcompress export`: a finished run, or a model under a rule, as a bundle that needs no torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcompress.errors import InputError

if TYPE_CHECKING:
    from hcompress.deploy import Decision
    from hcompress_runtime.bundle import Bundle
    from hcompress_runtime.engine_cache import Engines

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def export(
    source: Annotated[str, typer.Argument(help="A finished run folder, or a MODEL.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Bundle to make; an older one there is replaced.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX graphs, which every backend starts from.")] = True,
    dense: Annotated[bool, typer.Option("--dense", help="Without caching, to compare with.")] = False,
    layout: Annotated[str, typer.Option(help="auto, embedded, per-mask or switch; see FORMAT.md.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; norms and softmax stay float32.")
    ] = "float32",
    opset: Annotated[int | None, typer.Option(help="Of ONNX, 18 to 24.", show_default="20; 21 for int4")] = None,
    max_graphs: Annotated[int | None, typer.Option(help="Merge masks, reuse becoming compute, to so many.")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="Refuse what needs more to run, such as 8GB.")] = None,
    batch: Annotated[str, typer.Option(help="Samples at once: 4, or least,best,most. ONNX graphs take any.")] = "1",
    trt: Annotated[bool, typer.Option("--trt", help="Build engines too; rtx needs no GPU to build.")] = False,
    flavor: Annotated[str, typer.Option(help="Of engines: trt, rtx, or auto for what is installed.")] = "auto",
    sm: Annotated[list[int] | None, typer.Option(help="GPU to build for, such as 89; repeat for several.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="MODEL only: a file, random:CUR[:SEED], uniform:CUR or interval:N.")
    ] = None,
    reuse: Annotated[
        str | None, typer.Option(help="Freeze the mask under another rule: plain, taylor.", show_default="its own")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="MODEL only.", show_default="ddim")] = None,
    steps: Annotated[
        int | None, typer.Option(help="MODEL only; those of a schedule in a file.", show_default="20")
    ] = None,
    cfg: Annotated[
        float | None, typer.Option(help="MODEL only; that of a schedule in a file.", show_default="1.5")
    ] = None,
    prove: Annotated[bool, typer.Option("--prove/--no-prove", help="Compare with PyTorch before it counts.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what every layout would take; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Freeze a schedule into step graphs with one weight file, and prove that they give the same samples.

    Example: hcompress export runs/first --trt --flavor rtx --sm 89 --out bundle
    """
    from rich.console import Console

    if out is None and not dry_run:
        raise InputError("export needs --out BUNDLE, the folder to make")
    budget = None if memory_budget is None else _bytes(memory_budget)
    with Console(stderr=True).status(f"loading {source}") as status:
        from hcompress.deploy import check_engine_formats, check_engines, decide, deploy, open_source
        from hcompress_runtime.engine_cache import build_engines, parse_batch

        sizes = parse_batch(batch)
        backend = check_engines(flavor, layout, sm or []) if trt else "ort-cpu"
        setting, frozen = open_source(source, schedule, dense=dense, solver=solver, steps=steps, cfg=cfg, reuse=reuse)
        if trt:
            check_engine_formats(setting, flavor, sm or [])
        decision = decide(
            setting,
            frozen,
            backend=backend,
            layout=layout,
            dtype=dtype,
            batch=sizes[-1],
            max_graphs=max_graphs,
            memory_budget=budget,
            opset=opset,
        )
        if decision.warning:
            print(decision.warning, file=sys.stderr)
        if out is None or dry_run:
            return _print_decision(decision, as_json)
        bundle, errors = deploy(setting, decision, out, dtype=dtype, proven=prove, progress=status.update)
        engines: list[Engines] = []
        if trt:
            said = lambda done, total, what: status.update(f"engine {done + 1} of {total}: {what}")  # noqa: E731
            engines = build_engines(bundle, flavor, sm or (), sizes, said)
    if as_json:
        print(json.dumps(_figures(bundle, decision, errors, engines)))
    else:
        _print_tables(bundle, decision, errors, engines)


def _bytes(text: str) -> int:
    """8000000000 from "8GB"."""
    number = text.rstrip("kMGiB")
    try:
        return int(float(number) * UNITS[text.removeprefix(number)])
    except (ValueError, KeyError, OverflowError) as error:
        raise InputError(f"--memory-budget {text!r} should be a size such as 8GB or 512MiB") from error


def _print_decision(decision: Decision, as_json: bool) -> None:
    """What every layout would take, and which one it will be."""
    if as_json:
        layouts = [asdict(one) | {"device_bytes": one.device_bytes} for one in decision.estimates.values()]
        given_up = decision.macs_given_up
        print(
            json.dumps(
                {"layouts": layouts, "layout": decision.chosen.layout, "why": decision.why}
                | {"macs_given_up": given_up}
            )
        )
        return
    from rich.console import Console
    from rich.table import Table

    heads = ("layout", "graphs", "disk", "memory", "weights", "caches", "scratch", "load (s)")
    table = Table(*heads, title="estimates, MB; memory is what it takes to run: weights, caches, scratch")
    for one in decision.estimates.values():
        sizes = (one.disk_bytes, one.device_bytes, one.weight_bytes, one.cache_bytes, one.scratch_bytes)
        table.add_row(one.layout, str(one.num_graphs), *(f"{size / 1e6:.1f}" for size in sizes), f"{one.build_s:.1f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(decision.why)
    if decision.macs_given_up:
        console.print(f"Merging masks adds {100 * decision.macs_given_up:.1f} % of the schedule's MACs.")


def _figures(bundle: Bundle, decision: Decision, errors: list[float], engines: list[Engines]) -> dict[str, object]:
    return {
        "bundle": str(bundle.path),
        "layout": bundle.layout,
        "cur": bundle.cur,
        "mac_ratio": bundle.mac_ratio,
        "macs_given_up": decision.macs_given_up,
        "num_graphs": len(bundle.weight_bytes),
        "bundle_bytes": bundle.total_bytes(),
        "peak_cache_bytes": bundle.peak_cache_bytes(batch=1),
        "parity": errors,
        "engines": [{"target": str(built.target), **built.figures()} for built in engines],
    }


def _print_tables(bundle: Bundle, decision: Decision, errors: list[float], engines: list[Engines]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("call", "graph", "computes", "reads", "writes", "weights (MB)", "error")
    for call, (step, file) in enumerate(zip(bundle.plan.steps, bundle.graphs, strict=True)):
        counts = (len(names) for names in (step.computes, step.reads, step.writes))
        weights = f"{bundle.weight_bytes[file] / 1e6:.1f}"
        error = f"{errors[call + 1]:.1e}" if errors else "-"
        table.add_row(str(call), Path(file).stem[:8], *map(str, counts), weights, error)
    console.print(table)
    console.print(decision.why)
    if decision.macs_given_up:
        console.print(f"Merging masks adds {100 * decision.macs_given_up:.1f} % of the schedule's MACs.")
    cache = bundle.peak_cache_bytes(batch=1)
    console.print(
        f"{bundle.path}: {len(bundle.weight_bytes)} graphs, {bundle.total_bytes() / 1e6:.1f} MB; "
        f"CUR {100 * bundle.cur:.1f} %, MACs / {bundle.mac_ratio:.2f}; cache {cache / 1e3:.0f} kB a sample at its peak"
    )
    for built in engines:
        sizes = built.figures()
        console.print(
            f"{built.target}: {len(built.files)} engines for batch {','.join(map(str, built.batch))}, "
            f"{sizes['engine_bytes'] / 1e6:.1f} MB in all, the largest {sizes['largest_bytes'] / 1e6:.1f}, "
            f"built in {sizes['seconds']:.1f} s"
        )
