"""Corrections: what a reused branch yields in place of its slot as it is.

    v = c + a c + d (c - p) + e (p - q) + b

c is what the branch computed last, p what it computed before that and q before p; all were computed, never corrected
themselves. a, d, e and b are vectors of the branch's width, constants of each (call, branch): how an output drifts
between given calls is much the same for every sample.

    plain      a = d = e = b = 0                     a schedule without Corrections
    taylor     a = b = 0, d and e from the calls     TaylorSeer (Liu et al. 2025), see `differences`
    corrected  all fitted                            hcompress.caching.correct

Of order 1 are corrections that leave q alone, e = 0; of order 2 those that look at it anywhere.

Legend: T model calls, N branches, D width of a branch. A row holds zeros where its branch computes, d and e do where
only one value is known, and e where only two are (`history`): order 2 falls back to order 1, and that to plain reuse,
which is a row of zeros alone.
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
TERMS = ("a", "d", "b", "e")  # as they are stored; e last, for files of order 1 have none


@dataclass(frozen=True)
class Corrections:
    """The vectors of every (call, branch).

    rule:       how they came to be
    a, d, b, e: float32[T, D] for each of the N branches

    Raises ScheduleError for another rule, for shapes or dtypes that do not fit each other, and for NaN or infinity.
    """

    rule: Rule
    a: tuple[NDArray[np.float32], ...]
    d: tuple[NDArray[np.float32], ...]
    b: tuple[NDArray[np.float32], ...]
    e: tuple[NDArray[np.float32], ...]

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ScheduleError(
                f"corrections of rule {self.rule!r} are unknown; it is one of {', '.join(get_args(Rule))}"
            )
        counts = [len(vectors) for vectors in self.terms]
        if len({*counts}) > 1:
            raise ScheduleError(
                f"corrections of {counts[0]}, {counts[1]}, {counts[2]} and {counts[3]} branches; re-learn them"
            )
        for branch, each in enumerate(zip(*self.terms, strict=True)):
            for term, rows in zip(TERMS, each, strict=True):
                if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape != each[0].shape:
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
    def terms(self) -> tuple[tuple[NDArray[np.float32], ...], ...]:
        """a, d, b and e, as TERMS names them."""
        return self.a, self.d, self.b, self.e

    @property
    def stored(self) -> tuple[tuple[NDArray[np.float32], ...], ...]:
        """The terms that are written down: of order 1 all but e."""
        return self.terms if self.order == 2 else self.terms[:-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each branch."""
        return tuple(rows.shape[1] for rows in self.a)

    @property
    def order(self) -> int:
        """2 where v depends on q anywhere, else 1."""
        return 2 if any(rows.any() for rows in self.e) else 1

    @property
    def depth(self) -> NDArray[np.int64]:
        """int[T, N]: how many values before c v depends on: 0, 1 (p), or 2 (p and q)."""
        by_p, by_q = (np.stack([rows.any(axis=1) for rows in vectors], axis=1) for vectors in (self.d, self.e))
        return np.where(by_q, 2, by_p.astype(np.int64))

    @property
    def changes(self) -> NDArray[np.bool_]:
        """bool[T, N], where v is not simply c."""
        return np.stack([np.any(each, axis=(0, 2)) for each in zip(*self.terms, strict=True)], axis=1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is stored."""
        digest = hashlib.sha256()
        for rows in (rows for vectors in self.stored for rows in vectors):
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
            ("extrapolates, but was computed only once before", (self.depth >= 1) & ~compute & ~history(compute)),
            (
                "looks at three values, but was computed only twice before",
                (self.depth == 2) & ~compute & ~history(compute, 2),
            ),
        ):
            if wrong.any():
                call, branch = np.argwhere(wrong)[0]
                raise ScheduleError(
                    f"call {call} of {names[branch]!r} {what}; corrections belong to one mask: re-learn it"
                )

    def fallbacks(self, compute: NDArray[np.bool_]) -> int:
        """How many reused entries have less than rule and order ask for: no p, no q, or vectors that fell to plain."""
        return int((~compute & ~(history(compute, self.order) & self.changes)).sum())

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """As they are stored: `correction.N` of branch N, a, d and b as float32[3, T, D]; of order 2 a, d, b and e."""
        each = zip(*self.stored, strict=True)
        return {f"correction.{branch}": np.stack(terms) for branch, terms in enumerate(each)}

    @staticmethod
    def of_tensors(rule: Rule, tensors: Mapping[str, NDArray[np.float32]]) -> Corrections:
        """What `tensors()` gave. Raises KeyError where a branch is missing, ScheduleError for other shapes."""
        count = sum(name.startswith("correction.") for name in tensors)
        each = [tensors[f"correction.{branch}"] for branch in range(count)]
        most = len(TERMS)
        if any(terms.ndim != 3 or len(terms) not in (most - 1, most) for terms in each):
            raise ScheduleError(
                "corrections must be float32[3, T, D] for each branch, or of order 2 float32[4, T, D]; "
                "copy the schedule again"
            )
        whole = [terms if len(terms) == most else np.concatenate([terms, np.zeros_like(terms[:1])]) for terms in each]
        a, d, b, e = (tuple(terms[index] for terms in whole) for index in range(most))
        return Corrections(rule, a, d, b, e)


def computed_before(compute: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The calls of c, p and q for a branch at each call, int64[3, T, N]; -1 where there is none."""
    calls = np.full((3, *compute.shape), -1)
    for call in range(1, len(compute)):
        known = calls[:, call - 1]
        calls[:, call] = np.where(compute[call - 1], [np.full_like(known[0], call - 1), *known[:2]], known)
    return calls


def history(compute: NDArray[np.bool_], order: int = 1) -> NDArray[np.bool_]:
    """bool[T, N], where a branch is reused and has what this order looks at: p of order 1, q too of order 2."""
    return np.asarray(~compute & (computed_before(compute)[order] >= 0))


def differences(compute: NDArray[np.bool_], order: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """d and e of Taylor's rule, float64[T, N] each, of every entry as if it were reused; 0 where there is no p, no q.

        v = c + x D1 + x^2 / 2 D2        x = t - t_c, h1 = t_c - t_p, h2 = t_p - t_q; t counts calls
        D1 = (c - p) / h1                D2 = (D1 - (p - q) / h2) / h1

    TaylorSeer (Liu et al. 2025): a derivative is how the one of an order less differs from itself at the call computed
    before, over the gap to that call, here the branch's own. Order 1 leaves D2 out. Where gaps are equal, h, a parabola
    is missed by x h f'' / 2, by order 1 by x (x + h) f'' / 2. Newton's divided differences, x (x + h1) / (h1 + h2) in
    place of x^2 / (2 h1), would miss none, and yet measured 0.2 to 0.4 dB worse at T = 20, and between 0.8 worse and
    0.5 better at T = 50 (recipes/LOG.md). So the rule is taken as published.
    """
    c, p, q = computed_before(compute)
    x, h1, h2 = np.arange(len(compute))[:, None] - c, np.maximum(c - p, 1), np.maximum(p - q, 1)
    half = np.where((q >= 0) & (order == 2), x**2 / (2 * h1), 0.0)
    return np.where(p >= 0, x / h1, 0.0) + half / h1, 0.0 - half / h2


def taylor(compute: NDArray[np.bool_], widths: Sequence[int], order: int = 1) -> Corrections:
    """Taylor's rule of this order where q exists, of order 1 where only p does, plain elsewhere; see `differences`."""
    d, e = (np.where(compute, 0, weights).astype(np.float32) for weights in differences(compute, order))
    zeros = tuple(np.zeros((len(compute), width), np.float32) for width in widths)
    spread = [tuple(np.tile(weights[:, [n]], width) for n, width in enumerate(widths)) for weights in (d, e)]
    return Corrections("taylor", zeros, spread[0], zeros, spread[1])
