"""Exports of published architectures at full size: peak memory, time, and bytes of the bundle against its weights.

    python benchmarks/full_size.py                  # DiT-XL/2 and PixArt-XL/2, float16 and float32; ten minutes

T = 20, random masks of CUR 37.5 %, so 20 distinct graphs; `per-mask` layout; random weights, so nothing is compared
with PyTorch. Each export is a process of its own, whose peak memory (resident, all pages) the kernel reports when it
ends. A bundle is deleted once it is measured. Results are written after each export; what is in them is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from hcompress.deploy import decide, deploy
from hcompress.errors import HcompressError
from hcompress.rundir import environment
from hcompress.setting import open_with

MODELS = ["DiT-XL-2-256", "DiT-XL-2-512", "PixArt-XL-2-256", "PixArt-XL-2-512", "PixArt-XL-2-1024"]
DTYPES = ["float16", "float32"]
SCHEDULE, STEPS, CFG = "random:0.375", 20, 1.5
LIMITS = {"peak_memory_bytes": 12e9, "seconds": 15 * 60, "ratio": 1.02, "graph_bytes": 1e6}
COLUMNS = ["model", "weights (MB)", "graphs", "largest (MB)", "the rest (MB)", "rest / weights", "peak memory (GB)"]
COLUMNS += ["time (s)"]


def export(model: str, dtype: str, out: Path) -> dict[str, Any]:
    """Bytes of the bundle of `model` at `out`, and of the parameters of the model, each once."""
    setting, schedule = open_with(model, SCHEDULE, "ddim", STEPS, CFG)
    decision = decide(setting, schedule, layout="per-mask", dtype=dtype)
    bundle, _ = deploy(setting, decision, out, dtype=dtype, proven=False)
    graphs = [(bundle.path / file).stat().st_size for file in bundle.weight_bytes]
    parameters = list(setting.adapter.parameters())
    found = {"parameters": sum(each.numel() for each in parameters), "weight_bytes": sum(p.nbytes for p in parameters)}
    rest_bytes = bundle.total_bytes() - sum(graphs)
    return found | {"graphs": len(graphs), "graph_bytes": max(graphs), "rest_bytes": rest_bytes}


def measure(model: str, dtype: str, folder: Path) -> dict[str, Any]:
    """`export` in a process of its own, with what it took. Raises HcompressError where it fails."""
    out = folder / "bundle"
    shutil.rmtree(out, ignore_errors=True)
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as answer:
        child = subprocess.Popen([sys.executable, __file__, "--one", model, dtype, str(out)], stdout=answer)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - begin
        answer.seek(0)
        text = answer.read()
    shutil.rmtree(out, ignore_errors=True)
    if child.returncode:
        raise HcompressError(f"exporting {model} at {dtype} failed with exit code {child.returncode}")
    found = {"model": model, "dtype": dtype, **json.loads(text)}
    found |= {"ratio": found["rest_bytes"] / found["weight_bytes"]}
    return found | {"peak_memory_bytes": 1024 * used.ru_maxrss, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = [f"{row['model']} {row['dtype']}", f"{row['weight_bytes'] / 1e6:.1f}", str(row["graphs"])]
        cells += [f"{row['graph_bytes'] / 1e6:.2f}", f"{row['rest_bytes'] / 1e6:.1f}", f"{row['ratio']:.4f}"]
        cells += [f"{row['peak_memory_bytes'] / 1e9:.1f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export what is not in the results yet, write benchmarks/results/full_size.{json,md}; exit 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[f"random:{name}" for name in MODELS])
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--work", type=Path, default=Path("runs/full_size"), help="for one bundle at a time")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--again", action="store_true", help="measure anew what is in the results")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "DTYPE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        model, dtype, out = args.one
        print(json.dumps(export(model, dtype, Path(out))))
        return
    file = args.results / "full_size.json"
    done = json.loads(file.read_text())["rows"] if file.exists() and not args.again else []
    rows = {(row["model"], row["dtype"]): row for row in done}
    args.results.mkdir(parents=True, exist_ok=True)
    for model, dtype in [(model, dtype) for model in args.model for dtype in args.dtype]:
        if (model, dtype) in rows:
            continue
        try:
            with Console(stderr=True).status(f"{model} {dtype}"):
                rows[model, dtype] = measure(model, dtype, args.work)
        except HcompressError as error:
            raise SystemExit(f"error: {error}") from error
        result = {"date": str(date.today()), "environment": environment(), "limits": LIMITS, "rows": [*rows.values()]}
        file.write_text(json.dumps(result, indent=1) + "\n")
    (args.results / "full_size.md").write_text(table([*rows.values()]))
    print(table([*rows.values()]))
    over = [
        f"{model} {dtype}: {key} {row[key]:g} is over {limit:g}"
        for (model, dtype), row in rows.items()
        for key, limit in LIMITS.items()
        if row[key] > limit
    ]
    if over:
        raise SystemExit("\n".join(over))


if __name__ == "__main__":
    main()
