"""The reference sampler: an adapter under a schedule, with the cache in plain sight.

    x_k   = solver table (start noise, outputs so far, noises)                  hcompress_runtime.table
    o_k   = guided network output; every branch either computes and overwrites its slot, or yields its slot, as it is
            or corrected (hcompress.corrections); under IDDPM with the call's noise in it (hcompress_runtime.table)
    x_T   = the finished sample

All other ways to run a schedule (frozen graphs, a patched diffusers pipeline) are tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hcompress.adapter import Adapter, Condition, Route, compute_all
from hcompress.corrections import Corrections
from hcompress.errors import ModelError, SolverError
from hcompress_runtime.conditions import Given, complete, take
from hcompress_runtime.noise import gaussian
from hcompress_runtime.table import SolverTable

Slots = MutableMapping[int, Tensor]
"""Branch index -> what it computed last, [R, *Branch.shape], before the gate: c of hcompress.corrections."""

Older = MutableMapping[int, tuple[Tensor, ...]]
"""Branch index -> what it computed before that, latest first: (p,) or (p, q), as far as corrections ask for it.

Neither ever holds a corrected value.
"""


class Terms(NamedTuple):
    """The correction of one branch at one call, [D] each; None is zero."""

    a: Tensor | None
    d: Tensor | None
    b: Tensor | None
    e: Tensor | None


NOTHING: Mapping[int, Terms] = MappingProxyType({})  # corrected at a call of plain reuse


def corrected(c: Tensor, older: Sequence[Tensor], terms: Terms) -> Tensor:
    """v = c + a c + d (c - p) + e (p - q) + b for c and `older`, (p, q), [R, L, D] each.

    Of p and q only those have to be there that a term looks at: Corrections.check_fits sees to it.
    """
    v = c
    if terms.a is not None:
        v = v + terms.a * c
    if terms.d is not None:
        v = v + terms.d * (c - older[0])
    if terms.e is not None:
        v = v + terms.e * (older[0] - older[1])
    return v if terms.b is None else v + terms.b


def store(slots: Slots, branch: int, value: Tensor, older: Older | None, depth: int) -> None:
    """Make `value` what `branch` computed last; `older`, where it is given, keeps `depth` of those before it."""
    if older is not None and branch in slots:
        older[branch] = (slots[branch], *older.get(branch, ()))[:depth]
    slots[branch] = value


def terms_of(
    corrections: Corrections | None, num_calls: int, device: torch.device, dtype: torch.dtype
) -> list[dict[int, Terms]]:
    """The corrections of each of the T calls, where they change anything, in the dtype that the network computes in."""
    every: list[dict[int, Terms]] = [{} for _ in range(num_calls)]
    if corrections is not None:
        for call, branch in np.argwhere(corrections.changes).tolist():
            rows = (vectors[branch][call] for vectors in corrections.terms)
            terms = [torch.from_numpy(row).to(device, dtype) if row.any() else None for row in rows]
            every[call][branch] = Terms(*terms)
    return every


def hard_route(
    compute: NDArray[np.bool_],
    slots: Slots,
    terms: Mapping[int, Terms] = NOTHING,
    older: Older | None = None,
    depth: int = 1,
) -> Route:
    """Compute-or-reuse for one model call. compute: bool[N]. HarmoniCa's inference rule, and its correction.

    terms: of the branches that are corrected at this call; older: filled `depth` deep where it is given, see `store`
    """

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        if compute[branch]:
            store(slots, branch, evaluate(), older, depth)
        elif branch in terms:
            return corrected(slots[branch], older.get(branch, ()) if older is not None else (), terms[branch])
        return slots[branch]

    return route


def fill_route(slots: Slots) -> Route:
    """Compute everything and store it: the first call of a trajectory, a forced full call, a trace."""

    def route(branch: int, evaluate: Callable[[], Tensor]) -> Tensor:
        slots[branch] = evaluate()
        return slots[branch]

    return route


def start_noise(adapter: Adapter, seed: int, samples: Sequence[int]) -> Tensor:
    """x_T, float32[B, C, H, W], from the documented generator (hcompress_runtime.noise)."""
    return torch.from_numpy(gaussian(seed, samples, adapter.sample_shape)).to(adapter.device)


def solver_noises(adapter: Adapter, table: SolverTable, seed: int, samples: Sequence[int]) -> list[Tensor]:
    """The M noises of a stochastic solver, float32[B, C, H, W] each; empty for a deterministic one."""
    shape = adapter.sample_shape
    draws = [gaussian(seed, samples, shape, draw=m + 1) for m in range(table.num_noises)]
    return [torch.from_numpy(draw).to(adapter.device) for draw in draws]


def constants_of(adapter: Adapter, table: SolverTable) -> list[dict[str, Tensor]]:
    """The step constants of each of the T calls, one row each; with gain and slope of the noise where it is learned."""
    every = dict(adapter.step_constants(torch.from_numpy(table.timesteps).to(adapter.device)))
    if table.learned is not None:
        gain, slope = torch.from_numpy(table.learned).to(adapter.device, torch.float32).unbind(1)
        every |= {"noise_gain": gain, "noise_slope": slope}
    return [{name: rows[call : call + 1] for name, rows in every.items()} for call in range(table.num_calls)]


def solver_output(raw: Tensor, constants: Mapping[str, Tensor], noise: Tensor | None, channels: int) -> Tensor:
    """What the solver goes by, [B, channels, H, W], of a raw guided output [B, C_out, H, W].

    A learned variance is left out, unless the solver scales the call's `noise` [B, channels, H, W] by it.
    Raises SolverError where there is none.
    """
    output = raw if raw.shape[1] == channels else raw[:, :channels]
    if noise is None:
        return output
    if raw.shape[1] < 2 * channels:
        raise SolverError(
            f"this solver takes its variance from the model, which gives {raw.shape[1]} channels and not "
            f"{2 * channels}; use ddpm, whose variance is fixed"
        )
    variance = raw[:, channels : 2 * channels]
    return output + constants["noise_gain"] * noise * torch.exp(constants["noise_slope"] * (1 + variance))


@torch.no_grad()
def sample(
    adapter: Adapter,
    table: SolverTable,
    condition: Condition,
    start: Tensor,
    *,
    cfg: float,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
    noises: Sequence[Tensor] = (),
) -> Tensor:
    """Generate [B, C, H, W] from `start`, caching as `compute` bool[T, N] says; None computes everything.

    Raises ModelError where what the model computes without reuse is not finite; reuse may diverge.
    """
    calls = trajectory(
        adapter, table, condition, start, cfg=cfg, compute=compute, corrections=corrections, noises=noises
    )
    outputs = [output for _, output, _ in calls]
    finished = table.combine(table.num_calls, start, outputs, noises)
    if not finished.isfinite().all():
        check_finite(outputs if compute is None else outputs[:1])
    return finished


def check_finite(outputs: Sequence[Tensor], first: int = 0) -> None:
    """Raise ModelError at the first model output of the calls `first`, ... that is not finite."""
    for call, output in enumerate(outputs, first):
        if not output.isfinite().all():
            raise ModelError(
                f"the model's output is not finite at call {call}: its weights are damaged, or overflow in this "
                "precision; copy or convert it again, or use float32"
            )


@torch.no_grad()
def trajectory(
    adapter: Adapter,
    table: SolverTable,
    condition: Condition,
    start: Tensor,
    *,
    cfg: float,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
    noises: Sequence[Tensor] = (),
) -> Iterator[tuple[Tensor, Tensor, dict[int, Tensor]]]:
    """(x, guided output, slots) of each of the T calls; x and output [B, C, H, W], slots one dict for all calls."""
    channels = adapter.sample_shape[0]
    slots: dict[int, Tensor] = {}
    depth = 0 if corrections is None else int(corrections.depth.max())
    older: Older = {}
    terms = terms_of(corrections, table.num_calls, adapter.device, adapter.dtype)
    outputs: list[Tensor] = []
    for call, constants in enumerate(constants_of(adapter, table)):
        x = table.combine(call, start, outputs, noises)
        route = compute_all if compute is None else hard_route(compute[call], slots, terms[call], older, depth)
        raw = adapter.guided(x, condition, constants, cfg, route)
        outputs.append(solver_output(raw, constants, table.noise_of(call, noises), channels))
        yield x, outputs[-1], slots


def sample_seeded(
    adapter: Adapter,
    table: SolverTable,
    labels: Given,
    *,
    seed: int,
    cfg: float,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
    batch: int = 64,
    first: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Generate one sample for each label, in batches; sample i draws stream `first` + i of `seed`.

    A text-conditional model is given arrays instead of labels, see hcompress_runtime.conditions.
    """
    rows = complete(adapter.conditions, labels)
    count = len(next(iter(rows.values())))
    finished = []
    for begin in range(0, count, batch):
        end = min(begin + batch, count)
        streams = range(first + begin, first + end)
        start = start_noise(adapter, seed, streams)
        noises = solver_noises(adapter, table, seed, streams)
        condition = adapter.condition(take(rows, range(begin, end)))
        finished.append(
            sample(adapter, table, condition, start, cfg=cfg, compute=compute, corrections=corrections, noises=noises)
        )
        progress(end)
    return torch.cat(finished)
