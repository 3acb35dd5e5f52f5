"""What a backend must offer: an engine that runs one graph, and memory where it runs."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from numpy.typing import NDArray

Value = Any
"""A tensor in the backend's own memory. Only its backend looks inside; from engine to engine it is never copied."""


class Engine(ABC):
    """One graph on one backend: `with` loads and frees it, `infer` runs it. Subclasses are final.

    feeds:   the inputs that are neither slots nor weights
    batches: least and most samples that it takes at once
    """

    feeds: list[str]
    batches: tuple[int, int] = (1, sys.maxsize)

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...

    @abstractmethod
    def infer(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Every output by its name, for inputs by theirs. It may not be finished yet when this returns.

        `inputs` may hold more than this graph has use for. A `switch` graph may be given fewer slots than it lists. An
        output may be overwritten once nothing refers to it, or, where calls are captured, by the next of its name.
        """

    @abstractmethod
    def put(self, array: NDArray[Any], into: Value | None = None) -> Value:
        """A value that holds what `array` does: `into`, where an earlier `put` gave one of that shape and type."""

    @staticmethod
    @abstractmethod
    def nbytes(value: Value) -> int:
        """The bytes that a value takes."""

    @staticmethod
    @abstractmethod
    def to_numpy(value: Value) -> NDArray[Any]:
        """A copy of what a value holds, once that is computed."""
