"""Samples as a picture: one grid layout for every command.

Row by row from the top left, in the order of the samples, ten a row unless told; two white pixels between neighbours
and none around; samples keep their size. [-1, 1] becomes 0 .. 255, rounded; what lies outside is clipped.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.errors import InputError, missing

COLUMNS, GAP, WHITE = 10, 2, 255


def to_pixels(samples: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 of the same shape for samples in [-1, 1]."""
    return np.rint((np.clip(samples, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(samples: NDArray[np.float32], columns: int = COLUMNS) -> NDArray[np.uint8]:
    """One picture uint8[H', W'] or uint8[H', W', 3] for samples float32[B, C, H, W] of C = 1 or 3 channels.

    Raises InputError for other channels: those are latents, which need their decoder first.
    """
    count, channels, height, width = samples.shape
    if channels not in (1, 3):
        raise InputError(f"samples of {channels} channels are latents, not pixels; decode them first")
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), WHITE, np.uint8)
    for index, pixels in enumerate(to_pixels(samples)):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        canvas[top : top + height, left : left + width] = pixels.transpose(1, 2, 0)
    return canvas[..., 0] if channels == 1 else canvas


def png(samples: NDArray[np.float32], columns: int = COLUMNS) -> bytes:
    """The `grid` of `samples` as a PNG file. Raises MissingExtra without Pillow."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise missing("pillow", "cpu") from error
    file = io.BytesIO()
    Image.fromarray(grid(samples, columns)).save(file, "PNG")
    return file.getvalue()
