"""The device that a user names, checked before anything is loaded onto it."""

from __future__ import annotations

import re

import torch

from hcompress.errors import InputError

NAMES = re.compile(r"cpu|cuda(:\d+)?")


def checked_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as torch's. Raises InputError for another name, and for a GPU that is not there."""
    if not NAMES.fullmatch(name):
        raise InputError(f"there is no device {name!r}; pass --device cpu, cuda, or cuda:N for one of several GPUs")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available; pass --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no {name}: {torch.cuda.device_count()} CUDA devices are available, from cuda:0 on")
    return device
