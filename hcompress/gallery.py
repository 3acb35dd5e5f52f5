"""Where generated pictures go: a grid in one file, a folder with a file for each, or an npz as ADM writes it.

OUT.png    ten a row, as every command shows samples (hcompress_runtime.images)
OUT.npz    `arr_0` uint8[N, H, W, 3], what evaluations read (Dhariwal and Nichol 2021, guided-diffusion)
OUT        a folder: 000000.png is sample 0; those of other numbers that lie there stay
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import InputError
from hcompress_runtime.files import write_atomically
from hcompress_runtime.images import png, to_pixels

Samples = NDArray[np.float32]
"""[B, C, H, W] in about [-1, 1], C = 1 or 3."""
Add = Callable[[int, Samples], None]
"""(number of the first, samples): put them where they belong."""


def gallery(out: Path) -> tuple[Add, Callable[[], None]]:
    """How to add samples to `out`, batch by batch in order, and how to finish it. Raises InputError for its name."""
    if out.suffix == "" or out.is_dir():
        return lambda first, samples: _files(out, first, samples), lambda: None
    if out.suffix not in (".png", ".npz"):
        raise InputError(f"--out {out} should be a .png (one grid), an .npz (pixels) or a folder (a PNG for each)")
    kept: list[Samples | NDArray[np.uint8]] = []
    if out.suffix == ".png":
        return lambda first, samples: kept.append(samples), lambda: write_atomically(out, png(np.concatenate(kept)))
    return lambda first, samples: kept.append(_rgb(samples)), lambda: write_atomically(out, _npz(np.concatenate(kept)))


def _files(folder: Path, first: int, samples: Samples) -> None:
    for number, sample in enumerate(samples, first):
        write_atomically(folder / f"{number:06}.png", png(sample[None]))


def _rgb(samples: Samples) -> NDArray[np.uint8]:
    """uint8[B, H, W, 3]; gray ones in three channels."""
    batch, channels, height, width = samples.shape
    if channels not in (1, 3):
        raise InputError(f"samples of {channels} channels are latents, not pixels; decode them first")
    return np.broadcast_to(to_pixels(samples).transpose(0, 2, 3, 1), (batch, height, width, 3))


def _npz(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    np.savez(file, pixels)
    return file.getvalue()
