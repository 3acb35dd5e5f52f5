"""What every caching method is given, what it gives back, and how it is run.

    method = CACHING[settings.method](problem, settings)
    for progress in method.run(): ...        # nothing to see where nothing is trained
    method.found()                           # the mask, and how it came to be

Legend: T model calls, N branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hcompress.adapter import Adapter, Condition, Told
from hcompress.corrections import Corrections
from hcompress.errors import ModelError
from hcompress.process import Process
from hcompress.sampling import check_finite, sample, solver_noises, start_noise, trajectory
from hcompress.schedule import Identity
from hcompress_runtime.table import SolverTable

TINY = 1e-20  # least mean squared error by which anything is divided
TRAINING_STREAMS, SCORING_STREAMS = 1 << 32, 1 << 33  # sample numbers that `generate` never reaches
SCORED = 4  # samples of a score


class Ranks(Protocol):
    """What data-parallel training needs: this process's number, how many there are, and a mean over them."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def world(self) -> int:
        """How many processes there are."""

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all ranks."""


@dataclass(frozen=True)
class OneProcess:
    """Ranks of a run in a single process."""

    rank: int = 0
    world: int = 1

    def mean(self, tensor: Tensor) -> Tensor:
        """`tensor` itself."""
        return tensor


class Images(Protocol):
    """Real images as the denoiser's own samples, endless, in an order that the run's seed decides."""

    @property
    def count(self) -> int:
        """How many different ones there are."""

    @property
    def broken(self) -> list[str]:
        """Files that could not be read so far; others took their place."""

    def batch(self, first: int, count: int, *, flip: bool) -> tuple[Tensor, list[Told]]:
        """Images `first` .. `first` + `count` - 1: samples [count, C, H, W], and what is known of each."""


@dataclass(frozen=True)
class Problem:
    """One model under one solver at one guidance scale, for which a schedule is wanted.

    process:  how the model's training noised images, at each call
    images:   opens a folder of them, or the model's own data for None. Raises DataError
    notice:   is told what a person should know
    teacher:  whose uncached output a router learns to match; None: that of `adapter`
    first:    float32[T, N], logits that a router starts from; None: as its settings say
    identity: what a schedule of it belongs to; None where that plays no part
    """

    adapter: Adapter
    table: SolverTable
    cfg: float
    seed: int
    process: Callable[[], Process]
    images: Callable[[str | None], Images]
    ranks: Ranks = field(default_factory=OneProcess)
    teacher: Adapter | None = None
    first: NDArray[np.float32] | None = None
    notice: Callable[[str], None] = lambda line: None
    identity: Identity | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, N)."""
        return self.table.num_calls, len(self.adapter.graph)

    def rng(self, stream: int, use: int) -> np.random.Generator:
        """Chance for anything but noise, by stream and use; `hcompress_runtime.noise` counts its draws elsewhere."""
        return np.random.Generator(np.random.Philox(key=(self.seed, stream), counter=(0, 0, use, 0)))

    def draw(self, first: int, count: int) -> tuple[Condition, Tensor, list[Tensor]]:
        """Conditions, x_T and solver noises of the streams `first`, ...; what a sample draws is not up to its batch."""
        streams = range(first, first + count)
        each = [self.adapter.random_condition(self.rng(stream, 1), 1) for stream in streams]
        condition = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        noises = solver_noises(self.adapter, self.table, self.seed, streams)
        return condition, start_noise(self.adapter, self.seed, streams), noises

    def score_db(
        self, compute: NDArray[np.bool_], corrections: Corrections | None = None, count: int = SCORED
    ) -> float:
        """Signal-to-noise ratio (dB) of samples under `compute` against the teacher's, on held-out noise.

        -inf where they are not finite. Raises ModelError where the teacher's are not.
        """
        condition, start, noises = self.draw(SCORING_STREAMS, count)
        dense = sample(self.teacher or self.adapter, self.table, condition, start, cfg=self.cfg, noises=noises)
        reuse: dict[str, Any] = {"compute": compute, "corrections": corrections}
        cached = sample(self.adapter, self.table, condition, start, cfg=self.cfg, noises=noises, **reuse)
        error = functional.mse_loss(cached, dense).item()
        ratio = dense.square().mean().item() / max(error, TINY)
        return 10 * math.log10(ratio) if 0 < ratio < math.inf else -math.inf

    def scores_db(
        self, compute: NDArray[np.bool_], candidates: Mapping[str, Corrections], count: int
    ) -> dict[str, float]:
        """`score_db` of `count` samples of each, the best first; only those whose samples are finite."""
        scored = {name: self.score_db(compute, one, count) for name, one in candidates.items()}
        finite = {name: score for name, score in scored.items() if score > -math.inf}
        return dict(sorted(finite.items(), key=lambda item: -item[1]))


def check_first_call(problem: Problem) -> None:
    """Raise ModelError where the model's first output is not finite already, as with damaged weights."""
    condition, start, noises = problem.draw(SCORING_STREAMS, 1)
    calls = trajectory(problem.adapter, problem.table, condition, start, cfg=problem.cfg, noises=noises)
    check_finite([output for _, output, _ in islice(calls, 1)])


def check_loss(loss: float, call: int, outputs: Mapping[int, Tensor]) -> None:
    """Raise ModelError for a loss at `call` that is not finite. outputs: of the model alone, by call, that it is of."""
    if math.isfinite(loss):
        return
    for at, output in outputs.items():
        check_finite([output], at)
    raise ModelError(f"training diverged at call {call}: the loss is not finite; lower caching.lr")


@dataclass(frozen=True)
class Progress:
    """What one round of training did: a trajectory of HarmoniCa, a sweep of Learning-to-Cache.

    CURs count T N entries; `unpolarised` is the share of r in (0.1, 0.9). score_db is the signal-to-noise ratio of the
    *hard* schedule's samples, the uncached ones being the signal, on held-out noise; None between scorings.
    """

    round: int
    loss: float
    mse: float
    beta: float
    expected_cur: float
    hard_cur: float
    unpolarised: float
    score_db: float | None


@dataclass(frozen=True)
class Found:
    """What a method came to.

    compute: bool[T, N]
    history: what it settled on, for the schedule's `method`
    logits:  float32[T, N] of a router
    records: what it measured, one JSON object a line of metrics.jsonl, where it did not train
    """

    compute: NDArray[np.bool_]
    history: Mapping[str, Any] = field(default_factory=dict)
    logits: NDArray[np.float32] | None = None
    records: Sequence[dict[str, Any]] = ()


class Method(Protocol):
    """A method at work on a problem. Between two yields of `run`, `state()` is a checkpoint."""

    @property
    def rounds(self) -> int:
        """How many rounds it trains, 0 where nothing is trained."""

    @property
    def done(self) -> int:
        """How many it has trained."""

    def run(self) -> Iterator[Progress]:
        """Train the rounds that are left."""

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, for torch.save; loads with `weights_only=True`."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""

    def found(self) -> Found:
        """What it has come to. Raises ScheduleError where that is nothing."""


@final
@dataclass(frozen=True)
class Untrained:
    """A Method that has nothing to train: `find` gives the schedule."""

    find: Callable[[], Found]
    rounds: int = 0
    done: int = 0

    def run(self) -> Iterator[Progress]:
        """Nothing."""
        return iter(())

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on from."""

    def found(self) -> Found:
        """What `find` gives."""
        return self.find()
