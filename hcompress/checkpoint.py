"""Checkpoints: written whole or not at all, read without running what is in them; and stages that go on from theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from hcompress.errors import RunError
from hcompress.meter import Meter
from hcompress.rundir import RunDir
from hcompress_runtime.files import write_atomically


class Resumable(Protocol):
    """What remembers where a stage is."""

    def state(self) -> dict[str, Any]:
        """All of it, for torch.save."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""


def resumed(run: RunDir, stage: str, memory: Resumable, progress: Iterator[Any]) -> Iterator[Any]:
    """What a lazy `progress` yields (dataclasses that count a `round` from 1), from where RUN/STAGE.pt left off.

    Each is logged with its stage and followed by a checkpoint, before it is handed on; so of a command that runs one
    stage after the other, all that are finished yield nothing, and the one that was killed goes on.
    """
    checkpoint = run.path / f"{stage}.pt"
    if checkpoint.exists():
        memory.restore(read_checkpoint(checkpoint))
    meter = Meter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    earlier, first = sum(record.get("stage") != stage for record in run.records()), True
    for done in progress:
        if first:
            run.rewind(earlier + done.round - 1)  # what a kill left between the log and the checkpoint
            first = False
        run.log({"stage": stage} | asdict(done) | meter.lap())
        write_checkpoint(checkpoint, memory.state())
        yield done


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`, atomically. Raises DiskError where the disk refuses."""
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state at `path`, on the CPU wherever it was made. Raises RunError where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged zip; all mean the same to a user
        raise RunError(f"{path} cannot be read ({type(error).__name__}); delete it to start over") from error
