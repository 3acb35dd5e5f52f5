"""Caching methods: from a model under a solver to a schedule. One line in CACHING for each, imported when asked for.

All are given a Problem and their settings (a class of settings.py each) and give a Method; see problem.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hcompress.caching.problem import Method, Problem


def _harmonica(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.harmonica import Training

    return Training(problem, settings)


def _learning_to_cache(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.learning_to_cache import LearningToCache

    return LearningToCache(problem, settings)


def _smoothcache(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.problem import Untrained
    from hcompress.caching.smoothcache import smoothcache

    return Untrained(partial(smoothcache, problem, settings))


def _interval(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.rules import interval, nearest_interval

    if settings.every is not None:
        return _found(interval(*problem.shape, every=settings.every, convention=settings.convention or "alternate"))
    return _found(nearest_interval(*problem.shape, settings.target_cur, convention=settings.convention))


def _random(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.rules import random_mask

    return _found(random_mask(*problem.shape, cur=settings.target_cur, seed=problem.seed))


def _uniform(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.rules import uniform_mask

    return _found(uniform_mask(*problem.shape, cur=settings.target_cur))


def _deepcache(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.long_skips import deepcache

    graph, calls = problem.adapter.graph, problem.table.num_calls
    return _found(deepcache(graph, calls, every=settings.every, pairs=settings.pairs))


def _faster_diffusion(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.long_skips import faster_diffusion

    graph, calls = problem.adapter.graph, problem.table.num_calls
    return _found(faster_diffusion(graph, calls, every=settings.every, keys=settings.keys))


def _given(problem: Problem, settings: Any) -> Method:
    from hcompress.caching.problem import Found, Untrained
    from hcompress.schedule import Schedule

    schedule = Schedule.load(Path(settings.schedule), reuse="plain")
    schedule.check_fits(problem.adapter.graph, problem.identity or schedule.identity)
    return Untrained(lambda: Found(schedule.compute, {"given": schedule.method}, schedule.logits))


def _found(mask: NDArray[np.bool_]) -> Method:
    from hcompress.caching.problem import Found, Untrained

    return Untrained(lambda: Found(mask))


CACHING: dict[str, Callable[[Problem, Any], Method]] = {
    "harmonica": _harmonica,
    "learning-to-cache": _learning_to_cache,
    "smoothcache": _smoothcache,
    "interval": _interval,
    "random": _random,
    "uniform": _uniform,
    "deepcache": _deepcache,
    "faster-diffusion": _faster_diffusion,
    "given": _given,
}
