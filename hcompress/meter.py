"""What a training takes as it goes: seconds a round, and the most memory so far."""

from __future__ import annotations

import time
from pathlib import Path
from typing import final

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@final
class Meter:
    """Starts at its making. On a CPU memory is the process's resident set, on CUDA what tensors held."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begun = device, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif CLEAR.exists():
            CLEAR.write_text("5")  # resets the peak of the resident set

    def lap(self) -> dict[str, float]:
        """seconds since the last lap, and peak_memory_bytes since the start where the system tells it."""
        now = time.perf_counter()
        lap, self.begun = {"seconds": now - self.begun}, now
        if self.device.type == "cuda":
            lap["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        elif STATUS.exists():
            lap["peak_memory_bytes"] = resident_bytes("VmHWM")
        return lap


def resident_bytes(field: str) -> int:
    """Bytes of `field` in /proc/self/status: VmRSS now, VmHWM the peak."""
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
