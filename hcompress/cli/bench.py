"""`hcompress bench`: what caching saves in time, against what it saves in arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable


def bench(
    bundle: Annotated[Path, typer.Argument(help="A cached bundle; with --train a MODEL.", show_default=False)],
    against: Annotated[Path | None, typer.Option(help="Its uncached bundle; BUNDLE-dense if not given.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples that run at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each runs; medians are taken.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; bundles with engines also trt or rtx.")] = "cpu",
    torch: Annotated[bool, typer.Option("--torch", help="PyTorch too, with and without the schedule.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Time an iteration of training instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Time a cached bundle against its uncached one, in turns.

    Efficiency is the speed-up over the ratio of MACs. Memory is what a fresh process takes to load a bundle and
    generate one batch: its proportional set size (PSS), which counts shared pages once, read after every call, and
    before this process opens a bundle itself.

    With --train: a training iteration with frozen model and teacher against the released code's way, which computes
    and discards the gradients of all weights.

    Example: hcompress bench bundle --against bundle-dense --batch 8
    """
    if train:
        return _bench_training(str(bundle), batch, rounds, as_json)
    from rich.console import Console
    from rich.progress import Progress

    from hcompress.report.latency import compare_bundles

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rounds", total=rounds)
        figures = compare_bundles(
            bundle,
            against or bundle.with_name(f"{bundle.name}-dense"),
            batch=batch,
            rounds=rounds,
            threads=threads,
            provider=device,
            with_torch=torch,
            progress=lambda done: bar.update(task, completed=done),
        )
    if as_json:
        print(json.dumps(figures))
    else:
        _print_table(figures)


def _bench_training(model: str, batch: int, rounds: int, as_json: bool) -> None:
    from hcompress.recipe import resolve
    from hcompress.report.training_cost import training_cost

    recipe = resolve(None, {"model": model, "caching.target_cur": 0.4, "caching.batch": batch})
    figures = training_cost(recipe, iterations=rounds)
    if as_json:
        print(json.dumps(figures))
        return
    for name in ("unfrozen", "frozen"):
        found = figures[name]
        print(f"{name:9} {found['iteration_ms']:8.1f} ms an iteration, {found['peak_memory_bytes'] / 1e6:8.1f} MB peak")
    print(f"frozen is {figures['speedup']:.2f}x faster and takes {figures['memory_ratio']:.2f}x the memory")


def _print_table(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    show: Callable[[float | None, float], str] = lambda x, unit: "-" if x is None else f"{x / unit:.1f}"  # noqa: E731
    table = Table("", "uncached", "cached", title=f"batch {figures['batch']}, median of {figures['rounds']} rounds")
    for name, key, unit in (
        ("ONNX Runtime, latency of a batch (ms)", "latency_ms", 1),
        ("PyTorch, latency of a batch (ms)", "torch_latency_ms", 1),
        ("peak memory (MB, PSS)", "peak_memory_bytes", 1e6),
    ):
        if key in figures:
            table.add_row(name, show(figures[f"dense_{key}"], unit), show(figures[key], unit))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"speed-up {figures['speedup']:.2f} at CUR {100 * figures['cur']:.1f} %; "
        f"MACs allow {figures['mac_ratio']:.2f}: efficiency {figures['efficiency']:.2f}"
    )
