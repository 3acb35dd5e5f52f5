"""What a reused branch should yield: quality against MACs under plain, Taylor and corrected reuse.

    python benchmarks/corrected.py zoo:fashion-dit                                  # 3 seeds, T = 10, 20 and 50: a day
    python benchmarks/corrected.py zoo:fashion-dit --steps 20 --rows 'interval-*' 'fewer-*'          # minutes

Every row is one file under --work, so an interrupted run goes on where it stopped. Seed s trains and fits with seed s
and is scored on the noise of seed 100 + s, which no fit sees. A setting is that of the model's shipped 20-step recipe.

learned-RULE    HarmoniCa, its router trained under plain reuse or under corrected reuse, at each of --curs
after-RULE      the plain router's schedule, run under Taylor's rule or with corrections fitted to it afterwards
interval-RULE   every n-th call computes everything, n = 2, 3, 4: FORA, TaylorSeer, corrected
countdown-RULE  the same counted from the last call, as FORA's code does; a solver of several stages asks which it is
fewer           uncached, with fewer steps

A RULE is plain, taylor or corrected, the last two also with a 2 for order 2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from shared import described, keep, quality_lines

if TYPE_CHECKING:
    from hcompress.recipe import Recipe

RULES, INTERVALS = ("plain", "taylor", "corrected"), (2, 3, 4)
CONVENTIONS = {"interval": "alternate", "countdown": "countdown"}
ORDER_2 = ("taylor2", "corrected2")
SAVED = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)  # of fewer steps, dense steps over theirs
MARKERS = {"interval": "o-", "countdown": "s-", "learned": "^-", "after": "^-", "fewer": "x--"}  # of a plot
UNSHOWN = ("relative_l2", "class_score")
CLASSES = 10  # columns of a picture
PICTURED = ("after-{}-40", "interval-{}-2", "interval-{}-3", "interval-{}-4")


def recipe_of(model: str, steps: int, kind: str, seed: int, sets: Sequence[str] = (), folder: Path = Path()) -> Recipe:
    """The recipe of one row: the model's shipped one, with the row's steps, rule and goal; `folder` has the others."""
    from hcompress.recipe import find, resolve, shipped

    name = model.partition(":")[2]
    base = next(recipe for recipe in shipped() if recipe.startswith(name) and recipe.endswith("20_harmonica"))
    flags: dict[str, Any] = {"solver.steps": steps, "seed": seed}
    method, rule, goal = kind.split("-")
    flags |= {"caching.reuse": rule.removesuffix("2"), "caching.order": 2 if rule in ORDER_2 else 1}
    if method == "learned":
        flags |= {"caching.target_cur": int(goal) / 100, "caching.refresh": 20 * steps}
        return resolve(find(base), flags, sets)
    if method == "after":
        schedule = folder / f"learned-plain-{goal}-{seed}" / "schedule.safetensors"
        flags |= {"caching.method": "given", "caching.schedule": str(schedule)}
    else:
        convention = CONVENTIONS[method]
        flags |= {"caching.method": "interval", "caching.every": int(goal), "caching.convention": convention}
    learned = resolve(find(base))
    flags |= {"model": model, "solver.name": learned.solver.name, "cfg": learned.cfg}
    return resolve(None, flags, sets)


def wanted(kind: str, patterns: Sequence[str]) -> bool:
    """Whether a row was asked for."""
    return any(fnmatchcase(kind, pattern) for pattern in patterns)


def folder_of(work: Path, model: str, steps: int) -> Path:
    """Where the rows of one model at one T are."""
    return work / f"{model.partition(':')[2]}-{steps}"


def make(work: Path, sets: Sequence[str], model: str, steps: int, kind: str, seed: int) -> None:
    """The schedule of one row, resuming where an earlier call stopped."""
    from hcompress.train import train

    folder = folder_of(work, model, steps)
    out = folder / f"{kind}-{seed}"
    if not (out / "schedule.safetensors").exists():
        train(recipe_of(model, steps, kind, seed, sets, folder), out, resume=out.exists())


def sample(work: Path, samples: int, model: str, steps: int, kind: str, seed: int) -> None:
    """Generate and measure one row, unless its file is there."""
    import torch

    from hcompress.report.quality import cost, distribution, generate, paired
    from hcompress.schedule import Schedule
    from hcompress.setting import open_setting, setting_of

    folder = folder_of(work, model, steps)
    file, images = folder / f"{samples}-{kind}-{seed}.json", folder / f"{samples}-{kind}-{seed}.npy"
    if file.exists():
        return
    setting = setting_of(recipe_of(model, steps, "interval-plain-2", seed))
    if kind == "dense":
        drawn = generate(setting, samples, 100 + seed)
        figures = cost(setting, np.ones((setting.table.num_calls, len(setting.adapter.graph)), bool))
    elif kind.startswith("fewer"):
        count = int(kind.partition("-")[2])
        name = recipe_of(model, steps, "interval-plain-2", seed).solver.name
        fewer = open_setting(model, name, count, setting.cfg)
        drawn = generate(fewer, samples, 100 + seed)
        figures = {"cur": 0.0, "mac_ratio": setting.table.num_calls / fewer.table.num_calls}
    else:
        schedule = Schedule.load(folder / f"{kind}-{seed}" / "schedule.safetensors")
        drawn = generate(setting, samples, 100 + seed, schedule.compute, corrections=schedule.corrections)
        figures = cost(setting, schedule.compute) | {"fallbacks": schedule.fallbacks}
    if kind != "dense":
        figures |= paired(setting, drawn, torch.from_numpy(np.load(folder / f"{samples}-dense-{seed}.npy")))
    figures |= distribution(setting, drawn)
    np.save(images, drawn.numpy())
    file.write_text(json.dumps(figures, indent=1))
    shown = "  ".join(f"{name} {figures[name]:.3f}" for name in ("cur", "mac_ratio", "psnr_db") if name in figures)
    print(f"{model} T = {steps}  {kind}-{seed:<3} {shown}", flush=True)


def summarise(folder: Path, samples: int, kinds: Iterable[str], seeds: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation (n - 1) over seeds of each row."""
    from hcompress.report.comparison import spread

    rows: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        found = [json.loads((folder / f"{samples}-{kind}-{seed}.json").read_text()) for seed in seeds]
        rows[kind] = spread(found)
    return rows


def save_pareto(path: Path, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """PSNR against the share of MACs that is left, a line for each rule."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.6, 3.9), layout="constrained")
    lines: dict[str, list[tuple[float, float]]] = {}
    for kind, row in rows.items():
        if "psnr_db" in row:
            point = (100 / row["mac_ratio"]["mean"], row["psnr_db"]["mean"])
            lines.setdefault(kind.rpartition("-")[0], []).append(point)
    for name, points in lines.items():
        method, _, rule = name.partition("-")
        colour = f"C{[*RULES, *ORDER_2].index(rule)}" if rule else "gray"
        axes.plot(*zip(*sorted(points), strict=True), MARKERS[method], color=colour, markersize=5, label=name)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("MACs (% of uncached)")
    axes.set_ylabel("PSNR against uncached (dB)")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def save_pictures(path: Path, folder: Path, rows: dict[str, dict[str, Any]], samples: int, seed: int) -> None:
    """Samples from equal noise: the dense model's, then each rule's at each CUR, ten a row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    named = {"dense": "dense"}
    for kind in [row.format(rule) for row in PICTURED for rule in RULES]:
        kind = kind.replace("after-plain", "learned-plain")
        if kind in rows:
            named[f"CUR {100 * rows[kind]['cur']['mean']:.0f} %, {kind.split('-')[1]}"] = kind
    size = (9, 0.95 * len(named))
    figure, strips = pyplot.subplots(len(named), 1, figsize=size, layout="constrained", squeeze=False)
    for axes, (title, kind) in zip(strips[:, 0], named.items(), strict=True):
        drawn = np.load(folder / f"{samples}-{kind}-{seed}.npy")[:CLASSES]
        strip = np.concatenate(list(np.clip(drawn.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)), axis=1)
        axes.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _call(task: Callable[[], None]) -> None:
    import torch

    torch.set_num_threads(1)
    task()


def main() -> None:
    """Train and fit, sample, summarise, write benchmarks/results/corrected_MODEL-T.{json,md,png}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 10, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--curs", type=int, nargs="*", default=[30, 40, 50, 60, 70], help="of learned rows, in percent")
    parser.add_argument("--rows", nargs="+", default=["*"], help="only these beside the uncached, such as 'interval-*'")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="of every recipe: caching.fit_steps=20")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/corrected"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rules = (*RULES, *ORDER_2)
    made = [f"{method}-{rule}-{every}" for method in CONVENTIONS for rule in rules for every in INTERVALS]
    made += [f"learned-{rule}-{cur}" for rule in ("plain", "corrected") for cur in args.curs]
    made += [f"after-{rule}-{cur}" for rule in rules[1:] for cur in args.curs]
    made = [kind for kind in made if wanted(kind, args.rows)]
    each = [(model, steps) for model in args.models for steps in args.steps]
    fewer = {steps: dict.fromkeys(f"fewer-{round(steps / saved)}" for saved in SAVED) for steps in args.steps}
    drawn = {at: ["dense", *made, *(kind for kind in fewer[at[1]] if wanted(kind, args.rows))] for at in each}
    stages: list[list[Callable[[], None]]] = [[], [], []]
    for model, steps in each:
        folder_of(args.work, model, steps).mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            stages[0] += [partial(sample, args.work, args.samples, model, steps, "dense", seed)]
            for kind in made:
                stages[kind.startswith("after")] += [partial(make, args.work, args.sets, model, steps, kind, seed)]
            rest = drawn[model, steps][1:]
            stages[2] += [partial(sample, args.work, args.samples, model, steps, kind, seed) for kind in rest]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for stage in stages:
            for _ in pool.imap_unordered(_call, stage):
                pass
    asked = ", ".join(["the recipe's settings", *args.sets])
    several = ["± is the sample standard deviation (n - 1) over seeds.", ""] if len(args.seeds) > 1 else []
    for model, steps in each:
        folder, name = folder_of(args.work, model, steps), f"corrected_{model.partition(':')[2]}-{steps}"
        title = f"{model}, T = {steps}"
        rows = summarise(folder, args.samples, drawn[model, steps], args.seeds)
        lines = [f"{args.samples} samples a row, seeds {', '.join(map(str, args.seeds))}; {asked}.", "", *several]
        lines += quality_lines(title, rows, UNSHOWN)
        keep(args.results, name, described(args, {"rows": rows}), "\n".join([*lines, ""]))
        save_pareto(args.results / f"{name}.png", title, rows)
        save_pictures(args.results / f"{name}-samples.png", folder, rows, args.samples, args.seeds[0])
        print("\n".join(lines))


if __name__ == "__main__":
    main()
