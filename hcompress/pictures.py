"""Files of pictures as pixels: which ones count, how one is cut to a size, and what reading a broken one raises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what Pillow raises


def picture_files(folder: Path) -> list[Path]:
    """The picture files in `folder` and all below it, in order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def read_picture(file: Path, mode: str, size: int | None = None) -> NDArray[np.uint8]:
    """uint8[H, W, C] of `file` in Pillow's `mode`; with `size` the middle of it. Raises one of UNREADABLE."""
    with Image.open(file) as image:
        converted = image.convert(mode)
        return np.atleast_3d(np.asarray(converted if size is None else centre(converted, size)))


def centre(image: Image.Image, size: int) -> Image.Image:
    """The middle of an image, `size` x `size`: halved while it is large, then bicubic (ADM, image_datasets.py)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
