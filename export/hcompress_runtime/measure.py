"""Speed and memory of bundles, measured so that two of them can be compared on a machine that is not quiet."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.conditions import example
from hcompress_runtime.errors import HcompressError
from hcompress_runtime.runtime import Runtime

PROCESS_MEMORY = Path("/proc/self/smaps_rollup")


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each contender, float64[rounds]: every round runs all of them in turn, after one warm-up.

    Whatever slows the machine for a while then slows all alike. On one that is never quiet, `clock` may be
    time.process_time: it stands still while others run. With one thread, that is, since a pool that waits counts too.
    """
    for run in contenders.values():
        run()
    latency_ms = {name: np.zeros(rounds) for name in contenders}
    for index in range(rounds):
        for name, run in contenders.items():
            begin = clock()
            run()
            latency_ms[name][index] = 1e3 * (clock() - begin)
        progress(index + 1)
    return latency_ms


def peak_memory_bytes(
    bundle: Path, batch: int, threads: int | None = None, *, provider: str = "cpu", prepack: bool | None = None
) -> int | None:
    """The most memory that a fresh process takes to load `bundle` and generate one batch.

    It is the proportional set size (PSS: its own pages, plus its share of those it shares), which counts a page of
    the weight file once however many sessions map it, read after every model call. It is the host's memory, not a
    GPU's. `provider` and `prepack` as in Runtime. None where the system has no PSS.
    """
    if not PROCESS_MEMORY.exists():
        return None
    options = {"bundle": str(bundle), "provider": provider, "threads": threads, "prepack": prepack}
    command = [sys.executable, "-P", "-m", __name__, str(batch), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        *_, reason = ["", *done.stderr.strip().splitlines()]
        if done.returncode < 0:
            reason = f"its process was killed by signal {-done.returncode}, as happens where memory runs out"
        raise HcompressError(f"measuring the memory of {bundle} failed: {reason}")
    return int(json.loads(done.stdout)["peak_memory_bytes"])


def _pss_bytes() -> int:
    lines = PROCESS_MEMORY.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _main(batch: str, options: str) -> None:
    seen: list[int] = []
    with Runtime(**json.loads(options)) as runtime:
        given = example(runtime.bundle.conditions, int(batch))
        runtime.generate(given, batch=int(batch), on_step=lambda call, x: seen.append(_pss_bytes()))
        seen.append(_pss_bytes())
    print(json.dumps({"peak_memory_bytes": max(seen)}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
