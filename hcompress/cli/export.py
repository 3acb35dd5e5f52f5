"""`hcompress export`: a finished run as a bundle that needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hcompress_runtime.bundle import Bundle


def export(
    run: Annotated[Path, typer.Argument(help="A finished run folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Bundle to make; an older bundle there is replaced.", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="As ONNX graphs; the only format yet.")] = True,
    dense: Annotated[bool, typer.Option("--dense", help="Without caching, to compare with.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Freeze a schedule into step graphs with one weight file, and prove that they give the same samples.

    Example: hcompress export runs/first --onnx --out bundle
    """
    from rich.console import Console

    with Console(stderr=True).status(f"loading {run}") as status:
        from hcompress.setting import open_finished
        from hcompress_export.bundle import export_bundle
        from hcompress_export.parity import prove

        setting, schedule = open_finished(run)
        frozen = None if dense else schedule
        errors: list[float] = []

        def inspect(folder: Path) -> None:
            status.update("comparing with PyTorch")
            errors.extend(prove(setting.adapter, folder, frozen.compute if frozen else None).tolist())

        status.update("tracing, cutting, writing")
        bundle = export_bundle(
            setting.adapter, setting.table, setting.identity, out, cfg=setting.cfg, schedule=frozen, inspect=inspect
        )
    if as_json:
        print(json.dumps(_figures(bundle, errors)))
    else:
        _print_tables(bundle, errors)


def _figures(bundle: Bundle, errors: list[float]) -> dict[str, object]:
    return {
        "bundle": str(bundle.path),
        "cur": bundle.cur,
        "mac_ratio": bundle.mac_ratio,
        "num_graphs": len(bundle.weight_bytes),
        "bundle_bytes": bundle.total_bytes(),
        "peak_cache_bytes": bundle.peak_cache_bytes(batch=1),
        "parity": errors,
    }


def _print_tables(bundle: Bundle, errors: list[float]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("call", "graph", "computes", "reads", "writes", "weights (MB)", "error")
    for call, (step, file) in enumerate(zip(bundle.plan.steps, bundle.graphs, strict=True)):
        counts = (len(names) for names in (step.computes, step.reads, step.writes))
        weights = f"{bundle.weight_bytes[file] / 1e6:.1f}"
        table.add_row(str(call), Path(file).stem[:8], *map(str, counts), weights, f"{errors[call + 1]:.1e}")
    console.print(table)
    cache = bundle.peak_cache_bytes(batch=1)
    console.print(
        f"{bundle.path}: {len(bundle.weight_bytes)} graphs, {bundle.total_bytes() / 1e6:.1f} MB; "
        f"CUR {100 * bundle.cur:.1f} %, MACs / {bundle.mac_ratio:.2f}; cache {cache / 1e3:.0f} kB a sample at its peak"
    )
