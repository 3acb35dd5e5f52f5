"""When, on what and how the rows of a comparison were measured: what most record, and which differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

CONDITIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {  # from what hcompress.compare records with a row
    "date": lambda measured: measured["date"],
    "machine": lambda measured: measured["device_name"] + _threads(measured["threads"]),
    "software": lambda measured: ", ".join(f"{name} {number}" for name, number in measured["packages"].items()),
    "timing": lambda measured: f"{_count(measured['batch'], 'sample')} at once, {_rounds(measured['rounds'])}",
}
UNRECORDED = "unrecorded"  # by earlier versions
NOTHING = "nothing yet"
NAMED = 3  # most rows that are named

Recorded = Mapping[str, Mapping[str, Sequence[str]]]
"""One of CONDITIONS -> what it was -> the names of the rows that record it."""


def recorded(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Recorded:
    """What `rows` (name, finished row) record."""
    found: dict[str, dict[str, list[str]]] = {condition: {} for condition in CONDITIONS}
    for name, row in rows:
        for condition, say in CONDITIONS.items():
            what = say(row["measured"]) if "measured" in row else UNRECORDED
            found[condition].setdefault(what, []).append(name)
    return found


def described(found: Recorded, condition: str) -> str:
    """What most rows record of a condition, and what the others do and which those are. Of dates the first and last."""
    rows = found[condition]
    if condition == "date" and rows and UNRECORDED not in rows:
        return " to ".join(dict.fromkeys((min(rows), max(rows))))
    most, *others = sorted(rows, key=lambda what: -len(rows[what])) or [NOTHING]
    differing = "; ".join(f"{what} for {listed(rows[what])}" for what in others)
    return f"{most} (but {differing})" if differing else most


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _threads(number: int | None) -> str:
    return "" if number is None else f", {_count(number, 'thread')}"


def _rounds(number: int) -> str:
    return "one round" if number == 1 else f"median of {number} rounds"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
