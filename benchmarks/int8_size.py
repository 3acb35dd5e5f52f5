"""What a bundle in 8 bits weighs, against its float32 one, and what the export takes: DiT-XL/2 with random weights.

    python benchmarks/int8_size.py                  # random:DiT-XL-2-256; some minutes, 12 GB of memory

Sizes are of all files that a bundle lists. By default: branches in W8A8, adaLN with 8-bit
weights, embedders and the last layers in float32.
"""

from __future__ import annotations

import argparse
import resource
import shutil
from pathlib import Path
from typing import Any

from int8_speed import CFG, quantized
from shared import described, keep

from hcompress.deploy import decide, deploy
from hcompress.setting import open_setting
from hcompress_runtime.bundle import open_bundle


def main() -> None:
    """Export both, write benchmarks/results/int8_size.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:DiT-XL-2-256")
    parser.add_argument("--formats", nargs="+", default=["w8a8"])
    parser.add_argument("--work", type=Path, default=Path("runs/int8-size"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    setting = open_setting(args.model, "ddim", 20, CFG)
    for format in [*args.formats, "float32"]:
        chosen = setting if format == "float32" else quantized(setting, format, ranges=4.0)
        out = args.work / format
        deploy(chosen, decide(chosen, None, layout="per-mask"), out, proven=False)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[format] = {"bytes": open_bundle(out).total_bytes(), "peak_memory_bytes_so_far": peak}
        shutil.rmtree(out)
    for format in args.formats:
        found[format]["ratio"] = found[format]["bytes"] / found["float32"]["bytes"]
    keep(args.results, "int8_size", described(args, {"bundles": found}))
    for format, row in found.items():
        ratio = f", {row['ratio']:.3f} of float32" if "ratio" in row else ""
        memory = row["peak_memory_bytes_so_far"]
        print(f"{format}: {row['bytes'] / 1e6:.0f} MB{ratio}; peak memory of the exports so far {memory / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
