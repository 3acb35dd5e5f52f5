"""TensorRT-RTX engines built ahead of time, without a GPU: sizes and build times.

    python benchmarks/engines.py                    # zoo:fashion-dit and random:DiT-XL-2-256; about ten minutes

T = 20, random masks of CUR 37.5 %, so 20 distinct graphs of each model, and the solver's update; `per-mask` layout, so
an engine holds kernels and no weights. Each is parsed and built in a process of its own; what is in --work is not built
again. Engine files are packed by gzip; `unpacked` is what a GPU's runtime is given. Nothing here runs one: that takes a
GPU.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

from rich.console import Console
from shared import described, keep

from hcompress.deploy import decide, deploy
from hcompress.setting import open_with
from hcompress_runtime.bundle import WEIGHTS, is_bundle, open_bundle
from hcompress_runtime.engine_cache import build_engines

MODELS = {"zoo:fashion-dit": "float32", "random:DiT-XL-2-256": "float16"}
SCHEDULE, STEPS, BATCH = "random:0.375", 20, 8
HEAD = (
    "| model | target | engines | weights (MB) | engine, mean (MB) | largest (MB) | largest / weights "
    "| unpacked, mean (MB) | mean / weights | build, mean (s) |"
)


def figures(work: Path, model: str, dtype: str, sms: list[int], console: Console) -> list[dict[str, Any]]:
    """A row for each of `sms`; exports the bundle and builds what is missing."""
    out = work / model.partition(":")[2]
    with console.status(f"{model}: exporting") as status:
        if not is_bundle(out):
            setting, schedule = open_with(model, SCHEDULE, "ddim", STEPS, 1.5)
            decision = decide(setting, schedule, backend="rtx", layout="per-mask", dtype=dtype, batch=BATCH)
            deploy(setting, decision, out, dtype=dtype, proven=False)
        bundle = open_bundle(out)
        batch = (BATCH, BATCH, BATCH)
        built = build_engines(
            bundle, "rtx", sms, batch, lambda done, total, what: status.update(f"{model}: {done}/{total} {what}")
        )
    weight_bytes = (out / WEIGHTS).stat().st_size
    rows = []
    for engines in built:
        found, count = engines.figures(), len(engines.files)
        unpacked = sum(len(gzip.decompress(file.read_bytes())) for file in engines.files.values()) / count
        rows.append(
            {"model": f"{model} {dtype}", "target": str(engines.target), "engines": count, "weight_bytes": weight_bytes}
            | {"mean_bytes": found["engine_bytes"] / count, "largest_bytes": found["largest_bytes"]}
            | {"share": found["largest_bytes"] / weight_bytes, "unpacked_bytes": unpacked}
            | {"unpacked_share": unpacked / weight_bytes, "mean_seconds": found["seconds"] / count}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for row in rows:
        sizes = [f"{row[key] / 1e6:.2f}" for key in ("weight_bytes", "mean_bytes", "largest_bytes")]
        cells = [row["model"], row["target"], str(row["engines"]), *sizes]
        cells += [
            f"{100 * row['share']:.2f} %",
            f"{row['unpacked_bytes'] / 1e6:.2f}",
            f"{100 * row['unpacked_share']:.2f} %",
        ]
        lines.append("| " + " | ".join([*cells, f"{row['mean_seconds']:.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export, build, write benchmarks/results/engines.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[89, 120])
    parser.add_argument("--model", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--work", type=Path, default=Path("runs/engines"), help="keeps 1.5 GB")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    console = Console(stderr=True)
    rows = [row for model in args.model for row in figures(args.work, model, MODELS[model], args.sm, console)]
    keep(args.results, "engines", described(args, {"rows": rows}), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
