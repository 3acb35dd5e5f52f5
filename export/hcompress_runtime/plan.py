"""What each model call of a cached generation computes, keeps and forgets.

A branch either computes or is reused at every call, so what it computed is read again exactly if the *next* call
reuses it. That makes liveness exact, and known before anything runs:

    read[t, b]  = reuse[t, b]
    write[t, b] = compute[t, b] and reuse[t + 1, b]            the last call writes nothing
    free[t, b]  = read[t, b] and not reuse[t + 1, b]

A step may also write what the next call does not read, so as to share the graph of a step whose next call does; then
it frees that slot at once.

A slot holds the output of one branch before its gate, and what a reused branch yields is that, as it is or corrected:

    v = gain c + before p + share q + offset        c: computed last, p: before that, q: before p; vectors [width]

A correction that looks at p needs a second slot, `<branch>.before`, one of order 2 a third for q,
`<branch>.before.before`. Of the ways to have c and c - p at hand this moves least: c is written once, is read as c, and
becomes p when the branch is computed again, and q the time after, by a change of names. Kept as c and c - p, a
computing call would read p, write twice and hold three values; this way no call holds more than two, or with q three.
So p lives from the call that computes c to the last one that is corrected by it, or until it is q, q likewise, and a
value that only a later correction reads is written although no call reuses it. Where c has a single reader, the call
that computes it may write the finished v in its place: the reusing call is then one of plain reuse, and p and q are
free a call earlier.

`hcompress_export.freeze` makes plans from masks; this module only knows what a plan is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, NamedTuple

OPTIONAL = ("keeps", "corrects")  # of a step, where a plan is written down


def before(branch: str) -> str:
    """The slot of what `branch` computed before it computed what its own slot holds: p; `before` of that is q's."""
    return f"{branch}.before"


class Pattern(NamedTuple):
    """What decides the graph of a step: steps with equal patterns are one graph. See Step; `reads` are of its graph."""

    computes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    corrects: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One model call.

    computes: branches that are evaluated, in execution order; all others are reused
    reads:    slots that the reused branches yield, then those that corrections ask for beside them
    writes:   slots that take what a computed branch gave: the next call reads it, or the one after an equal step
    frees:    slots that no later call reads before they are written again
    keeps:    slots of computed branches, their own or p's, that become `before(slot)`, all at once and before all else
    corrects: what enters corrections: branches, whose value is corrected when it is read or, where they are computed,
              when it is written; and the slots of p and q where those count. A step that shares the graph of one where
              they do may have no p or no q: the graph is then given the value computed after it in its place, and the
              vectors of the step leave it out
    """

    computes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    frees: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    corrects: tuple[str, ...] = ()

    @property
    def pattern(self) -> Pattern:
        """What decides the graph of this step."""
        older = {before(name) for name in self.corrects}
        reused = tuple(name for name in self.reads if name not in older)
        return Pattern(self.computes, reused, self.writes, self.corrects)


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
            kept = {before(name) for name in step.keeps}
            older = {before(name) for name in step.corrects}
            for name in ({*step.reads, *step.writes, *step.frees} | kept) - self.slots.keys():
                raise ValueError(f"step {t} uses slot {name!r}, which has no shape")
            for name in {*step.computes, *step.writes} - {*self.branches}:
                raise ValueError(f"step {t} computes {name!r}, which is no branch")
            for name in {*step.writes, *step.keeps} - {*step.computes, *map(before, step.computes)}:
                raise ValueError(f"step {t} writes slot {name!r} but does not compute it")
            for name in {*step.corrects} - {*step.reads, *step.writes} - older:
                raise ValueError(f"step {t} corrects {name!r}, which it neither reads nor writes")
            for name in {*step.reads} - {*self.branches, *step.corrects}:
                raise ValueError(f"step {t} reads slot {name!r} but corrects nothing by it")
            for name in {*step.keeps} - live:
                raise ValueError(f"step {t} keeps slot {name!r}, which holds nothing")
            live -= {*step.keeps}
            for name in kept & live:
                raise ValueError(f"step {t} writes slot {name!r} over what it holds")
            live |= kept
            for name in {*step.reads} - live:
                raise ValueError(f"step {t} reads slot {name!r}, which nothing has written")
            for name in {*step.writes} & live:
                raise ValueError(f"step {t} writes slot {name!r} over what it holds")
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
            live = live - {*step.keeps} | {before(name) for name in step.keeps} | {*step.writes}
            peak = max(peak, size(live))
            live -= {*step.frees}
        return peak

    def to_json(self) -> dict[str, Any]:
        """Plain tuples and dicts; `from_json` reads them back, from JSON too.

        What only corrections need is left out of a step that has none, so a plan of plain reuse reads as it always did.
        """
        plain = asdict(self)
        steps = [
            {name: names for name, names in step.items() if names or name not in OPTIONAL} for step in plain["steps"]
        ]
        return plain | {"steps": tuple(steps)}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` described. Raises KeyError, TypeError or ValueError where it is none."""
        steps = [
            Step(*(_names(step.get(f.name, ()) if f.name in OPTIONAL else step[f.name]) for f in fields(Step)))
            for step in plain["steps"]
        ]
        slots = {name: tuple(int(size) for size in shape) for name, shape in plain["slots"].items()}
        return Plan(_names(plain["branches"]), slots, tuple(steps))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{value!r} should be a list of names")
    return tuple(value)
