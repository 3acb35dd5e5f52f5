"""A batch in parts, as many rows at a time as memory allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hcompress.adapter import Told

Batch = Callable[[int, int], tuple[Tensor, list[Told]]]
"""(first, count) -> images [count, C, H, W] of an endless order, and what is known of each."""


def parts_of(count: int, size: int | None) -> list[slice]:
    """`count` rows, `size` at a time; None: all at once."""
    return [slice(begin, min(begin + (size or count), count)) for begin in range(0, count, size or count)]


def in_parts(images: Batch, first: int, count: int, size: int | None) -> tuple[Tensor, list[Told]]:
    """`images`(first, count), read and encoded `size` at a time."""
    each = [images(first + part.start, part.stop - part.start) for part in parts_of(count, size)]
    return torch.cat([x0 for x0, _ in each]), [one for _, told in each for one in told]
