"""Checkpoints: written whole or not at all, read without running what is in them; and stages that go on from theirs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from hcompress.errors import RunError
from hcompress.meter import Meter
from hcompress.rundir import RunDir
from hcompress_runtime.files import write_atomically

SPARING = 20  # times as long as a checkpoint takes to write, to the next: a twentieth of the time at most goes there


class Resumable(Protocol):
    """What remembers where a stage is."""

    def state(self) -> dict[str, Any]:
        """All of it, for torch.save."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""


def resumed(run: RunDir, stage: str, memory: Resumable, progress: Iterator[Any]) -> Iterator[Any]:
    """What a lazy `progress` yields (dataclasses that count a `round` from 1), from where RUN/STAGE.pt left off.

    Each is logged with its stage before it is handed on. A checkpoint follows, unless the last one is more recent than
    SPARING times what it took to write; in any case after the last round, and after that in which Ctrl-C was pressed.
    So of a command that runs one stage after the other, all that are finished yield nothing, and the one that was
    stopped goes on.
    """
    checkpoint = run.path / f"{stage}.pt"
    if checkpoint.exists():
        memory.restore(read_checkpoint(checkpoint))
    meter = Meter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    stages = [record.get("stage") for record in run.records()]
    earlier, first = stages.index(stage) if stage in stages else len(stages), True
    due, stale = 0.0, False
    with patient() as interrupted:
        for done in progress:
            if first:
                run.rewind(earlier + done.round - 1)  # what a kill left between the log and the checkpoint
                first = False
            run.log({"stage": stage} | asdict(done) | meter.lap())
            begin, stale = time.monotonic(), True
            if interrupted.is_set() or begin >= due:
                write_checkpoint(checkpoint, memory.state())
                stale, end = False, time.monotonic()
                due = end + SPARING * (end - begin)
            if interrupted.is_set():
                raise KeyboardInterrupt
            yield done
        if stale:
            write_checkpoint(checkpoint, memory.state())
        if interrupted.is_set():
            raise KeyboardInterrupt


@contextmanager
def patient() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of raising; pressed again it raises. Only a main thread can be told of it."""
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield pressed
        return

    def press(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()
        os.write(2, b"stopping after this round; Ctrl-C again to stop at once\n")  # print may be what was interrupted

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`, atomically. Raises DiskError where the disk refuses."""
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state at `path`, on the CPU wherever it was made. Raises RunError where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged zip; all mean the same to a user
        raise RunError(f"{path} cannot be read ({type(error).__name__}); delete it to start over") from error
