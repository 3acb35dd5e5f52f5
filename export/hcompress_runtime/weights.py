"""The weight file as arrays over its own pages: nothing is read before it is used, nothing is copied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.errors import BundleError

DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,  # numpy has no bfloat16: its bits
    "I64": np.int64,
    "I8": np.int8,
    "F8_E4M3": np.uint8,  # numpy has no float8 either
    "U8": np.uint8,  # int4, two to a byte
}


def map_weights(file: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a safetensors file, read-only, by name. Raises BundleError for a file that is none.

    The safetensors library would copy each one; sessions are to share the pages of one file.
    """
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header: Mapping[str, Any] = json.loads(stream.read(size))
        pages = np.memmap(file, np.uint8, "r", offset=8 + size)
        return {
            name: pages[slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise BundleError(f"{file} is not a weight file ({error}); export or copy the bundle again") from error


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 of the bfloat16 that `bits` are: the upper half of its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def find(weights: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """The tensor called `name`, or rows a to b of one where the name is `<tensor>[a:b]`. Raises BundleError."""
    whole, bracket, bounds = name.partition("[")
    if whole not in weights:
        raise BundleError(f"a graph wants weights {name}, which the weight file lacks; export the bundle again")
    if not bracket:
        return weights[whole]
    begin, end = bounds.removesuffix("]").split(":")
    return weights[whole][int(begin) : int(end)]
