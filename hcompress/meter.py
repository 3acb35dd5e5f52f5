"""What a training takes as it goes: seconds a round, and the most memory that it has added so far."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress
from pathlib import Path
from typing import final

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@final
class Meter:
    """Starts at its making. On a CPU memory is what the process's resident set grows by, on CUDA what tensors hold."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun, self.before = device, time.perf_counter(), 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif CLEAR.exists():
            with suppress(OSError, AttributeError):  # no glibc
                ctypes.CDLL(None).malloc_trim(0)  # else what earlier runs freed would be taken again unseen
            self.before = resident_bytes("VmRSS")
            CLEAR.write_text("5")  # resets the peak of the resident set

    def lap(self) -> dict[str, float]:
        """seconds since the last lap, and peak_memory_bytes since the start where the system tells it."""
        now = time.perf_counter()
        lap, self.begun = {"seconds": now - self.begun}, now
        if self.device.type == "cuda":
            lap["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        elif CLEAR.exists():
            lap["peak_memory_bytes"] = resident_bytes("VmHWM") - self.before
        return lap


def resident_bytes(field: str) -> int:
    """Bytes of `field` in /proc/self/status: VmRSS now, VmHWM the peak."""
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
