"""Few bits, alone and together with reuse: the quality table of quantization.

    python benchmarks/quantized.py                  # zoo:fashion-dit, 3 seeds, 400 samples: two hours on one thread
    python benchmarks/quantized.py --recipe fashion-uvit_dpmsolver20_harmonica --seeds 0

Every row is one file under --work, written when it is finished, and training is resumed: an interrupted run goes on
where it stopped. Seeds are the outer loop, and the tables are written anew after each, so an unfinished run has whole
ones. Training of seed s uses seed s; all is scored on the noise of seed 100 + s, which no training sees, and against
the float model's uncached samples from the same noise.

ptq        int8-max at W8A8, W4A8 and W4A4, ptq4dit, fp8, by the settings that ship
distilled  efficientdm by the shipped recipe, and its settings at other formats
cached     HarmoniCa by --recipe, which says model, solver and guidance of all rows too; the quantized model that was
           distilled uncached under that router's schedule; and `--with-cache`: distilled under it, and under the
           schedule that it ended with
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from shared import described, keep, quality_lines

from hcompress.report.comparison import COLUMNS, FLOOR, REAL

if TYPE_CHECKING:
    from torch import Tensor

    from hcompress.quantize import Quantized
    from hcompress.recipe import Recipe
    from hcompress.schedule import Schedule
    from hcompress.setting import Setting

RECIPE, SEEDS = "fashion-dit_ddim20_harmonica", (0, 1, 2)
PTQ = {  # row: (method, format)
    "int8-max w8a8": ("int8-max", "w8a8"),
    "ptq4dit w8a8": ("ptq4dit", "w8a8"),
    "fp8": ("fp8", "fp8"),
    "int8-max w4a8": ("int8-max", "w4a8"),
    "int8-max w4a4": ("int8-max", "w4a4"),
}
DISTILLED, TOGETHER = ("w8a8", "w4a8", "w4a4"), ("w8a8", "w4a8")
UNSHOWN = ("mac_ratio", "relative_l2", "latency_ms", "speedup")


def quantize_as(work: Path, like: Recipe, seed: int, name: str, **quant: Any) -> Quantized:
    """The result of `hcompress quantize` with these settings on the model of `like`, resumed or reopened."""
    from hcompress.quantize import quantize
    from hcompress.recipe import find, resolve_quant

    learned = "w8a8" if quant["format"] == "w8a8" else "w4a8"
    recipe = find(f"fashion-dit_ddim20_efficientdm-{learned}") if quant["method"] == "efficientdm" else None
    flags = {"model": like.model, "solver.name": like.solver.name, "solver.steps": like.solver.steps, "cfg": like.cfg}
    flags |= {"seed": seed} | {f"quant.{key}": value for key, value in quant.items()}
    return quantize(resolve_quant(recipe, flags), work / f"{name}-{seed}".replace(" ", "-"), resume=True)


class Rows:
    """The rows of one seed, each measured once."""

    def __init__(self, work: Path, like: Recipe, samples: int, seed: int) -> None:
        from hcompress.setting import open_setting

        self.work, self.samples, self.seed = work, samples, seed
        self.dense: Setting = open_setting(like.model, like.solver.name, like.solver.steps, like.cfg)
        self.images = work / f"{samples}-float-{seed}.npy"
        self.measure("float", lambda: (self.dense, None))

    def measure(self, name: str, made: Callable[[], tuple[Setting, np.ndarray | None]]) -> None:
        """Generate and measure row `name`, unless its file is there; `made` gives its setting and mask."""
        file = self.work / f"{self.samples}-{self.seed}-{name}.json"
        if file.exists():
            return
        from hcompress.lowbit.artefact import network_bytes
        from hcompress.report.quality import cost, distribution, generate, paired

        begun = time.monotonic()
        setting, mask = made()
        everything = np.ones((setting.table.num_calls, len(setting.adapter.graph)), bool)
        drawn = generate(setting, self.samples, 100 + self.seed, mask)
        figures = distribution(setting, drawn) | cost(setting, everything if mask is None else mask)
        figures["megabytes"] = network_bytes(setting.adapter) / 1e6
        if name == "float":
            np.save(self.images, drawn.numpy())
        else:
            figures |= paired(setting, drawn, self.reference())
        figures["seconds"] = time.monotonic() - begun
        file.write_text(json.dumps(figures, indent=1))
        shown = "  ".join(f"{key} {figures[key]:.3f}" for key in COLUMNS if key in figures)
        print(f"seed {self.seed}  {name:44} {shown}", flush=True)

    def reference(self) -> Tensor:
        """The float model's uncached samples."""
        import torch

        return torch.from_numpy(np.load(self.images))


def run_seed(work: Path, routers: Path, recipe: Path, samples: int, seed: int) -> None:
    """All rows of one seed."""
    from hcompress.recipe import resolve
    from hcompress.schedule import Schedule
    from hcompress.train import train

    like = resolve(recipe, {"seed": seed})
    rows, made_as = Rows(work, like, samples, seed), partial(quantize_as, work, like, seed)
    for name, (method, format) in PTQ.items():
        rows.measure(name, lambda n=name, m=method, f=format: (made_as(n, method=m, format=f).quantized, None))
    run = routers / f"router-{like.solver.steps}-{seed}"
    file = run / "schedule.safetensors"
    if not file.exists():
        train(like, run, resume=True)
    given: Schedule = Schedule.load(file)
    rows.measure("cached float", lambda: (rows.dense, given.compute))
    for format in DISTILLED:

        def uncached(format: str = format) -> Setting:
            return made_as(f"efficientdm {format}", method="efficientdm", format=format).quantized

        rows.measure(f"efficientdm {format}", lambda made=uncached: (made(), None))
        if format not in TOGETHER:
            continue
        rows.measure(f"efficientdm {format}, float's schedule", lambda made=uncached: (made(), given.compute))

        def together(format: str = format) -> Quantized:
            return made_as(f"with-cache {format}", method="efficientdm", format=format, with_cache=str(file))

        def under_given(made: Callable[[], Quantized] = together) -> tuple[Setting, np.ndarray]:
            first = made().first
            assert first is not None
            return first, given.compute

        def under_own(made: Callable[[], Quantized] = together) -> tuple[Setting, np.ndarray]:
            result = made()
            assert result.schedule is not None
            return result.quantized, result.schedule.compute

        rows.measure(f"with-cache {format}, float's schedule", under_given)
        rows.measure(f"with-cache {format}, its own schedule", under_own)


def order() -> list[str]:
    """Row names as the table has them."""
    names = ["float", *PTQ]
    for format in DISTILLED:
        at = max((i for i, name in enumerate(names) if name.endswith(format)), default=len(names) - 1)
        names.insert(at + 1, f"efficientdm {format}")
    names.append("cached float")
    for format in TOGETHER:
        names += [f"efficientdm {format}, float's schedule", f"with-cache {format}, float's schedule"]
        names += [f"with-cache {format}, its own schedule"]
    return names


def summarise(work: Path, samples: int, seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation (n - 1) over seeds of each row that is there."""
    from hcompress.report.comparison import spread

    summary: dict[str, dict[str, Any]] = {}
    for name in order():
        files = [file for seed in seeds if (file := work / f"{samples}-{seed}-{name}.json").exists()]
        found = [json.loads(file.read_text()) for file in files]
        if found:
            summary[name] = spread(found) | {"seeds": len(found)}
    return summary


def table(summary: dict[str, dict[str, Any]], like: Recipe, samples: int, seeds: int) -> str:
    """Markdown."""
    title = f"{like.model}, {like.solver.name}, {like.solver.steps} steps, {samples} samples a seed"
    rows = {
        name if row["seeds"] == seeds else f"{name} ({row['seeds']} of {seeds} seeds)": row
        for name, row in summary.items()
    }
    floors = {key.removesuffix(FLOOR): figure for key, figure in summary["float"].items() if key.endswith(FLOOR)}
    said = "± is the sample standard deviation (n - 1) over seeds."
    return "\n".join([*quality_lines(title, rows | {REAL: floors}, UNSHOWN), "", said, ""])


def main() -> None:
    """Quantize, sample, summarise, write benchmarks/results/quantized_MODEL.{json,md} after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=RECIPE, help="of HarmoniCa; its model, solver and guidance are taken")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=None, help="default: runs/quantized-MODEL")
    parser.add_argument(
        "--routers", type=Path, default=None, help="of HarmoniCa, trained where absent; default: --work"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    from hcompress.recipe import find, resolve

    recipe = find(args.recipe)
    like = resolve(recipe)
    name = like.model.removeprefix("zoo:")
    work = args.work or Path("runs") / f"quantized-{name}"
    work.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        run_seed(work, args.routers or work, recipe, args.samples, seed)
        summary = summarise(work, args.samples, args.seeds)
        lines = table(summary, like, args.samples, len(args.seeds))
        keep(args.results, f"quantized_{name}", described(args, {"rows": summary}), lines)
        print(lines, flush=True)


if __name__ == "__main__":
    main()
