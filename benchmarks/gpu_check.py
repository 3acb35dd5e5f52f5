"""Dense against cached on this machine's GPU, in whatever can run it here; what cannot is a row with the reason.

    make gpu-check                                       # or, without make:
    PYTHONPATH=.:export python benchmarks/gpu_check.py   # at most 10 minutes, no network
    ... --tiny                                           # the same on a CPU with a tiny model, under a minute

DiT-XL/2 256 with random weights, DDIM, T = 20, 8 samples with guidance (16 rows), float16, CUR 37.5 % (HarmoniCa's
poster) and 50 %. Each contender runs the dense model and both masks in turns, so whatever slows the machine slows all;
latencies are medians. The contenders, most important first, are those of gpu_contenders.py.

efficiency   speed-up over the ratio of MACs: 1 where time falls as arithmetic does
memory       of PyTorch, the most its allocator gave out; of others, what the GPU had less of afterwards, for the dense
             model, which comes first, with what the library itself takes
error        against the eager sampler in float32, relative to the most that the network added to the start noise;
             relative to the samples of a random model, which are mostly that noise, any error would look small

Writes gpu-check-<device>.{json,md}, after each contender, and a .log with the traceback of what failed. Exits 1 if
something failed that was there, or parity is off.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_report import Row, machine, markdown, report

if TYPE_CHECKING:
    from gpu_case import Case, Variant
    from gpu_contenders import Contender, Run

REQUIRED = ("torch", "diffusers", "numpy", "safetensors", "pydantic", "yaml", "rich")
ROUNDS, MEASURE_S = (3, 11), 20.0  # as many rounds as fit into these seconds, within these bounds
LOADING = 0.8  # the part of a contender's time that may go before it is measured


class TimeUp(BaseException):
    """Time is over. No Exception, so that no library takes it for a failure of its own."""


@contextmanager
def until(end: float) -> Iterator[None]:
    """Raises TimeUp inside once time.monotonic() passes `end`, wherever the main thread's Python is by then."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeUp

    def stop(*_: object) -> None:
        raise TimeUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, left, 10)  # again, should it be lost: a destructor lets nothing out
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def check(case: Case, name: str, contender: Contender, end: float, tolerance: float, log: Path) -> list[Row]:
    """A row for each variant, or one for all where the contender cannot be had; done by `end`, whatever happens."""
    begin = time.monotonic()
    end = begin + contender.share * max(0.0, end - begin)
    loaded = begin + LOADING * (end - begin)
    variants = case.few if contender.few else case.variants
    rows = {variant.name: _row(case, name, variant) for variant in variants}
    runs: dict[str, Run] = {}
    whole = Row(name, "all")
    with ExitStack() as stack:
        with _judged([whole], end, begin, log), until(end):
            prepare = contender.open(case, stack)
        if whole.status != "ok":
            return [whole]
        for variant in variants:
            row = rows[variant.name]
            with _judged([row], loaded, begin, log), until(loaded):
                meter = Meter(case, contender)
                run = prepare(variant)
                row.error = variant.deviation(run())
                row.memory_bytes = meter.peak_bytes()
                runs[variant.name] = run
        measured = [rows[name] for name in runs]
        with _judged(measured, end, begin, log), until(end):
            _time(case, runs, rows)
        del prepare
        runs.clear()
    tolerance = contender.tolerance or tolerance
    for row in measured:
        if row.status == "ok" and not (row.error is not None and row.error <= tolerance):
            row.status, row.reason = "failed", f"samples are off by {row.error:.1e}, {tolerance:.0e} is allowed"
    return [*rows.values()]


@contextmanager
def _judged(rows: list[Row], end: float, begin: float, log: Path) -> Iterator[None]:
    """Turns what is raised inside into the status and reason of `rows`; the traceback of a failure goes to `log`."""
    from gpu_contenders import Absent

    try:
        yield
    except (Exception, TimeUp) as error:
        if isinstance(error, Absent):
            status, reason = "skipped", str(error)
        elif isinstance(error, TimeUp) or time.monotonic() >= end:  # or what became of a TimeUp on its way
            status, reason = "skipped", f"no time: it was left {max(0.0, end - begin):.0f} s for this"
        else:
            first = (str(error).strip() or "no message").splitlines()[0]
            status, reason = "failed", f"{type(error).__name__}: {first[:200]} ({log.name} has more)"
            with log.open("a", encoding="utf-8") as file:
                file.write(f"== {rows[0].contender}, {rows[0].variant}\n{''.join(traceback.format_exception(error))}\n")
        for row in rows:
            row.status, row.reason = status, " ".join(reason.split())


class Meter:
    """GPU memory from when it is made; without a GPU, nothing."""

    def __init__(self, case: Case, contender: Contender) -> None:
        import torch

        self.on = case.device == "cuda"
        self.held = case.weight_bytes if contender.in_torch else None  # there before
        if self.on:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.allocated, (self.free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()

    def peak_bytes(self) -> int | None:
        """The most that PyTorch has held, its weights included; of other libraries, what they hold now."""
        import torch

        if not self.on:
            return None
        if self.held is not None:
            return torch.cuda.max_memory_allocated() - self.allocated + self.held
        return self.free - torch.cuda.mem_get_info()[0]


def _row(case: Case, name: str, variant: Variant) -> Row:
    graph, compute = case.adapter.graph, variant.compute
    distinct = len({row.tobytes() for row in compute})
    cur, mac_ratio = float(1 - compute.mean()), graph.mac_ratio(compute)
    return Row(name, variant.name, cur=cur, mac_ratio=mac_ratio, distinct_steps=distinct)


def _time(case: Case, runs: Mapping[str, Run], rows: Mapping[str, Row]) -> None:
    """Fill in what time tells, the first of `runs` being the dense one if it is there."""
    import numpy as np

    from hcompress_runtime.measure import interleaved

    begin = time.monotonic()
    for run in runs.values():
        run()
    least, most = ROUNDS
    rounds = int(np.clip(MEASURE_S / (time.monotonic() - begin + 1e-9), least, most))
    for name, latency_ms in interleaved(runs, rounds).items():
        rows[name].rounds_ms, rows[name].latency_ms = latency_ms.tolist(), float(np.median(latency_ms))
    dense_ms = rows["dense"].latency_ms
    for row in rows.values():
        if row.latency_ms and dense_ms and row.mac_ratio:
            row.speedup = dense_ms / row.latency_ms
            row.efficiency = row.speedup / row.mac_ratio


def _require(tiny: bool) -> None:
    absent = [module for module in REQUIRED if not find_spec(module)]
    if absent:
        raise SystemExit(f"error: {', '.join(absent)} not installed; gpu-check needs {', '.join(REQUIRED)}")
    import torch

    if not tiny and not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees no GPU; look at what nvidia-smi says"
        raise SystemExit(f"error: torch {torch.__version__} {why}; --tiny runs this on a CPU")


def main() -> int:
    """Run all that fits into the time; print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="at most; what does not fit is skipped")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    begin = time.monotonic()
    _require(args.tiny)
    # Libraries print that they fall back to something.
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch, redirect_stdout(sys.stderr):
        found = run_all(Path(scratch), args.results, begin, args.minutes, tiny=args.tiny)
    print(markdown(found))
    return 0 if found["ok"] else 1


def run_all(scratch: Path, results: Path, begin: float, minutes: float, *, tiny: bool) -> dict[str, Any]:
    """What every contender came to, written to `results` after each: the next one may end the process."""
    from gpu_case import open_case
    from gpu_contenders import CONTENDERS
    from rich.console import Console
    from rich.progress import Progress

    from hcompress_export.parity import TOLERANCE

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("setup", total=len(CONTENDERS))

    def say(what: str) -> None:
        told = f"{time.monotonic() - begin:5.0f} s  {bar.tasks[task].description}: {what}"
        console.print(told, markup=False)

    end = begin + 60 * minutes
    rows: list[Row] = []
    with bar:
        try:
            with until(end):
                case = open_case(scratch, say, tiny=tiny)
        except TimeUp:
            raise SystemExit(f"error: {minutes:g} minutes are not enough to set up; pass more --minutes") from None
        tolerance = TOLERANCE[str(case.adapter.dtype).removeprefix("torch.")]
        head: dict[str, Any] = {"date": str(date.today()), "command": shlex.join(["python", *sys.argv])}
        head |= {"minutes": minutes, "tolerance": tolerance, "machine": machine(case)}
        slug = re.sub("[^a-z0-9]+", "-", head["machine"]["device"].lower()).strip("-")
        files = {kind: results / f"gpu-check-{slug}.{kind}" for kind in ("json", "md", "log")}
        results.mkdir(parents=True, exist_ok=True)
        files["log"].unlink(missing_ok=True)
        for name, contender in CONTENDERS.items():
            bar.update(task, description=name)
            found_now = check(case, name, contender, end, tolerance, files["log"])
            _empty(case)
            for row in found_now:
                say(f"{row.variant}: {row.reason or row.status}")
            rows += found_now
            bar.advance(task)
            found = report(case, rows, head | {"took_s": time.monotonic() - begin})
            files["json"].write_text(json.dumps(found, indent=1) + "\n")
            files["md"].write_text(markdown(found))
    return found


def _empty(case: Case) -> None:
    """Give the GPU's memory back for the next contender."""
    import torch

    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
