"""What all text-conditional families do with prompts, whatever each is told of one.

There is no text encoder here: prompts come as its outputs, see hcompress_runtime.conditions. A file of them in the
model's folder, `prompts.safetensors`, is what training and scoring draw from, where the null prompt is found, and how
many tokens a prompt has.

Nothing is scored on the prompts that it learned from. Prompts 0-3, 8-11, 16-19, ... are for learning: training,
fitting, calibration. Prompts 4-7, 12-15, ... are for scoring. Fours take turns, and not one prompt after the other, so
that both halves hold what comes every second or fourth time, such as concepts that zoo:emoji-pixart was never shown. A
file of fewer than 8 is all for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from hcompress.adapter import Adapter, Condition
from hcompress.errors import InputError, ModelError
from hcompress_runtime.conditions import Given, Input, Rows, complete, load_prompts, null_name, take

FILE = "prompts.safetensors"
END = 1 << 20  # bytes of a file that may have gigabytes
TURN = 4  # prompts in a row for the one, then for the other
ENCODED = {"prompt_embeds", "prompt_mask"}  # what `hcompress encode` makes of a prompt

Prompts = Mapping[str, NDArray[Any]]
"""The tensors of a prompts file."""

Adapted = TypeVar("Adapted")


class PromptAdapter(Adapter):
    """An adapter that is conditioned on prompts; subclasses set `prompts`, and `conditions` to those of them."""

    prompts: PromptInputs

    @final
    def null_condition(self, condition: Condition) -> Condition:
        """The null prompts, which `condition` holds beside the prompts. Raises ModelError where there are none."""
        return self.prompts.null(condition)

    @final
    def random_condition(self, rng: np.random.Generator, count: int) -> Condition:
        """Prompts drawn uniformly from the model's own for learning. Raises ModelError where it has none."""
        return self.condition(self.prompts.random(rng, count))

    @final
    def even_conditions(self, count: int, first: int = 0) -> Given:
        """The model's own prompts for scoring, round robin. Raises ModelError where it has none."""
        return self.prompts.even(count, first)


@final
class PromptInputs:
    """What a model is told of a prompt, and the prompts of its own.

    prompt:  its inputs, by name; a null prompt has the same under their `null_name`
    prompts: the model's own; None where it has none
    null:    the null prompt unless `prompts` hold one; None where there is none then
    other:   inputs that are no part of a prompt, with defaults

    `conditions` are all of these. Raises InputError for prompts that do not fit.
    """

    def __init__(
        self,
        prompt: Mapping[str, Input],
        prompts: Prompts | None,
        *,
        null: Prompts | None = None,
        other: Mapping[str, Input] | None = None,
    ) -> None:
        self.prompt = prompt
        if null is None and prompts is not None and {null_name(name) for name in prompt} <= prompts.keys():
            null = zeros(prompt)
        nulls = {null_name(name): one for name, one in prompt.items() if null is not None}
        defaults: Prompts = null or {}
        self.conditions = {**prompt, **_with_defaults(nulls, defaults), **(other or {})}
        self.own: Rows | None = None if prompts is None else complete(self.conditions, prompts)
        if self.own is not None:
            own = take({name: self.own[name] for name in nulls}, [0])
            self.conditions |= _with_defaults(nulls, {name: rows[0] for name, rows in own.items()})

    def null(self, condition: Condition) -> Condition:
        """The null prompts, which `condition` holds beside the prompts, and all that is no part of either.

        Raises ModelError where the model has no null prompt.
        """
        nulls = {null_name(name): name for name in self.prompt}
        if not nulls.keys() <= self.conditions.keys():
            raise ModelError(
                "guidance leads away from a null prompt, and this model has none: pass --cfg 1 for no guidance, or put "
                f"{' and '.join(nulls)} into the {FILE} in its folder"
            )
        other = condition.keys() - nulls.keys() - self.prompt.keys()
        return {name: condition[null] for null, name in nulls.items()} | {name: condition[name] for name in other}

    def random(self, rng: np.random.Generator, count: int) -> Rows:
        """`count` prompts drawn uniformly from the model's own for learning. Raises ModelError where it has none."""
        return self._rows(lambda own: rng.choice(halves(own)[0], count))

    def even(self, count: int, first: int = 0) -> Rows:
        """The model's own prompts for scoring, round robin. Raises ModelError where it has none."""
        return self._rows(lambda own: scored(own, count, first))

    def _rows(self, choose: Callable[[int], NDArray[np.int64]]) -> Rows:
        if self.own is None:
            encoded = {*self.prompt} == ENCODED
            raise ModelError(
                "this model has no prompts to draw from: "
                + ("hcompress encode MODEL --from CAPTIONS.txt --for-training; or " if encoded else "")
                + f"put {FILE} into its folder, a file with "
                f"{', '.join(name for name in self.conditions if name != 'guidance')} (export/FORMAT.md)"
            )
        chosen = choose(len(self.own[next(iter(self.prompt))]))
        return take(self.own, chosen)


def halves(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of `count` prompts are for learning, and which for scoring: all for both where there are fewer than 8."""
    numbers = np.arange(count)
    if count < 2 * TURN:
        return numbers, numbers
    learning = numbers // TURN % 2 == 0
    return numbers[learning], numbers[~learning]


def scored(prompts: int, count: int, first: int = 0) -> NDArray[np.int64]:
    """Which of `prompts` each of `count` samples from `first` on is asked for when they are scored: int64[count]."""
    return halves(prompts)[1].take(range(first, first + count), mode="wrap")


def fingerprint(folder: Path) -> str | None:
    """What tells a model's own prompts from others: SHA-256 of the file's size and of either END; None without any."""
    if not (file := folder / FILE).is_file():
        return None
    size = file.stat().st_size
    with file.open("rb") as opened:
        ends = opened.read(END)  # the words, where they are kept
        opened.seek(max(0, size - END))
        ends += opened.read()
    return hashlib.sha256(size.to_bytes(8, "little") + ends).hexdigest()


def zeros(prompt: Mapping[str, Input]) -> Prompts:
    """A null prompt of zeros."""
    return {null_name(name): np.zeros(one.shape, one.dtype) for name, one in prompt.items()}


def tokens_of(prompts: Prompts | None, otherwise: int) -> int:
    """How many tokens a prompt has: as many as those of the model's own, or `otherwise`."""
    embeds = np.empty(0) if prompts is None else np.asarray(prompts.get("prompt_embeds", 0))
    return int(embeds.shape[1]) if embeds.ndim == 3 else otherwise


def with_prompts(folder: Path, adapt: Callable[[Prompts | None], Adapted]) -> Adapted:
    """`adapt` of the prompts that lie beside `folder`, a pipeline's transformer.

    Raises ModelError where they do not fit the model.
    """
    prompts = folder.parent / FILE
    try:
        return adapt(load_prompts(prompts) if prompts.exists() else None)
    except InputError as error:
        raise ModelError(f"{prompts} does not fit the model: {error}") from error


def _with_defaults(inputs: Mapping[str, Input], defaults: Prompts) -> dict[str, Input]:
    return {name: replace(one, default=defaults[name]) for name, one in inputs.items()}
