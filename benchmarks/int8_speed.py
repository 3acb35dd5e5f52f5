"""What 8 bits and a cache gain together on ONNX Runtime CPU, on a model of 131 M parameters.

    python benchmarks/int8_speed.py                 # random:DiT-B-2-256, 10 steps, CUR 40 %; about ten minutes

One run, contenders in turns, medians: float32 and W8A8 (what `hcompress quantize` makes of it by default: adaLN with
8-bit weights and float32 inputs, embedders and last layers in float32), each dense and under one random mask, in the
layouts that `hcompress export` takes by itself.

composed   speed-up of the cached W8A8 bundle over that of W8A8 alone times that of the cache alone
products   what the profile of the W8A8 bundle says was run; time by operator is of its first call
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from shared import described, generation_ms, keep

from hcompress.deploy import decide, deploy
from hcompress.errors import HcompressError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.quant.build import build
from hcompress.quant.calibration import Walk, observe
from hcompress.quant.selection import select
from hcompress.setting import Setting, open_setting, ruled, with_adapter
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import Bundle, is_bundle, open_bundle
from hcompress_runtime.kernels import OF_FLOATS, OF_INTEGERS, executed, milliseconds

CFG = 1.5


def quantized(setting: Setting, format: str = "w8a8", *, ranges: float | None = None) -> Setting:
    """`setting` in `format`, by the ranges of one sample; `ranges`, if given, for all."""
    adapter = setting.adapter
    selection = select(adapter, format)
    if ranges is None:
        amax = observe(adapter, selection, Walk(setting.table, setting.cfg, samples=1, batch=1)).amax
    else:
        amax = torch.full((1, selection.num_inputs), ranges)
    timesteps = torch.from_numpy(setting.table.timesteps).float()
    adapter = build(adapter, selection, amax, timesteps, {"name": "absmax"})
    return with_adapter(setting, adapter, f"{setting.model.name} {format}")


def bundles(work: Path, model: str, steps: int, cur: float) -> dict[str, Bundle]:
    """The four bundles, exported unless they are there."""
    found, opened = {}, list[Setting]()
    for bits in ("float32", "W8A8"):
        for cached in (False, True):
            out = work / f"{model.partition(':')[2]}-{steps}-{cur:g}-{bits}-{'cached' if cached else 'dense'}"
            if not is_bundle(out):
                if not opened:
                    opened.append(open_setting(model, "ddim", steps, CFG))
                setting = opened[0]
                if bits == "W8A8" and not isinstance(setting.adapter, QuantizedAdapter):
                    setting = opened[0] = quantized(setting)
                schedule = ruled(setting, f"random:{cur}") if cached else None
                deploy(setting, decide(setting, schedule), out, proven=False)
            found[f"{bits}, {'cached' if cached else 'dense'}"] = open_bundle(out)
    return found


def compare(found: dict[str, Bundle], rounds: int, batch: int, threads: int | None) -> dict[str, Any]:
    """Figures of one interleaved run."""
    runtimes = {name: Runtime(bundle, threads=threads) for name, bundle in found.items()}
    latency_ms = {name: float(np.median(ms)) for name, ms in generation_ms(runtimes, batch, rounds).items()}
    for runtime in runtimes.values():
        runtime.close()
    dense = latency_ms["float32, dense"]
    speedup = {name: dense / ms for name, ms in latency_ms.items()}
    composed = speedup["W8A8, cached"] / (speedup["W8A8, dense"] * speedup["float32, cached"])
    return {"latency_ms": latency_ms, "speedup": speedup, "composed": composed}


def main() -> None:
    """Export what is missing, measure, write benchmarks/results/int8_speed.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:DiT-B-2-256")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cur", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/int8"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    try:
        with Console(stderr=True).status("exporting and measuring"):
            found = bundles(args.work, args.model, args.steps, args.cur)
            figures = compare(found, args.rounds, args.batch, args.threads)
            quantized_bundle = found["W8A8, dense"]
            ran = executed(quantized_bundle, threads=args.threads)
            spent_ms = {
                name: milliseconds(found[name], threads=args.threads) for name in ("float32, dense", "W8A8, dense")
            }
    except HcompressError as error:
        raise SystemExit(f"error: {error}") from error
    products = {name: ran[name] for name in (*OF_INTEGERS, *OF_FLOATS) if ran[name]}
    figures |= {"layouts": {name: bundle.layout for name, bundle in found.items()}}
    figures |= {"mac_ratio": found["W8A8, cached"].mac_ratio, "products": products, "first_call_ms": spent_ms}
    result = described(args, figures)
    keep(args.results, "int8_speed", result, table(result))
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    asked = result["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in result["environment"]["packages"].items())
    lines = [
        f"{asked['model']}, {asked['steps']} steps, batch {asked['batch']}, CUR {100 * asked['cur']:.0f} % "
        f"(MACs / {result['mac_ratio']:.2f}); {result['date']}, {packages}.",
        "",
        "| | latency (ms) | speed-up |",
        "|---|---|---|",
    ]
    for name, ms in result["latency_ms"].items():
        lines.append(f"| {name}, `{result['layouts'][name]}` | {ms:.0f} | {result['speedup'][name]:.2f} |")
    products = ", ".join(f"{count} {name}" for name, count in result["products"].items())
    lines += ["", f"Composed: {result['composed']:.2f}. A dense W8A8 call runs {products}.", ""]
    for name, spent in result["first_call_ms"].items():
        most = sorted(spent.items(), key=lambda item: -item[1])[:8]
        lines.append(f"Time of a call, {name}: " + ", ".join(f"{op} {ms:.1f} ms" for op, ms in most) + ".")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
