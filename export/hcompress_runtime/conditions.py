"""What samples are conditioned on: class labels, or prompts whose embeddings somebody has computed.

A model describes each of its inputs of this kind by an `Input`. There is one for a class-conditional model, `labels`. A
text-conditional one has several, and a prompts file (safetensors) holds tensors of their names, N prompts of L tokens:

    prompt_embeds         float32[N, L, D]       hidden states of the text encoder, padded to the model's L
    prompt_mask           bool[N, L]             true where a token is text, false where it is padding (PixArt)
    pooled_prompt_embeds  float32[N, P]          one vector for the whole prompt (Stable Diffusion 3, FLUX)
    null_embeds           float32[1 or N, L, D]  the same of what guidance leads away from: the empty prompt, or a
    null_mask             bool[1 or N, L]        negative one
    pooled_null_embeds    float32[1 or N, P]
    guidance              float32[1 or N]        the scale that a guidance-distilled model is told (FLUX.1-dev)

Those of the null prompt may be left out, together; the model's own null prompt is taken then. `guidance` may be too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from hcompress_runtime.errors import InputError
from hcompress_runtime.noise import gaussian

Given: TypeAlias = Sequence[int] | Mapping[str, Any]
"""As a user gives it: a label for each sample, or arrays by name with a row for each sample."""

Rows: TypeAlias = Mapping[str, NDArray[Any]]
"""Complete and checked: every input of the model by name, each with a row for each sample; halves may stay halves."""

DTYPES = ("int64", "float32", "bool")
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
BLOCK = 256  # rows that are looked at together


@dataclass(frozen=True, eq=False)
class Input:
    """One thing that a model is told of a sample.

    dtype:   one of DTYPES
    shape:   for one sample; () is a number
    classes: a label is 0 .. classes - 1; None for all that is no label
    default: dtype[*shape], what a sample gets where nothing is given; None where something has to be

    Raises ValueError for a dtype that is none, and for a default of another shape.
    """

    dtype: str
    shape: tuple[int, ...]
    classes: int | None = None
    default: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"a condition of dtype {self.dtype!r}, which is none of: {', '.join(DTYPES)}")
        if self.default is not None and self.default.shape != self.shape:
            raise ValueError(f"a default of shape {self.default.shape} for a condition of shape {self.shape}")


def null_name(name: str) -> str:
    """What an input is called for the null prompt, given its name for a prompt."""
    return name.replace("prompt", "null")


def complete(inputs: Mapping[str, Input], given: Given) -> Rows:
    """Every input of `inputs`, [N, *shape] of its dtype, for the N >= 1 samples that `given` describes.

    What is left out gets its default, as a view without memory of its own. Complete rows come back as they are.
    Raises InputError, one line, for what this model cannot take.
    """
    if not isinstance(given, Mapping):
        given = {"labels": given}
    wanted = {name for name, one in inputs.items() if one.default is None}
    null = {*_null(inputs)}
    if not wanted <= given.keys() <= inputs.keys() or (given.keys() & null) not in (set(), null):
        raise InputError(
            f"this model is conditioned on {_names(inputs)}, got {', '.join(given)}; "
            + ("pass --labels" if "labels" in inputs else "pass --prompts, a file of those tensors; see FORMAT.md")
        )
    rows = {name: _checked(name, one, given[name]) for name, one in inputs.items() if name in given}
    count = len(rows[next(name for name in inputs if name in wanted)])
    for name, array in rows.items():
        if len(array) != count and (name in wanted or len(array) != 1):
            raise InputError(f"{name} has {len(array)} rows, but there are {count} samples")
    defaults = {name: one.default[None] for name, one in inputs.items() if one.default is not None}
    return {name: np.broadcast_to((defaults | rows)[name], (count, *one.shape)) for name, one in inputs.items()}


def take(rows: Rows, samples: Sequence[int] | NDArray[np.int64]) -> Rows:
    """The rows of `samples`, as contiguous copies in the dtypes of their inputs."""
    chosen = {name: array[np.array(samples)] for name, array in rows.items()}
    return {name: array.astype(np.float32) if array.dtype == np.half else array for name, array in chosen.items()}


def example(inputs: Mapping[str, Input], count: int) -> Rows:
    """`count` conditions to try a model with: its classes in turn, or noise for embeddings, of fewer and fewer tokens.

    Enough for parity and speed; no prompt has such embeddings.
    """
    rows: dict[str, NDArray[Any]] = {}
    for name, one in inputs.items():
        if one.default is not None:
            continue
        if one.classes is not None:
            rows[name] = np.arange(count) % one.classes
        elif one.dtype == "bool":
            rows[name] = np.arange(one.shape[0]) < one.shape[0] - np.arange(count)[:, None] % one.shape[0]
        else:
            rows[name] = gaussian(0, range(count), one.shape)
    return complete(inputs, rows)


def load_prompts(path: Path) -> Mapping[str, NDArray[Any]]:
    """The tensors of a prompts file, unchecked, and in memory as far as they are read: a prompt may be a megabyte.

    Raises InputError where it is absent or no safetensors file.
    """
    if not path.is_file():
        raise InputError(f"no prompts at {path}; it should be a safetensors file, see FORMAT.md")
    try:
        with safe_open(path, "numpy"):  # which checks what the header says
            pass
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            begin = file.tell()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({error}); write it again") from error
    header.pop("__metadata__", None)
    if unknown := sorted({tensor["dtype"] for tensor in header.values()} - STORED.keys()):
        raise InputError(f"{path} holds a tensor of type {', '.join(unknown)}, which numpy lacks; store float32")
    return {name: _mapped(path, begin, **tensor) for name, tensor in header.items()}


def _mapped(path: Path, begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> NDArray[Any]:
    """A tensor of a safetensors file whose data begin at `begin`."""
    if 0 in shape:
        return np.empty(shape, STORED[dtype])
    return np.memmap(path, STORED[dtype], "r", begin + data_offsets[0], tuple(shape))


def _checked(name: str, one: Input, given: Any) -> NDArray[Any]:
    """`given` as dtype[N, *shape]; halves stay halves until they are taken."""
    if one.classes is not None:
        return _labels(given, one.classes)
    array = np.asarray(given)
    if array.ndim != 1 + len(one.shape) or array.shape[1:] != one.shape:
        sizes = ", ".join(map(str, ("N", *one.shape)))
        hint = "; pad or cut prompts to that many tokens" if array.ndim == 1 + len(one.shape) == 3 else ""
        raise InputError(f"{name} has shape {list(array.shape)}, but this model takes [{sizes}]{hint}")
    if not len(array):
        raise InputError(f"{name} is empty; it should have a row for each sample")
    if array.dtype.kind not in "biuf":
        raise InputError(f"{name} is of type {array.dtype}, but this model takes {one.dtype}")
    if one.dtype == "bool" and not ((array == 0) | (array == 1)).all():
        raise InputError(f"{name} should be 1 where a token counts and 0 where it is padding, and nothing else")
    if not all(np.isfinite(array[first : first + BLOCK]).all() for first in range(0, len(array), BLOCK)):
        raise InputError(f"{name} holds NaN or infinity")
    halves = one.dtype == "float32" and array.dtype == np.half
    return array if halves else array.astype(one.dtype, copy=False)


def _labels(given: Any, classes: int) -> NDArray[np.int64]:
    array = np.asarray(given)
    if array.shape == (0,):
        raise InputError("no labels; pass one for each sample, such as 0,1,2")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"labels should be whole numbers in a row, one for each sample, such as 0,1,2; got {given!r}")
    for label in array:
        if not 0 <= label < classes:
            raise InputError(f"label {label} is outside 0..{classes - 1}, the classes of this model")
    return array.astype(np.int64)


def _null(inputs: Mapping[str, Input]) -> list[str]:
    """The names that a null prompt has, which are given together or not at all."""
    return [null_name(name) for name in inputs if null_name(name) != name and null_name(name) in inputs]


def _names(inputs: Mapping[str, Input]) -> str:
    null = _null(inputs)
    wanted = ", ".join(name for name, one in inputs.items() if one.default is None)
    alone = [name for name, one in inputs.items() if one.default is not None and name not in null]
    optional = [*alone, *([" with ".join(null)] if null else [])]
    return f"{wanted} (and {', '.join(optional)})" if optional else wanted
