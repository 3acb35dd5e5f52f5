"""What each model call of a cached generation computes, keeps and forgets.

A branch either computes or is reused at every call, so what it computed is read again exactly if the *next* call
reuses it. That makes liveness exact, and known before anything runs:

    read[t, b]  = reuse[t, b]
    write[t, b] = compute[t, b] and reuse[t + 1, b]            the last call writes nothing
    free[t, b]  = read[t, b] and not reuse[t + 1, b]

A step may also write what the next call does not read, so as to share the graph of a step whose next call does; then
it frees that slot at once.

A slot holds the output of one branch before its gate. What a reused branch yields is today its slot, as it is. A
correction (a small function of slots and step constants) would be named in `Step`, beside `reads`; nothing else here
assumes that a reused branch reads exactly one slot.

`hcompress_export.freeze` makes plans from masks; this module only knows what a plan is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

Pattern = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""(computes, reads, writes): steps with equal patterns are one graph."""


@dataclass(frozen=True)
class Step:
    """One model call.

    computes: branches that are evaluated, in execution order; all others are reused
    reads:    slots that the reused branches yield
    writes:   slots that take what a computed branch gave: the next call reads it, or the one after an equal step
    frees:    slots that no later call reads before they are written again
    """

    computes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...]

    @property
    def pattern(self) -> Pattern:
        """What decides the graph of this step."""
        return self.computes, self.reads, self.writes


@dataclass(frozen=True)
class Plan:
    """The steps of one generation.

    branches: the N branch names in execution order
    slots:    slot name -> shape of one row of the network's batch, such as (tokens, width)
    steps:    the T steps, first executed call first

    Raises ValueError for a plan that reads a slot before it is written, frees what is not there, or leaks.
    """

    branches: tuple[str, ...]
    slots: Mapping[str, tuple[int, ...]]
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        live: set[str] = set()
        for t, step in enumerate(self.steps):
            for name in {*step.reads, *step.writes, *step.frees} - self.slots.keys():
                raise ValueError(f"step {t} uses slot {name!r}, which has no shape")
            for name in {*step.computes, *step.writes} - {*self.branches}:
                raise ValueError(f"step {t} computes {name!r}, which is no branch")
            for name in {*step.writes} - {*step.computes}:
                raise ValueError(f"step {t} writes slot {name!r} but does not compute it")
            for name in {*step.reads} - live:
                raise ValueError(f"step {t} reads slot {name!r}, which nothing has written")
            live |= {*step.writes}
            for name in {*step.frees} - live:
                raise ValueError(f"step {t} frees slot {name!r}, which holds nothing")
            live -= {*step.frees}
        if live:
            raise ValueError(f"slot {min(live)!r} is never freed")

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The distinct patterns, in the order of their first step."""
        return tuple(dict.fromkeys(step.pattern for step in self.steps))

    @property
    def peak_slots(self) -> int:
        """The most slots that hold something during one step."""
        return self._peak(lambda names: len([*names]))

    def peak_cache_bytes(self, rows: int, itemsize: int = 4) -> int:
        """The most bytes that slots hold during one step, for `rows` rows of the network's batch; exact.

        During a step both what it reads and what it writes is held.
        """
        return self._peak(lambda names: rows * itemsize * sum(prod(self.slots[name]) for name in names))

    def _peak(self, size: Callable[[Iterable[str]], int]) -> int:
        peak, live = 0, set[str]()
        for step in self.steps:
            live |= {*step.writes}
            peak = max(peak, size(live))
            live -= {*step.frees}
        return peak

    def to_json(self) -> dict[str, Any]:
        """Plain tuples and dicts; `from_json` reads them back, from JSON too."""
        return asdict(self)

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` described. Raises KeyError, TypeError or ValueError where it is none."""
        steps = [Step(*(_names(step[f.name]) for f in fields(Step))) for step in plain["steps"]]
        slots = {name: tuple(int(size) for size in shape) for name, shape in plain["slots"].items()}
        return Plan(_names(plain["branches"]), slots, tuple(steps))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} should be a list of names")
    return tuple(value)
