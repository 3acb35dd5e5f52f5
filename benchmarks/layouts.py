"""What each layout of a bundle costs on ONNX Runtime CPU, on a model of 131 M parameters: speed, memory, efficiency.

    python benchmarks/layouts.py                    # random:DiT-B-2-256, 1 and 4 samples; 15 minutes

Every mask is random, so that all steps differ and no layout gains from equal ones. One run, contenders in turns:

dense              one graph that computes everything: what speed-up and memory are relative to
switch             one graph for all steps, weights packed once
per-mask           a graph for each step, weights as inputs: nothing packed
embedded, shared   a graph for each step over the pages of one file: nothing packed
embedded, private  the same, each session with a packed copy of its weights

efficiency = speed-up over the ratio of MACs; memory is PSS after loading and one generation in a fresh process.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from shared import described, generation_ms, keep

from hcompress.deploy import decide, deploy
from hcompress.errors import HcompressError
from hcompress.setting import open_setting, open_with
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import is_bundle
from hcompress_runtime.measure import peak_memory_bytes

SHOWN = {"latency_ms": 0, "speedup": 2, "mac_ratio": 2, "efficiency": 3, "memory_ratio": 2}


def bundle(work: Path, model: str, steps: int, cur: float, layout: str) -> Path:
    """The bundle of one row, made unless it is there; a CUR of 0 is the dense model."""
    out = work / f"{model.partition(':')[2]}-{steps}-{cur:g}-{layout}"
    if not is_bundle(out):
        if cur:
            setting, schedule = open_with(model, f"random:{cur}", "ddim", steps, 1.5)
        else:
            setting, schedule = open_setting(model, "ddim", steps, 1.5), None
        deploy(setting, decide(setting, schedule, layout=layout), out, proven=False)
    return out


def compare(work: Path, model: str, steps: int, cur: float, rounds: int, batch: int) -> dict[str, dict[str, Any]]:
    """Figures of every contender at one CUR."""
    layouts = {layout: bundle(work, model, steps, cur, layout) for layout in ("switch", "per-mask", "embedded")}
    rows = {
        "dense": (bundle(work, model, steps, 0, "embedded"), True),
        "switch": (layouts["switch"], True),
        "per-mask": (layouts["per-mask"], False),
        "embedded, shared": (layouts["embedded"], False),
        "embedded, private": (layouts["embedded"], True),
    }
    # Before any is open here: a page that two processes hold counts half in each.
    memory = {name: peak_memory_bytes(path, batch, prepack=prepack) for name, (path, prepack) in rows.items()}
    runtimes = {name: Runtime(path, prepack=prepack) for name, (path, prepack) in rows.items()}
    latency_ms = {name: float(np.median(ms)) for name, ms in generation_ms(runtimes, batch, rounds).items()}
    for runtime in runtimes.values():
        runtime.close()
    figures = {}
    for name, runtime in runtimes.items():
        speedup, mac_ratio = latency_ms["dense"] / latency_ms[name], runtime.bundle.mac_ratio
        figures[name] = {
            "latency_ms": latency_ms[name],
            "speedup": speedup,
            "mac_ratio": mac_ratio,
            "efficiency": speedup / mac_ratio,
            "memory_bytes": memory[name],
            "memory_ratio": (memory[name] or 0) / (memory["dense"] or 1),
        }
    return figures


def table(title: str, figures: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| {title} | " + " | ".join(SHOWN) + " |", "|---" * (1 + len(SHOWN)) + "|"]
    for name, row in figures.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:.{digits}f}" for key, digits in SHOWN.items()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export what is missing, measure, write benchmarks/results/layouts.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:DiT-B-2-256")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cur", type=float, nargs="+", default=[0.25, 0.4, 0.55])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="samples at once")
    parser.add_argument("--work", type=Path, default=Path("runs/layouts"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    found = {}
    try:
        for batch, cur in product(args.batch, args.cur):
            title = f"batch {batch}, CUR {100 * cur:.0f} %"
            with Console(stderr=True).status(title):
                found[title] = compare(args.work, args.model, args.steps, cur, args.rounds, batch)
            print(table(title, found[title]), flush=True)
    except HcompressError as error:
        raise SystemExit(f"error: {error}") from error
    markdown = "\n".join(table(title, rows) for title, rows in found.items())
    keep(args.results, "layouts", described(args, {"tables": found}), markdown)


if __name__ == "__main__":
    main()
