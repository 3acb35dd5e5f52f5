"""`make demo`: the whole way from a trained model to a served one, with the commands a user would type.

Trains a router for the shipped model, exports it with and without caching, generates with both from the same noise,
measures speed and quality, and writes out/demo/report.html. Every figure on the page is the JSON of a command above it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hcompress.report.curves import save_training_curves
from hcompress.report.page import Picture, Section, write_page
from hcompress.rundir import RunDir

OUT = Path("out/demo")
MODEL, RECIPE, TARGET_CUR = "zoo:fashion-dit", "fashion-dit_ddim20_harmonica", 0.4
LABELS = ",".join(str(index % 10) for index in range(40))
SAMPLES = 500


def hcompress(*arguments: str) -> dict[str, Any]:
    """Run one verb as a user would, with --json; its progress shows on stderr, its figures come back."""
    print(f"\n$ hcompress {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "hcompress.cli.main", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Run the demo."""
    started = time.monotonic()
    run, bundle, dense = (str(OUT / name) for name in ("run", "bundle", "bundle-dense"))
    schedule = f"{run}/schedule.safetensors"
    trained = hcompress("train", MODEL, "--recipe", RECIPE, "--out", run, "--resume")
    hcompress("inspect", schedule, "--png", str(OUT / "heatmap.png"))
    hcompress("export", run, "--onnx", "--out", bundle)
    hcompress("export", run, "--onnx", "--dense", "--out", dense)
    for source, picture in ((dense, "uncached.png"), (bundle, "cached.png")):
        hcompress("generate", source, "--labels", LABELS, "--seed", "0", "--out", str(OUT / picture))
    speed = hcompress("bench", bundle, "--against", dense, "--torch")
    quality = hcompress("eval", MODEL, "--schedule", schedule, "--samples", str(SAMPLES), "--seed", "1")
    save_training_curves(RunDir(Path(run)).records(), OUT / "training.png", TARGET_CUR)
    write_page(
        OUT / "report.html",
        "A cached diffusion transformer, from router to ONNX Runtime",
        f"{MODEL}, DDIM, 20 steps, CFG 1.5: learned with HarmoniCa, frozen, exported, run without torch.",
        sections(trained, speed, quality),
    )
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nCUR {100 * speed['cur']:.1f} %, {speed['speedup']:.2f}x faster "
        f"(efficiency {speed['efficiency']:.2f}), PSNR {quality['psnr_db']:.1f} dB; {minutes:.1f} minutes"
        f"\nopen {OUT / 'report.html'}"
    )


def sections(trained: dict[str, Any], speed: dict[str, Any], quality: dict[str, Any]) -> list[Section]:
    """The page, from what the commands printed."""
    before = quality["uncached"]
    rows = [
        ("", "uncached", "cached", "real images, same number"),
        (
            "latency of 8 samples (ms), ONNX Runtime",
            *(f"{speed[k]:.0f}" for k in ("dense_latency_ms", "latency_ms")),
            "",
        ),
        ("the same in PyTorch", *(f"{speed[k]:.0f}" for k in ("dense_torch_latency_ms", "torch_latency_ms")), ""),
        ("MACs of a sample (millions)", f"{before['macs'] / 1e6:.0f}", f"{quality['macs'] / 1e6:.0f}", ""),
        ("PSNR against uncached (dB)", "", f"{quality['psnr_db']:.1f}", ""),
        ("FD-64", f"{before['fd64']:.2f}", f"{quality['fd64']:.2f}", f"{quality['fd64_floor']:.2f}"),
        ("accuracy of the asked class", f"{before['accuracy']:.3f}", f"{quality['accuracy']:.3f}", ""),
        ("precision", *(f"{v:.3f}" for v in (before["precision"], quality["precision"], quality["precision_floor"]))),
        ("recall", *(f"{v:.3f}" for v in (before["recall"], quality["recall"], quality["recall_floor"]))),
    ]
    verdict = (
        f"{100 * speed['cur']:.1f} % of all branch evaluations are reused (CUR). That saves {speed['mac_ratio']:.2f}x "
        f"of the arithmetic, of which ONNX Runtime delivers {speed['speedup']:.2f}x in time: efficiency "
        f"{speed['efficiency']:.2f}. Against uncached samples from the same noise: PSNR {quality['psnr_db']:.1f} dB, "
        f"SSIM {quality['ssim']:.3f}, over {quality['num_samples']} samples."
    )
    return [
        Section("Result", verdict, rows),
        Section(
            "Samples from the same noise",
            "One column a class. Both pictures come from the exported bundles, seed 0.",
            pictures=[Picture(OUT / f"{name}.png", name, width=520, crisp=True) for name in ("uncached", "cached")],
        ),
        Section(
            "The learned schedule",
            "Rows are model calls, the first at the top; columns are branches. Dark is computed, light is reused.",
            pictures=[Picture(OUT / "heatmap.png", f"CUR {100 * trained['cur']:.1f} %", width=640)],
        ),
        Section(
            "Training",
            f"No images: the router learns on the model's own trajectories. beta ended at {trained['beta']:.2e}.",
            pictures=[Picture(OUT / "training.png", "reuse, loss terms, and the hard schedule's score", width=1080)],
        ),
    ]


if __name__ == "__main__":
    main()
