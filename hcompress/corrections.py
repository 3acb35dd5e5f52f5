"""Corrections: what a reused branch yields in place of its slot as it is.

    v = c + a c + d (c - p) + b

c is what the branch computed last and p what it computed before that; both were computed, never corrected themselves.
a, d and b are vectors of the branch's width, constants of each (call, branch): how an output drifts between two given
calls is much the same for every sample.

    plain      a = d = b = 0                              a schedule without Corrections
    taylor     a = b = 0, d = (t - t_c) / (t_c - t_p)     TaylorSeer (Liu et al. 2025), order 1; t counts calls
    corrected  all three fitted                           hcompress.caching.correct

Legend: T model calls, N branches, D width of a branch. A row holds zeros where its branch computes, and d does where
only one value is known (`history`); a row of zeros alone is plain reuse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import ScheduleError

Rule = Literal["taylor", "corrected"]
Reuse = Literal["plain", "taylor", "corrected"]
TERMS = ("a", "d", "b")


@dataclass(frozen=True)
class Corrections:
    """The vectors of every (call, branch).

    rule:    how they came to be
    a, d, b: float32[T, D] for each of the N branches

    Raises ScheduleError for another rule, for shapes or dtypes that do not fit each other, and for NaN or infinity.
    """

    rule: Rule
    a: tuple[NDArray[np.float32], ...]
    d: tuple[NDArray[np.float32], ...]
    b: tuple[NDArray[np.float32], ...]

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ScheduleError(
                f"corrections of rule {self.rule!r} are unknown; it is one of {', '.join(get_args(Rule))}"
            )
        if not len(self.a) == len(self.d) == len(self.b):
            raise ScheduleError(
                f"corrections of {len(self.a)}, {len(self.d)} and {len(self.b)} branches; re-learn them"
            )
        for branch in range(len(self.a)):
            shape = self.a[branch].shape
            for term, rows in zip(TERMS, (self.a[branch], self.d[branch], self.b[branch]), strict=True):
                if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape != shape:
                    raise ScheduleError(
                        f"correction {term} of branch {branch} must be float32[T, D] like the others, "
                        f"got {rows.dtype}{list(rows.shape)}"
                    )
                if not np.isfinite(rows).all():
                    call = int(np.argmin(np.isfinite(rows).all(axis=1)))
                    raise ScheduleError(
                        f"correction {term} of branch {branch} at call {call} holds NaN or infinity; the file is "
                        "damaged or its fit diverged: re-learn it, or evaluate or export it with --reuse plain"
                    )

    def __len__(self) -> int:
        return len(self.a)

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each branch."""
        return tuple(rows.shape[1] for rows in self.a)

    @property
    def uses_older(self) -> NDArray[np.bool_]:
        """bool[T, N], where v depends on p."""
        return np.stack([rows.any(axis=1) for rows in self.d], axis=1)

    @property
    def changes(self) -> NDArray[np.bool_]:
        """bool[T, N], where v is not simply c."""
        terms = zip(self.a, self.d, self.b, strict=True)
        return np.stack([(a.any(axis=1) | d.any(axis=1) | b.any(axis=1)) for a, d, b in terms], axis=1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all vectors."""
        digest = hashlib.sha256()
        for rows in (*self.a, *self.d, *self.b):
            digest.update(rows.tobytes())
        return digest.hexdigest()

    def check_fits(self, compute: NDArray[np.bool_], names: Sequence[str]) -> None:
        """Raise ScheduleError unless these are corrections of the mask bool[T, N] with branches `names`."""
        if len(self) != len(names):
            raise ScheduleError(
                f"corrections of {len(self)} branches do not fit a schedule of {len(names)}; re-learn it"
            )
        for branch, name in enumerate(names):
            if len(self.a[branch]) != len(compute):
                raise ScheduleError(
                    f"corrections of {name!r} cover {len(self.a[branch])} calls, but the schedule has {len(compute)}"
                )
        for what, wrong in (
            ("is corrected, but is computed there", self.changes & compute),
            ("extrapolates, but was computed only once before", self.uses_older & ~compute & ~history(compute)),
        ):
            if wrong.any():
                call, branch = np.argwhere(wrong)[0]
                raise ScheduleError(
                    f"call {call} of {names[branch]!r} {what}; corrections belong to one mask: re-learn it"
                )

    def fallbacks(self, compute: NDArray[np.bool_]) -> int:
        """How many reused entries have less than their rule asks for: no p, or vectors that fell to plain."""
        return int((~compute & ~(history(compute) & self.changes)).sum())

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """As they are stored: `correction.N`, float32[3, T, D] of branch N, in the order a, d, b."""
        each = zip(self.a, self.d, self.b, strict=True)
        return {f"correction.{branch}": np.stack(terms) for branch, terms in enumerate(each)}

    @staticmethod
    def of_tensors(rule: Rule, tensors: Mapping[str, NDArray[np.float32]]) -> Corrections:
        """What `tensors()` gave. Raises KeyError where a branch is missing, ScheduleError for other shapes."""
        count = sum(name.startswith("correction.") for name in tensors)
        each = [tensors[f"correction.{branch}"] for branch in range(count)]
        if any(terms.ndim != 3 or len(terms) != len(TERMS) for terms in each):
            raise ScheduleError("corrections must be float32[3, T, D] for each branch; copy the schedule again")
        a, d, b = (tuple(terms[index] for terms in each) for index in range(len(TERMS)))
        return Corrections(rule, a, d, b)


def computed_before(compute: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The calls of c and of p for a branch reused at each call, int64[T, N] each; -1 where there is none."""
    last, older = np.full(compute.shape, -1), np.full(compute.shape, -1)
    for call in range(1, len(compute)):
        computed = compute[call - 1]
        last[call] = np.where(computed, call - 1, last[call - 1])
        older[call] = np.where(computed, last[call - 1], older[call - 1])
    return last, older


def history(compute: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool[T, N], where a branch is reused and was computed twice before, so that p exists."""
    return np.asarray(~compute & (computed_before(compute)[1] >= 0))


def taylor(compute: NDArray[np.bool_], widths: Sequence[int]) -> Corrections:
    """Order 1 where p exists, plain elsewhere. TaylorSeer (Liu et al. 2025), differences over a branch's own gap."""
    last, older = computed_before(compute)
    now = np.arange(len(compute))[:, None]
    slope = np.where(history(compute), (now - last) / np.maximum(last - older, 1), 0).astype(np.float32)
    zeros = tuple(np.zeros((len(compute), width), np.float32) for width in widths)
    return Corrections("taylor", zeros, tuple(np.tile(slope[:, [i]], width) for i, width in enumerate(widths)), zeros)
