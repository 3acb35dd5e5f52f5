"""What corrected reuse costs at run time, on ONNX Runtime CPU and a model of 131 M parameters: efficiency beside plain.

    python benchmarks/reuse_speed.py                # random:DiT-B-2-256, CUR 25, 40 and 55 %; about ten minutes

All rows of a table have one random mask, so that all steps differ, and are measured in turns:

plain       a reused branch yields what it computed last
no p        corrected by gain and offset, which needs no second slot
taylor      differences of order 1: two slots, a number for each call and branch
corrected   all three vectors wherever two values are known

efficiency = speed-up over the ratio of MACs, both relative to the dense model; points are lost against plain, with the
middle half of the rounds in brackets. Vectors are random: what they hold changes nothing here. On a machine that is
never quiet, --cpu measures the processor's time with one thread in place of everybody's with all.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from shared import described, generation_ms, keep

from hcompress.corrections import Corrections, history, taylor
from hcompress.errors import HcompressError
from hcompress.schedule import Schedule
from hcompress.setting import Setting, open_with
from hcompress_export.bundle import export_bundle
from hcompress_export.trace import trace
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import Bundle, is_bundle, open_bundle


def fitted(compute: NDArray[np.bool_], widths: tuple[int, ...], *, older: bool) -> Corrections:
    """Vectors for whatever is reused, d wherever there is a p and `older` asks for it."""
    rng = np.random.default_rng(0)

    def term(where: NDArray[np.bool_]) -> tuple[NDArray[np.float32], ...]:
        return tuple(
            rng.uniform(-0.1, 0.1, (len(compute), width)).astype(np.float32) * where[:, [n]]
            for n, width in enumerate(widths)
        )

    nowhere = np.zeros_like(compute)
    return Corrections("corrected", term(~compute), term(history(compute) & older), term(~compute), term(nowhere))


def variants(schedule: Schedule, widths: tuple[int, ...]) -> dict[str, Schedule | None]:
    """What is measured, all with the mask of `schedule`."""
    compute = schedule.compute
    rules = {
        "plain": None,
        "no p": fitted(compute, widths, older=False),
        "taylor": taylor(compute, widths),
        "corrected": fitted(compute, widths, older=True),
    }
    return {"dense": None} | {name: replace(schedule, corrections=rule) for name, rule in rules.items()}


def compare(
    work: Path, setting: Setting, schedule: Schedule, layout: str, rounds: int, batch: int, cpu: bool
) -> dict[str, Any]:
    """Figures of every variant."""
    adapter, traced = setting.adapter, None
    bundles: dict[str, Bundle] = {}
    for name, variant in variants(schedule, adapter.graph.widths).items():
        model = setting.identity.model.partition(":")[2]
        out = work / f"{model}-{len(schedule.compute)}-{schedule.cur:.3f}-{layout}-{name.replace(' ', '-')}"
        if is_bundle(out):
            bundles[name] = open_bundle(out)
            continue
        traced = traced or trace(adapter, setting.cfg)
        bundles[name] = export_bundle(
            adapter,
            setting.table,
            setting.identity,
            out,
            cfg=setting.cfg,
            schedule=variant,
            layout=layout,
            traced=traced,
        )
    threads, clock = (1, time.process_time) if cpu else (None, time.perf_counter)
    with ExitStack() as stack:
        runtimes = {name: stack.enter_context(Runtime(bundle, threads=threads)) for name, bundle in bundles.items()}
        latency_ms = generation_ms(runtimes, batch, rounds, clock)
    ratio = bundles["plain"].mac_ratio
    efficiency = {name: latency_ms["dense"] / ms / ratio for name, ms in latency_ms.items() if name != "dense"}
    return {
        name: {
            "latency_ms": float(np.median(latency_ms[name])),
            "efficiency": float(np.median(latency_ms["dense"]) / np.median(latency_ms[name]) / ratio),
            "points_lost": np.quantile(100 * (efficiency["plain"] - each), [0.25, 0.5, 0.75]).tolist(),
            "graphs": len(bundles[name].weight_bytes),
            "cache_bytes": bundles[name].peak_cache_bytes(batch),
            "bundle_bytes": bundles[name].total_bytes(),
        }
        for name, each in efficiency.items()
    }


def table(cur: float, figures: dict[str, Any]) -> str:
    """Markdown."""
    heads = (
        f"CUR {100 * cur:.0f} %",
        "latency (ms)",
        "efficiency",
        "points lost",
        "graphs",
        "caches (MB)",
        "bundle (MB)",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in figures.items():
        low, middle, high = row["points_lost"]
        sizes = f"{row['cache_bytes'] / 1e6:.1f} | {row['bundle_bytes'] / 1e6:.1f}"
        points = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        lines.append(
            f"| {name} | {row['latency_ms']:.0f} | {row['efficiency']:.3f} | {points} | {row['graphs']} | {sizes} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export what is missing, measure, write benchmarks/results/reuse_speed.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:DiT-B-2-256")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cur", type=float, nargs="+", default=[0.25, 0.4, 0.55])
    parser.add_argument("--layout", default="per-mask")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/reuse_speed"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    found = {}
    try:
        for cur in args.cur:
            with Console(stderr=True).status(f"CUR {100 * cur:.0f} %"):
                setting, schedule = open_with(args.model, f"random:{cur}", "ddim", args.steps, 1.5)
                options = (args.layout, args.rounds, args.batch, args.cpu)
                found[cur] = compare(args.work, setting, schedule, *options)
            print(table(cur, found[cur]), flush=True)
    except HcompressError as error:
        raise SystemExit(f"error: {error}") from error
    markdown = "\n".join(table(cur, rows) for cur, rows in found.items())
    keep(args.results, "reuse_speed", described(args, {"cur": found}), markdown)


if __name__ == "__main__":
    main()
