"""Captioned emoji: 1 644 concepts in three drawing styles, 32x32 RGB, and which concepts no model here was shown.

Drawings are those of Noto (Apache-2.0), Fluent Emoji (MIT) and Twemoji (CC-BY-4.0), names those of Emojibase (MIT).
`hcompress zoo fetch-data` makes the file that is read here; nothing here downloads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import DataError
from hcompress.zoo import data_folder

STYLES = ("noto", "fluent", "twemoji")
SIZE = 32  # pixels on a side
HELD_OUT = 10  # one concept in so many


@dataclass(frozen=True, eq=False)
class Emoji:
    """n captioned images.

    images:   uint8[n, 32, 32, 3], RGB on white
    captions: n strings, "{label}, {style} style"
    concepts: int64[n]; the images of one emoji in several styles share a number
    styles:   int64[n], index into STYLES
    held_out: bool[n]; all images of a concept or none
    """

    images: NDArray[np.uint8]
    captions: list[str]
    concepts: NDArray[np.int64]
    styles: NDArray[np.int64]
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, chosen: NDArray[np.bool_]) -> Emoji:
        """The images that `chosen`, bool[n], picks."""
        captions = [caption for caption, wanted in zip(self.captions, chosen, strict=True) if wanted]
        return Emoji(self.images[chosen], captions, self.concepts[chosen], self.styles[chosen], self.held_out[chosen])


def is_held_out(hexcode: str) -> bool:
    """Whether the emoji of these code points ("1F34E") is kept from training: a tenth, by a hash that never changes."""
    return int(hashlib.sha256(hexcode.encode()).hexdigest(), 16) % HELD_OUT == 0


def load_emoji(folder: Path | None = None) -> Emoji:
    """The data set in `folder`, by default `data_folder()`. Raises DataError where it has not been fetched."""
    path = (folder or data_folder()) / "emoji.npz"
    if not path.is_file():
        raise DataError(f"no {path}; make it with `hcompress zoo fetch-data`")
    with np.load(path) as arrays:
        held_out = np.array([is_held_out(code) for code in arrays["hexcodes"].tolist()])
        return Emoji(arrays["images"], arrays["captions"].tolist(), arrays["concepts"], arrays["styles"], held_out)
