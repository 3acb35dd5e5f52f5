"""Learned schedules against rules, chance and fewer steps, at equal cost: the quality table of the README.

    python benchmarks/quality.py                    # 3 seeds, 2 000 samples, T = 20 and 10; an hour on 2 threads
    python benchmarks/quality.py --samples 200      # a quick look

Every row is one file under --work, so an interrupted run goes on where it stopped. Routers are trained by the shipped
recipes; seed s trains with seed s and is scored on the noise of seed 100 + s, which no training sees.

learned    HarmoniCa at CUR 40 %
interval   FORA's rule whose CUR is nearest to 40 %, either convention (hcompress.caching.rules)
random     five random masks of the learned schedule's CUR, on the noise of the first seed
fewer      uncached DDIM with as many steps as the learned schedule's MACs pay for, rounded to the nearest step
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from hcompress.setting import Setting

SEEDS, RANDOM_MASKS, CFG, TARGET_CUR = (0, 1, 2), 5, 1.5, 0.4
MODEL = "zoo:fashion-dit"
SHOWN = {"cur": "CUR (%)", "mac_ratio": "MACs /", "psnr_db": "PSNR (dB)", "ssim": "SSIM", "fd64": "FD-64"}
SHOWN |= {"accuracy": "accuracy", "precision": "precision", "recall": "recall"}


def learn(work: Path, steps: int, seed: int) -> None:
    """Train the router of one seed, resuming where an earlier call stopped."""
    from hcompress.recipe import find, resolve
    from hcompress.train import train

    recipe = resolve(find(f"fashion-dit_ddim{steps}_harmonica"), {"seed": seed})
    out = work / f"router-{steps}-{seed}"
    if not (out / "schedule.safetensors").exists():
        train(recipe, out, resume=True)


def masks(work: Path, steps: int) -> dict[str, np.ndarray]:
    """Row name -> bool[T, N]. Needs the trained routers."""
    from hcompress.caching.rules import nearest_interval, random_mask
    from hcompress.schedule import Schedule

    learned = {s: Schedule.load(work / f"router-{steps}-{s}" / "schedule.safetensors") for s in SEEDS}
    branches = len(learned[0].names)
    interval = nearest_interval(steps, branches, TARGET_CUR)
    rows = {f"learned-{s}": schedule.compute for s, schedule in learned.items()}
    rows |= {f"interval-{s}": interval for s in SEEDS}
    rows |= {f"random-{i}": random_mask(steps, branches, cur=learned[0].cur, seed=i) for i in range(RANDOM_MASKS)}
    return rows


def run_exported(work: Path, setting: Setting, name: str, mask: np.ndarray | None, samples: int, seed: int) -> Tensor:
    """Samples of balanced labels from an exported bundle (twice as fast as PyTorch here, and what is deployed)."""
    import torch

    from hcompress.report.quality import balanced_labels
    from hcompress.schedule import Schedule
    from hcompress_export.bundle import export_bundle
    from hcompress_runtime import Runtime

    adapter, folder = setting.adapter, work / f"bundle-{setting.table.num_calls}-{name}"
    if not folder.exists():
        schedule = None if mask is None else Schedule(mask, adapter.graph.names, setting.identity, {"name": name})
        export_bundle(adapter, setting.table, setting.identity, folder, cfg=setting.cfg, schedule=schedule)
    with Runtime(folder, threads=1) as runtime:
        return torch.from_numpy(runtime.generate(balanced_labels(setting, samples), seed, batch=32))


def sample(work: Path, samples: int, steps: int, name: str) -> None:
    """Generate and measure one row, "uncached-0" or "learned-2" or ..., unless its file is there."""
    from hcompress.report.quality import cost, distribution, paired
    from hcompress.setting import open_setting

    file, images = work / f"{samples}-{steps}-{name}.json", work / f"{samples}-{steps}-{name}.npy"
    if file.exists():
        return
    import torch

    kind, number = name.split("-")
    seed = 100 + (SEEDS[0] if kind == "random" else int(number))
    setting = open_setting(MODEL, "ddim", steps, CFG)
    if kind == "uncached":
        drawn = run_exported(work, setting, name, None, samples, seed)
        np.save(images, drawn.numpy())
        figures = distribution(setting, drawn) | cost(setting, np.ones((steps, len(setting.adapter.graph)), bool))
    else:
        if kind == "fewer":
            ratio = setting.adapter.graph.mac_ratio(masks(work, steps)[f"learned-{number}"])
            fewer = open_setting(MODEL, "ddim", round(steps / ratio), CFG)
            drawn = run_exported(work, fewer, f"fewer-{number}", None, samples, seed)
            figures = {"cur": 0.0, "mac_ratio": steps / fewer.table.num_calls, "steps": fewer.table.num_calls}
        else:
            mask = masks(work, steps)[name]
            drawn = run_exported(work, setting, name, mask, samples, seed)
            figures = cost(setting, mask)
        reference = torch.from_numpy(np.load(work / f"{samples}-{steps}-uncached-{seed - 100}.npy"))
        figures |= paired(drawn, reference) | distribution(setting, drawn)
    file.write_text(json.dumps(figures, indent=1))
    print(f"T = {steps}  {name:12} " + "  ".join(f"{k} {figures[k]:.3f}" for k in SHOWN if k in figures), flush=True)


def _call(task: Callable[[], None]) -> None:
    import torch

    torch.set_num_threads(1)
    task()


def summarise(work: Path, samples: int, steps: int) -> dict[str, dict[str, Any]]:
    """Mean and spread (standard deviation) of each kind of row."""
    rows: dict[str, list[dict[str, float]]] = {}
    for file in sorted(work.glob(f"{samples}-{steps}-*.json")):
        rows.setdefault(file.stem.split("-")[2], []).append(json.loads(file.read_text()))
    order = ("uncached", "learned", "interval", "random", "fewer")
    return {
        kind: {
            key: {"mean": statistics.mean(r[key] for r in found), "std": statistics.pstdev(r[key] for r in found)}
            for key in found[0]
        }
        for kind in order
        if (found := rows.get(kind))
    }


def table(summary: dict[str, dict[str, Any]], steps: int) -> list[str]:
    """Markdown."""
    lines = [f"| T = {steps} | " + " | ".join(SHOWN.values()) + " |", "|---" * (1 + len(SHOWN)) + "|"]
    for kind, figures in summary.items():
        cells = []
        for key in SHOWN:
            scale, digits = (100, 1) if key == "cur" else (1, 2 if key in ("psnr_db", "mac_ratio") else 3)
            value = figures.get(key)
            cells.append(f"{scale * value['mean']:.{digits}f} ± {scale * value['std']:.{digits}f}" if value else "")
        label = f"fewer steps ({figures['steps']['mean']:.0f})" if kind == "fewer" else kind
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    floor = summary["uncached"]
    floors = ", ".join(f"{n} {floor[n + '_floor']['mean']:.3f}" for n in ("fd64", "precision", "recall"))
    return [*lines, "", f"Real against real at the same number of samples: {floors}.", ""]


def main() -> None:
    """Train, sample, summarise, write benchmarks/results/quality.{json,md}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 10])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    first = [partial(learn, args.work, steps, seed) for steps in args.steps for seed in SEEDS]
    draw = partial(sample, args.work, args.samples)
    first += [partial(draw, steps, f"uncached-{seed}") for steps in args.steps for seed in SEEDS]
    then = [partial(draw, steps, f"{kind}-{s}") for steps in args.steps for kind in ("learned", "fewer") for s in SEEDS]
    then += [partial(draw, steps, f"interval-{s}") for steps in args.steps for s in SEEDS]
    then += [partial(draw, steps, f"random-{i}") for steps in args.steps for i in range(RANDOM_MASKS)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for stage in (first, then):
            for _ in pool.imap_unordered(_call, stage):
                pass
    from hcompress.rundir import environment

    summaries = {steps: summarise(args.work, args.samples, steps) for steps in args.steps}
    result = {"date": str(date.today()), "samples": args.samples, "environment": environment(), "T": summaries}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
    text = "\n".join(line for steps, summary in summaries.items() for line in table(summary, steps))
    (args.results / "quality.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
