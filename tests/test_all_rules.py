"""Properties of every schedule that nothing is learned for, and the CURs that caching.md, section 7, gives for FORA."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from hcompress.caching.rules import interval, nearest_interval, random_mask
from hcompress.errors import ScheduleError

RULES = {
    "alternate": partial(interval, every=2),
    "alternate 3": partial(interval, every=3, convention="alternate"),
    "countdown": partial(interval, every=2, convention="countdown"),
    "countdown 3": partial(interval, every=3, convention="countdown"),
    "nearest": partial(nearest_interval, cur=0.4),
    "random": partial(random_mask, cur=0.4, seed=0),
}


def cur(compute: np.ndarray) -> float:
    return float(1 - compute.mean())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("num_calls", [2, 7, 20, 50])
def test_a_rule_gives_a_mask_whose_first_row_is_full_the_same_each_time(rule, num_calls):
    compute = rule(num_calls, 6)
    assert compute.shape == (num_calls, 6) and compute.dtype == np.bool_
    assert compute[0].all()
    assert (compute == rule(num_calls, 6)).all()


@pytest.mark.parametrize("num_calls", [10, 20, 50, 100])
def test_alternate_reuses_half_of_an_even_number_of_calls(num_calls):
    assert cur(interval(num_calls, 56, every=2)) == 0.5


@pytest.mark.parametrize(("num_calls", "want"), [(20, 0.45), (50, 0.48), (100, 0.49)])
def test_countdown_computes_one_call_more(num_calls, want):
    compute = interval(num_calls, 56, every=2, convention="countdown")
    assert cur(compute) == pytest.approx(want)
    assert compute[:2].all() and not compute[2].any()  # t = T - 1 because it is first, T - 2 because it is even


def test_countdown_of_three_is_full_18_times_in_50():
    assert interval(50, 1, every=3, convention="countdown").sum() == 18


def test_an_interval_is_full_at_its_multiples_only():
    for every in range(1, 8):
        assert np.flatnonzero(interval(20, 1, every=every)).tolist() == list(range(0, 20, every))
        countdown = np.flatnonzero(interval(20, 1, every=every, convention="countdown"))
        assert countdown.tolist() == sorted({0} | {19 - t for t in range(0, 20, every)})


def test_all_branches_share_the_decision_of_an_interval():
    compute = nearest_interval(20, 6, 0.6)
    assert (compute == compute[:, :1]).all()


def test_nearest_is_no_further_than_any_other():
    for wanted in np.linspace(0, 1, 21):
        others = [interval(20, 4, every=n, convention=c) for n in range(1, 21) for c in ("alternate", "countdown")]
        got = abs(cur(nearest_interval(20, 4, wanted)) - wanted)
        assert got == pytest.approx(min(abs(cur(other) - wanted) for other in others))
    assert cur(nearest_interval(20, 4, 0.475)) == pytest.approx(0.45)  # 0.50 is as near and reuses more


@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.4, 0.95])
def test_random_reuses_exactly_what_is_asked(wanted):
    masks = [random_mask(20, 6, cur=wanted, seed=seed) for seed in range(4)]
    assert all((~mask).sum() == round(wanted * 120) for mask in masks)
    if 0 < wanted < 0.95:
        assert len({mask.tobytes() for mask in masks}) == 4


def test_random_is_uniform_over_all_rows_but_the_first():
    masks = np.array([random_mask(5, 4, cur=0.4, seed=seed) for seed in range(400)])
    share = 1 - masks[:, 1:].mean(axis=0)
    # 8 of 16 free entries: each is reused half of the time, standard deviation 0.5 / sqrt(400) = 0.025; five of them.
    assert np.abs(share - 0.5).max() < 0.125


def test_what_no_schedule_can_reach_is_refused():
    with pytest.raises(ScheduleError, match=r"CUR of 0\.96 is out of reach: 20 calls allow 0 to 0\.95"):
        random_mask(20, 6, cur=0.96, seed=0)
    with pytest.raises(ScheduleError, match="interval of 0 calls"):
        interval(20, 6, every=0)
