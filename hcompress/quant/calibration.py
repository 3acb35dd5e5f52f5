"""What reaches the inputs of layers along the deployment trajectory, reduced as it passes.

The trajectory is the one that will be deployed: its solver, its calls, its guidance, and a compute mask where there is
one. The call under way is known from the sampler's loop; no layer counts. Noises and conditions come from streams that
neither `generate` nor training reaches.

Legend: T calls, K inputs, B samples, R rows of the network's batch, n values that are kept of an input at a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcompress.adapter import Adapter, Condition
from hcompress.errors import ModelError, RecipeError
from hcompress.lowbit.grid import Grid
from hcompress.quant.selection import Selection
from hcompress.sampling import solver_noises, start_noise, trajectory
from hcompress_runtime.table import SolverTable

CALIBRATION_STREAMS = 1 << 34  # sample numbers that neither `generate` nor a router's training reaches
POINTS, EXPONENT = 80, 2.4  # of the search for a step size: EfficientDM, QDrop (Wei et al. 2022)
LARGEST = 8  # one in as many of the values that are kept is one of the largest


@final
@dataclass(frozen=True)
class Draw:
    """One batch: conditions of B samples, x_T [B, C, H, W] and the solver's noises."""

    condition: Condition
    start: Tensor
    noises: list[Tensor]


@final
@dataclass(frozen=True)
class Walk:
    """The trajectory to calibrate on.

    compute: bool[T, N], which branches run at which call; None: all
    samples: how many there are in all, `batch` at a time

    Raises RecipeError where there are none.
    """

    table: SolverTable
    cfg: float
    samples: int = 16
    batch: int = 8
    seed: int = 0
    compute: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if min(self.samples, self.batch) < 1:
            raise RecipeError(f"{self.samples} samples in batches of {self.batch} calibrate nothing; use at least 1")

    @property
    def num_calls(self) -> int:
        """How many model calls it takes."""
        return self.table.num_calls * -(-self.samples // self.batch)

    def draws(self, adapter: Adapter) -> Iterator[Draw]:
        """The batches. What a sample draws depends on its number alone."""
        for begin in range(0, self.samples, self.batch):
            yield draw(adapter, self, CALIBRATION_STREAMS + begin, min(self.batch, self.samples - begin))


def draw(adapter: Adapter, walk: Walk, first: int, count: int) -> Draw:
    """`count` samples from the streams `first`, `first` + 1, ... of the walk's seed."""
    streams = range(first, first + count)
    keys = [np.random.Philox(key=(walk.seed, stream), counter=(0, 0, 1, 0)) for stream in streams]
    each = [adapter.random_condition(np.random.Generator(key), 1) for key in keys]
    condition = {name: torch.cat([one[name] for one in each]) for name in each[0]}
    start = start_noise(adapter, walk.seed, streams)
    return Draw(condition, start, solver_noises(adapter, walk.table, walk.seed, streams))


def walk_through(
    adapter: Adapter,
    walk: Walk,
    at: Callable[[int], None],
    on_call: Callable[[int], None] = lambda done: None,
) -> None:
    """Run every batch along the trajectory. No gradient.

    at:      told the index of each call before it runs
    on_call: told the number of calls done, of all batches
    """
    done = 0
    for batch in walk.draws(adapter):
        at(0)
        calls = trajectory(
            adapter,
            walk.table,
            batch.condition,
            batch.start,
            cfg=walk.cfg,
            compute=walk.compute,
            noises=batch.noises,
        )
        for call, _ in enumerate(calls):
            at(call + 1)
            done += 1
            on_call(done)


See = Callable[[int, Tensor], None]
"""(index of the call, a layer's input [R, ..., in], valid during the call only)."""


def watch(
    adapter: Adapter, walk: Walk, see: Mapping[str, See], on_call: Callable[[int], None] = lambda done: None
) -> None:
    """Walk, handing the input of each layer in `see` to its function, with the call's index. No walk for no layer."""
    if not see:
        return
    current = 0

    def at(call: int) -> None:
        nonlocal current
        current = call

    def handed(look: See) -> Callable[[Tensor], None]:
        return lambda x: look(current, x)

    with watched(adapter, {name: handed(look) for name, look in see.items()}):
        walk_through(adapter, walk, at, on_call)


@contextmanager
def watched(adapter: Adapter, see: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Hand the input of each layer in `see` to its function, while the context lasts."""

    def hook(look: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: look(args[0])

    hooks = [adapter.network.get_submodule(name).register_forward_pre_hook(hook(look)) for name, look in see.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@final
@dataclass(frozen=True)
class Seen:
    """What reached the K inputs of a Selection.

    amax:    float32[T, K], the largest absolute value; at a call that does not run an input's layers, that of the
             nearest call that does
    ran:     bool[T, K], which calls do
    values:  K times float32[T, n], some of all that was seen (`sampled`)
    weights: K times float32[T, n], how many values each of them stands for; 0 where there is none
    """

    amax: Tensor
    ran: Tensor
    values: list[Tensor]
    weights: list[Tensor]


def observe(
    adapter: Adapter,
    selection: Selection,
    walk: Walk,
    *,
    num_values: int = 4096,
    on_call: Callable[[int], None] = lambda done: None,
) -> Seen:
    """Walk and keep what `Seen` says of every rounded input. Raises ModelError for one that is NaN, infinite or all 0.

    num_values: n; of each batch an equal share, and as much again wherever layers run more than once in a call
    """
    calls, batches = walk.table.num_calls, -(-walk.samples // walk.batch)
    share = -(-num_values // batches)
    names = [selection.readers(column)[0] for column in range(selection.num_inputs)]
    amax = torch.zeros(calls, len(names))
    ran = torch.zeros(calls, len(names), dtype=torch.bool)
    kept: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in range(calls)] for _ in names]
    random = torch.Generator().manual_seed(walk.seed)

    def see(column: int, call: int, x: Tensor) -> None:
        flat = x.detach().flatten()
        amax[call, column] = torch.maximum(amax[call, column], flat.abs().max().float().cpu())  # NaN stays NaN
        ran[call, column] = True
        kept[column][call].append(sampled(flat, share, random))

    watch(adapter, walk, {name: partial(see, column) for column, name in enumerate(names)}, on_call)
    check_amax(amax, ran, names)
    values, weights = ([_rows([[pair[part] for pair in at] for at in each]) for each in kept] for part in (0, 1))
    return Seen(nearest_run(amax, ran), ran, values, weights)


def sampled(flat: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most `count` of the values `flat` [m], and how many each stands for, m in all: float32[n] both.

    An eighth of them are the largest, each for itself: what a step size clips is a few values in a million, of which a
    plain draw has none. The others are drawn and stand for all that is left.
    """
    if flat.numel() <= count:
        return flat.float().cpu(), torch.ones(flat.numel())
    largest = flat.abs().topk(count // LARGEST).indices
    drawn = torch.randint(flat.numel(), (count - len(largest),), generator=random).to(flat.device)
    drawn = drawn[~torch.isin(drawn, largest)]
    each = (flat.numel() - len(largest)) / max(len(drawn), 1)
    weights = torch.cat([torch.ones(len(largest)), torch.full((len(drawn),), each)])
    return flat[torch.cat([largest, drawn])].float().cpu(), weights


def _rows(pieces: list[list[Tensor]]) -> Tensor:
    """[T, n], of each call its pieces in a row, filled up with 0."""
    return nn.utils.rnn.pad_sequence([torch.cat([torch.zeros(0), *at]) for at in pieces], batch_first=True)


def check_amax(amax: Tensor, ran: Tensor, names: list[str]) -> None:
    """Raise ModelError that names the first layer and call whose input is no basis for a step size. All [T, K]."""
    bad = ran & ~(amax.isfinite() & (amax > 0))
    if bad.any():
        call, column = bad.nonzero()[0].tolist()
        value = amax[call, column].item()
        what = "is all zero" if value == 0 else "holds NaN or infinity"
        raise unfit(names[column], call, what)
    never = ~ran.any(dim=0)
    if never.any():
        name = names[int(never.nonzero()[0])]
        raise ModelError(f"{name} never runs on the calibration trajectory; keep that layer with --keep")


def unfit(name: str, call: int, what: str) -> ModelError:
    """The error for an input without a range."""
    return ModelError(f"the input of {name} {what} at call {call}; leave the layer in float with --keep '{name}'")


def nearest_run(values: Tensor, ran: Tensor) -> Tensor:
    """[T, K] with each entry that was not run replaced by its column's at the nearest call that was, earlier first."""
    calls = torch.arange(len(values))
    distance = (calls[:, None] - calls[None]).abs()[:, :, None].float()  # [T, T', 1]
    nearest = torch.where(ran[None], distance, torch.inf).argmin(dim=1)
    return values.gather(0, nearest)


def least_error(values: Tensor, weights: Tensor, amax: Tensor, grid: Grid) -> Tensor:
    """amax [T] with the least sum of |x - Q(x)|^2.4, of 80 that shrink by hundredths.

    values, weights: [T, n], as `sampled` gives them. EfficientDM's initialisation (He et al. 2024; its code, after
    QDrop).
    """
    shares = 1 - 0.01 * torch.arange(POINTS)
    errors = []
    for share in shares:
        scale = (share * amax / grid.high)[:, None]
        errors.append((weights * (values - grid.fake(values, scale)).abs().pow(EXPONENT)).sum(dim=1))
    return amax * shares[torch.stack(errors).argmin(dim=0)]
