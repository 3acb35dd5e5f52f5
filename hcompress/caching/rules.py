"""Schedules that nothing is learned for: FORA's intervals, and chance.

Each gives bool[T, N], row 0 executed first and always full. Legend: T model calls, N branches.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.errors import ScheduleError

Convention = Literal["alternate", "countdown"]


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


def nearest_interval(num_calls: int, num_branches: int, cur: float) -> NDArray[np.bool_]:
    """The interval of either convention whose CUR is nearest to `cur`; of two equally near, the one that reuses less.

    T calls allow few CURs: at T = 20 and N of any size 0, 45, 50, 60, 65, 70, ... %. Report the one that came out.
    """
    masks = [
        interval(num_calls, num_branches, every=every, convention=convention)
        for every in range(1, num_calls + 1)
        for convention in get_args(Convention)
    ]
    return min(masks, key=lambda mask: (round(abs(1 - mask.mean() - cur), 9), -mask.mean()))


def random_mask(num_calls: int, num_branches: int, *, cur: float, seed: int) -> NDArray[np.bool_]:
    """Exactly round(cur T N) reused entries, uniform over all such sets that leave row 0 full.

    Raises ScheduleError for a CUR above (T - 1) / T, which no schedule reaches.
    """
    entries = num_calls * num_branches
    reused = round(cur * entries)
    if not 0 <= reused <= entries - num_branches:
        most = (num_calls - 1) / num_calls
        raise ScheduleError(f"a CUR of {cur:.4g} is out of reach: {num_calls} calls allow 0 to {most:.4g}")
    mask = np.ones(entries, np.bool_)
    free = np.arange(num_branches, entries)
    mask[np.random.default_rng(seed).choice(free, reused, replace=False)] = False
    return mask.reshape(num_calls, num_branches)


def parse_rule(text: str, num_calls: int, graph: BranchGraph) -> NDArray[np.bool_]:
    """The mask that a rule on the command line asks for: `random:CUR`, `random:CUR:SEED` or `interval:EVERY`.

    Raises ScheduleError for any other text, and for a rule that `num_calls` calls do not allow.
    """
    rule, *values = text.split(":")
    try:
        if rule == "random" and len(values) in (1, 2):
            cur, seed = float(values[0]), int(values[1]) if values[1:] else 0
            if math.isfinite(cur) and seed >= 0:
                return random_mask(num_calls, len(graph), cur=cur, seed=seed)
        elif rule == "interval" and len(values) == 1:
            return interval(num_calls, len(graph), every=int(values[0]))
    except ValueError:
        pass
    raise ScheduleError(
        f"{text!r} is no rule; write random:CUR or random:CUR:SEED, such as random:0.375, or interval:EVERY, "
        "such as interval:2"
    )
