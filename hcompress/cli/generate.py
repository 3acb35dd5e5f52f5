"""`hcompress generate`: pictures from a bundle without torch, or from a model with it; the same ones."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hcompress.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hcompress_runtime.conditions import Given, Input, Rows

Generate = Callable[["Rows", int], "NDArray[np.float32]"]
"""(conditions of some samples, number of the first) -> pictures, or latents that nothing decodes."""


def generate(
    source: Annotated[str, typer.Argument(help="A bundle, or a MODEL to run in PyTorch.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="A .png, ten samples a row; a folder, a PNG for each; an .npz.", show_default=False)
    ],
    labels: Annotated[str | None, typer.Option(help="A class for each sample: 0,1,2", show_default=False)] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text models: a file of embeddings, one sample for each; see FORMAT.md.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise; sample i draws stream i of it.")] = 0,
    first: Annotated[int, typer.Option(min=0, help="Number of the first sample, where they are made in parts.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples that run at once.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; a bundle with engines also trt or rtx.")] = "cpu",
    schedule: Annotated[
        Path | None,
        typer.Option(help="MODEL only: a run, or a schedule.safetensors; none: its own if it has one."),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="MODEL only: without a schedule of its own.")] = False,
    solver: Annotated[str | None, typer.Option(help="MODEL only: the schedule's solver; ddim if not given.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="MODEL only: the schedule's own if not given, else 20.")
    ] = None,
    cfg: Annotated[float | None, typer.Option(help="MODEL only: the schedule's own if not given, else 1.5.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Generate one sample for each label or prompt. A bundle and the MODEL it came from give the same picture.

    Example: hcompress generate bundle --labels 0,1,2 --seed 0 --out grid.png
    """
    from rich.console import Console
    from rich.progress import Progress

    from hcompress.gallery import gallery
    from hcompress.rundir import schedule_for
    from hcompress_runtime.conditions import complete, take

    say = partial(print, file=sys.stderr)
    given, (add, finish) = _given(labels, prompts), gallery(out)
    console = Console(stderr=True)
    with console.status(f"loading {source}"):
        if _is_bundle(Path(source)):
            frozen = {"--schedule": schedule, "--dense": dense or None}
            _refuse(frozen | {"--solver": solver, "--steps": steps, "--cfg": cfg})
            backend, (inputs, run) = "onnxruntime", _from_bundle(source, seed, batch, threads, device)
        else:
            asked = (schedule_for(source, schedule, dense=dense, on_notice=say), solver, steps, cfg)
            backend, (inputs, run) = "torch", _from_model(source, seed, batch, threads, device, *asked)
    rows, latency_ms = complete(inputs, given), 0.0
    count = len(next(iter(rows.values())))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("generating", total=count)
        for begin in range(0, count, batch):
            begun = time.perf_counter()
            samples = run(take(rows, range(begin, min(begin + batch, count))), first + begin)
            latency_ms += 1e3 * (time.perf_counter() - begun)
            add(first + begin, samples)
            bars.advance(task, len(samples))
    finish()
    if as_json:
        told = {"prompts": str(prompts)} if prompts else {"labels": given}
        print(json.dumps({"out": str(out), "backend": backend, **told, "latency_ms": latency_ms}))
    else:
        print(out)


def _given(labels: str | None, prompts: Path | None) -> Given:
    """What to generate."""
    from hcompress_runtime.conditions import load_prompts

    if (labels is None) == (prompts is None):
        raise InputError("say what to generate: --labels 0,1,2 for classes, or --prompts FILE for text, not both")
    return load_prompts(prompts) if prompts else _numbers(labels or "")


def _numbers(labels: str) -> list[int]:
    """[0, 1, 2] from "0,1,2"."""
    try:
        return [int(label) for label in labels.split(",")]
    except ValueError as error:
        raise InputError(f"--labels {labels!r} should be numbers with commas between, such as 0,1,2") from error


def _is_bundle(path: Path) -> bool:
    """Whether the user means a bundle, be it whole or not."""
    return (path / "manifest.json").exists() or (path / "graphs").is_dir()


def _refuse(options: dict[str, object]) -> None:
    """Raise InputError for options of a MODEL that are given for a bundle."""
    if told := [name for name, value in options.items() if value is not None]:
        raise InputError(f"a bundle is frozen with its own {', '.join(told)}; leave that out, or export it again")


def _from_bundle(
    bundle: str, seed: int, batch: int, threads: int | None, device: str
) -> tuple[Mapping[str, Input], Generate]:
    from hcompress_runtime import Runtime

    runtime = Runtime(bundle, device, threads)
    return runtime.bundle.conditions, lambda rows, first: runtime.pictures(
        runtime.generate(rows, seed, batch=batch, first=first)
    )


def _from_model(
    model: str,
    seed: int,
    batch: int,
    threads: int | None,
    device: str,
    schedule: Path | None,
    solver: str | None,
    steps: int | None,
    cfg: float | None,
) -> tuple[Mapping[str, Input], Generate]:
    import torch

    from hcompress.models.decoder import load_decoder
    from hcompress.rundir import own_flags
    from hcompress.sampling import sample_seeded
    from hcompress.schedule import Schedule
    from hcompress.setting import open_setting

    if threads:
        torch.set_num_threads(threads)
    learned = Schedule.load(schedule) if schedule else None
    own: dict[str, Any] = {"solver.name": "ddim", "solver.steps": 20, "cfg": 1.5} | own_flags(model)
    own |= learned.flags if learned else {}
    steps, cfg = own["solver.steps"] if steps is None else steps, own["cfg"] if cfg is None else cfg
    setting = open_setting(model, solver or own["solver.name"], steps, cfg, device=device)
    if learned:
        learned.check_fits(setting.adapter.graph, setting.identity)
        if note := learned.fitted_elsewhere(setting.cfg):
            print(note, file=sys.stderr)
    decoder = load_decoder(setting.model.folder)

    def run(rows: Rows, first: int) -> NDArray[np.float32]:
        samples: torch.Tensor = sample_seeded(
            setting.adapter,
            setting.table,
            rows,
            seed=seed,
            cfg=setting.cfg,
            compute=learned.compute if learned else None,
            corrections=learned.corrections if learned else None,
            batch=batch,
            first=first,
        )
        if decoder:
            with torch.no_grad():
                samples = torch.cat([decoder(sample[None]) for sample in samples.cpu()])
        return samples.cpu().numpy()

    return setting.adapter.conditions, run
