"""Schedules that nothing is learned for: FORA's intervals, chance, and turns.

Each gives bool[T, N], row 0 executed first and always full. Legend: T model calls, N branches.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.caching.settings import Convention
from hcompress.errors import NoSchedule, ScheduleError

FAR = 0.1  # of a wanted CUR: what comes no nearer is no answer


def interval(
    num_calls: int, num_branches: int, *, every: int, convention: Convention = "alternate"
) -> NDArray[np.bool_]:
    """FORA (Selvaraju et al. 2024): all branches share one decision, full once in `every` calls.

    alternate: full where the call's number, from 0, is a multiple of `every`; gives the papers' CUR of 50 % at 2
    countdown: full where t is, with t = T - 1 at the first call and 0 at the last, and at the first; the released code
    """
    if every < 1:
        raise ScheduleError(f"an interval of {every} calls does not exist; pass 1 or more")
    call = np.arange(num_calls)
    full = (call if convention == "alternate" else num_calls - 1 - call) % every == 0
    full[0] = True
    return np.tile(full[:, None], num_branches)


def nearest_interval(
    num_calls: int, num_branches: int, cur: float, *, convention: Convention | None = None
) -> NDArray[np.bool_]:
    """The interval whose CUR is nearest to `cur`, of either convention or of the one given.

    Of two that are equally near it is the one that reuses less.
    T calls allow few CURs: at T = 20 and N of any size 0, 45, 50, 60, 65, 70, ... %. Report the one that came out.
    Raises NoSchedule where the nearest is further away than FAR, or reuses nothing.
    """
    masks = {
        (every, kind): interval(num_calls, num_branches, every=every, convention=kind)
        for every in range(1, num_calls + 1)
        for kind in ([convention] if convention else get_args(Convention))
    }
    reached = {key: float(1 - mask.mean()) for key, mask in masks.items()}
    best = min(masks, key=lambda key: (round(abs(reached[key] - cur), 9), reached[key]))
    if abs(reached[best] - cur) > FAR or reached[best] == 0:
        least = min((value for value in reached.values() if value), default=0.0)
        raise NoSchedule(
            f"no interval of {num_calls} calls comes near a CUR of {100 * cur:.0f} %: 0 and {100 * least:.0f} % are "
            "the lowest there are; pass caching.every, or another target"
        )
    return masks[best]


def random_mask(num_calls: int, num_branches: int, *, cur: float, seed: int) -> NDArray[np.bool_]:
    """Exactly round(cur T N) reused entries, uniform over all such sets that leave row 0 full.

    Raises NoSchedule for a CUR above (T - 1) / T, which no schedule reaches.
    """
    reused = _entries(num_calls, num_branches, cur)
    mask = np.ones(num_calls * num_branches, np.bool_)
    free = np.arange(num_branches, mask.size)
    mask[np.random.default_rng(seed).choice(free, reused, replace=False)] = False
    return mask.reshape(num_calls, num_branches)


def uniform_mask(num_calls: int, num_branches: int, *, cur: float) -> NDArray[np.bool_]:
    """Exactly round(cur T N) reused entries: each branch reuses as often as any other, evenly spread over its calls.

    Branch n is ahead of its even spread by the n-th fraction of the golden ratio, so that the branches take turns and
    no call does much more than another. Raises NoSchedule for a CUR above (T - 1) / T.
    """
    each, more = divmod(_entries(num_calls, num_branches, cur), num_branches)
    turn = np.arange(num_branches) * (math.sqrt(5) - 1) / 2 % 1.0
    quota = np.full(num_branches, each)
    quota[:more] += 1
    due = np.floor(np.arange(num_calls)[:, None] * quota / (num_calls - 1) + turn + 1e-9)  # reused so far, [T, N]
    mask = np.ones((num_calls, num_branches), np.bool_)
    mask[1:] = np.diff(due, axis=0) == 0
    return mask


def _entries(num_calls: int, num_branches: int, cur: float) -> int:
    """round(cur T N), which leaves row 0 full."""
    entries = num_calls * num_branches
    reused = round(cur * entries)
    if not 0 <= reused <= entries - num_branches:
        most = (num_calls - 1) / num_calls
        raise NoSchedule(f"a CUR of {cur:.4g} is out of reach: {num_calls} calls allow 0 to {most:.4g}")
    return reused


def parse_rule(text: str, num_calls: int, graph: BranchGraph) -> NDArray[np.bool_]:
    """The mask that a rule on the command line asks for: `random:CUR[:SEED]`, `uniform:CUR`, `interval:EVERY`.

    Raises ScheduleError for any other text, and for a rule that `num_calls` calls do not allow.
    """
    rule, *values = text.split(":")
    try:
        if rule == "random" and len(values) in (1, 2):
            cur, seed = float(values[0]), int(values[1]) if values[1:] else 0
            if math.isfinite(cur) and seed >= 0:
                return random_mask(num_calls, len(graph), cur=cur, seed=seed)
        elif rule == "uniform" and len(values) == 1 and math.isfinite(float(values[0])):
            return uniform_mask(num_calls, len(graph), cur=float(values[0]))
        elif rule == "interval" and len(values) == 1:
            return interval(num_calls, len(graph), every=int(values[0]))
    except ValueError:
        pass
    raise ScheduleError(
        f"{text!r} is no rule; write random:CUR or random:CUR:SEED, such as random:0.375, uniform:CUR, or "
        "interval:EVERY, such as interval:2"
    )
