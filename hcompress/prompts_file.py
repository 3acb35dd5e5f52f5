"""A prompts file in the making: what a text encoder gives, written a batch at a time.

Thirty thousand prompts of PixArt, as published protocols have them, are 59 GB in single precision; they are mapped
again when they are read (hcompress_runtime.conditions).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hcompress.errors import InputError
from hcompress.text_encoder import TextEncoder
from hcompress_runtime.conditions import STORED


@final
@dataclass(frozen=True)
class Encoded:
    """The tensors of a prompts file (hcompress_runtime.conditions), made when they are asked for.

    prompts:  N of them, of at most `tokens` tokens as `encoder` counts
    negative: what guidance leads away from
    dtype:    that states are stored in
    on_batch: told how many prompts are done

    Raises InputError for no prompts.
    """

    encoder: TextEncoder
    prompts: Sequence[str]
    tokens: int
    negative: str = ""
    dtype: DTypeLike = np.float32
    on_batch: Callable[[int], object] = lambda done: None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("no prompts to encode")

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All of them in memory."""
        null, empty = self._null()
        states, masks = zip(*self._batches(), strict=True)
        embeds, mask = np.concatenate(states), np.concatenate(masks)
        return {"null_embeds": null, "null_mask": empty, "prompt_embeds": embeds, "prompt_mask": mask}

    def write(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        """The same to a file, a batch in memory."""
        shape, states = (len(self.prompts), self.tokens), np.dtype(self.dtype)
        null, empty = self._null()
        layout = {  # in the order of the bytes
            "null_embeds": (states, null.shape),
            "prompt_embeds": (states, (*shape, self.encoder.width)),
            "null_mask": (np.dtype(bool), empty.shape),
            "prompt_mask": (np.dtype(bool), shape),
        }
        file.write(safetensors_header(layout, metadata))
        file.write(null.tobytes())
        masks = [empty]
        for batch, mask in self._batches():
            file.write(batch.tobytes())
            masks.append(mask)
        file.write(np.concatenate(masks).tobytes())

    def _null(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        states, mask = self.encoder.states([self.negative], self.tokens)
        return states.astype(self.dtype), mask

    def _batches(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        done = 0
        for states, mask in self.encoder.batches(self.prompts, self.tokens):
            yield states.astype(self.dtype), mask
            done += len(mask)
            self.on_batch(done)


def safetensors_header(layout: Mapping[str, tuple[np.dtype[Any], Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What precedes the bytes of tensors, dtype and shape of each by name, that follow each other in that order.

    The library writes only what is in memory as a whole.
    """
    codes = {np.dtype(stored): code for code, stored in STORED.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": codes[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text
