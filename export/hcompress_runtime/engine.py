"""What a backend must offer: an engine that runs one step graph."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

SlotValue = Any
"""A cached branch output in the backend's own memory. Only its engine looks inside; it is never copied."""


class Engine(ABC):
    """One step graph on one backend: `with` loads and frees it, `infer` runs it. Subclasses are final.

    batches: least and most samples that it takes at once
    """

    batches: tuple[int, int] = (1, sys.maxsize)

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...

    @abstractmethod
    def infer(
        self, feeds: Mapping[str, NDArray[Any]], slots: Mapping[str, SlotValue]
    ) -> tuple[NDArray[np.float32], dict[str, SlotValue]]:
        """Model output [B, C, H, W] and the slots written, by name.

        `feeds` may hold more inputs, and `slots` more slots, than this graph has use for. A `switch` graph may be given
        fewer slots than it lists, and may write more than the step wants.
        """

    @staticmethod
    @abstractmethod
    def nbytes(value: SlotValue) -> int:
        """The bytes that a slot's value takes."""

    @staticmethod
    @abstractmethod
    def to_numpy(value: SlotValue) -> NDArray[Any]:
        """A copy of what a slot holds, for inspection."""
