"""Fashion-MNIST as tensors: 60 000 training and 10 000 test images, 28x28 gray, ten classes.

The files are those of the Debian package `dataset-fashion-mnist` (Xiao et al. 2017, MIT licence); any folder
with the four `*-ubyte.gz` files of the original distribution works. Nothing here downloads: apt installs them, or
`hcompress zoo fetch-data` fetches them.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import DataError
from hcompress.zoo import data_folder

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
IMAGE_HEADER_BYTES, LABEL_HEADER_BYTES = 16, 8


def fashion_folder() -> Path:
    """Where the package installs its files, or, where it is not installed, where they are fetched to."""
    return FOLDER if FOLDER.is_dir() else data_folder() / "fashion-mnist"


def load_fashion(split: str, folder: Path | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images float32[n, 1, 28, 28] in [-1, 1] and labels int64[n] of `split` "train" or "t10k", as `read_fashion`."""
    pixels, labels = read_fashion(split, folder)
    return pixels.astype(np.float32) / 127.5 - 1.0, labels


def read_fashion(split: str, folder: Path | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8[n, 1, 28, 28] and labels int64[n] of `split`, a quarter of the memory.

    Raises DataError where the files are absent.
    """
    folder = folder or fashion_folder()
    images_path, labels_path = (folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if not images_path.is_file() or not labels_path.is_file():
        raise DataError(
            f"no Fashion-MNIST files in {folder}; install them with `apt-get install dataset-fashion-mnist` "
            "or get them with `hcompress zoo fetch-data fashion`"
        )
    pixels = np.frombuffer(gzip.decompress(images_path.read_bytes()), np.uint8, offset=IMAGE_HEADER_BYTES)
    labels = np.frombuffer(gzip.decompress(labels_path.read_bytes()), np.uint8, offset=LABEL_HEADER_BYTES)
    return pixels.reshape(-1, 1, 28, 28), labels.astype(np.int64)
