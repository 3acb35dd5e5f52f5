"""Finished pictures to be judged, a batch at a time: a folder of files, or ADM's npz.

ADM (Dhariwal and Nichol 2021, guided-diffusion's evaluations) keeps a set in one npz, `arr_0` uint8[N, H, W, 3]. It is
read as it streams out of the archive: 50 000 pictures at 256 pixels are 10 GB.

Legend: N pictures of the set, B of a batch, [B, 3, H, W] in 0 .. 255.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, final

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from hcompress.errors import DataError
from hcompress.pictures import SUFFIXES, UNREADABLE, picture_files, read_picture

ARRAY = "arr_0.npy"
# What reading an npz raises where bytes of it are wrong; RuntimeError: they ask for a cipher, or a method it has not.
DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, RuntimeError)
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class ImageSet(Protocol):
    """N pictures of one size."""

    def __len__(self) -> int:
        """N, with those that will turn out to be broken."""

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """The numbers of up to `size` pictures, and uint8[B, 3, H, W]; from the first each time."""

    def traits(self) -> list[Any]:
        """What changes where the pictures do, JSON-able."""


def open_set(path: Path, size: int | None = None, on_broken: Callable[[str], object] = lambda line: None) -> ImageSet:
    """The pictures of a folder or an npz.

    size:      of a folder's pictures, cut from the middle; None takes them as they are, all of one size
    on_broken: told of each file of a folder that cannot be read, and is left out

    Raises DataError for what is neither.
    """
    if path.is_dir():
        return Folder(path, size, on_broken)
    if path.suffix == ".npz" and path.is_file():
        return Npz(path)
    raise DataError(f"{path} is no folder of pictures and no npz of them (`arr_0` uint8[N, H, W, 3], as ADM writes it)")


@final
class Folder:
    """The picture files in a folder and all below it, in order of their paths, as RGB."""

    def __init__(self, folder: Path, size: int | None, on_broken: Callable[[str], object]) -> None:
        self.folder, self.size, self.on_broken = folder, size, on_broken
        self.files, self.broken = picture_files(folder), set[int]()
        if not self.files:
            raise DataError(f"{folder} holds no pictures ({', '.join(sorted(SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.files)

    def traits(self) -> list[Any]:
        """Names, lengths and times of the files, and the cut."""
        stats = [(str(file.relative_to(self.folder)), file.stat()) for file in self.files]
        return [self.size, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Raises DataError where pictures differ in size, or none can be read."""
        held: list[tuple[int, Tensor]] = []
        shape: tuple[int, ...] | None = None
        for number, file in enumerate(self.files):
            try:
                picture = torch.from_numpy(read_picture(file, "RGB", self.size).copy())
            except UNREADABLE as error:
                if number not in self.broken:
                    self.broken.add(number)
                    self.on_broken(f"{file} cannot be read ({type(error).__name__}): left out")
                continue
            shape = shape or tuple(picture.shape)
            if picture.shape != shape:
                wide, tall = picture.shape[1], picture.shape[0]
                raise DataError(
                    f"{file} is {wide} x {tall} and those before it are {shape[1]} x {shape[0]}; pass --size to cut "
                    "and scale all of them to one size"
                )
            held.append((number, picture))
            if len(held) == size:
                yield _stacked(held)
                held = []
        if held:
            yield _stacked(held)
        if shape is None:
            raise DataError(f"none of the {len(self)} pictures in {self.folder} can be read")


@final
class Npz:
    """`arr_0` of an npz file, uint8[N, H, W, 3]. Raises DataError where it is not that."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with self._array() as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def traits(self) -> list[Any]:
        """Path, length and time of the file."""
        stat = self.file.stat()
        return [str(self.file.resolve()), stat.st_size, stat.st_mtime_ns]

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Raises DataError where the archive is cut short."""
        row = math.prod(self.shape[1:])
        with self._array() as (stream, _):
            for first in range(0, len(self), size):
                count = min(size, len(self) - first)
                data = bytearray(stream.read(count * row))
                if len(data) < count * row:
                    raise DataError(
                        f"{self.file} ends in picture {first + len(data) // row} of {len(self)}; copy it again"
                    )
                pixels = torch.frombuffer(data, dtype=torch.uint8).reshape(count, *self.shape[1:])
                yield list(range(first, first + count)), pixels.permute(0, 3, 1, 2)

    @contextmanager
    def _array(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        """The bytes of the array, and its shape."""
        try:
            with zipfile.ZipFile(self.file) as archive, archive.open(ARRAY) as stream:
                shape, fortran, dtype = HEADERS[npy.read_magic(stream)](stream)
                if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or not shape[0]:
                    raise DataError(f"arr_0 of {self.file} is {dtype}{list(shape)}; it should be uint8[N, H, W, 3]")
                yield stream, shape
        except DAMAGED as error:
            raise DataError(f"{self.file} cannot be read as an npz of pictures ({error})") from error


def _stacked(held: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    return [number for number, _ in held], torch.stack([picture for _, picture in held]).permute(0, 3, 1, 2)
