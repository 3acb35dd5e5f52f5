"""Properties of every schedule that nothing is learned for, and the CURs that caching.md, section 7, gives for FORA."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from hcompress.branches import Branch, BranchGraph
from hcompress.caching.long_skips import deepcache, faster_diffusion
from hcompress.caching.rules import FAR, interval, nearest_interval, random_mask, uniform_mask
from hcompress.errors import NoSchedule, ScheduleError

RULES = {
    "alternate": partial(interval, every=2),
    "alternate 3": partial(interval, every=3, convention="alternate"),
    "countdown": partial(interval, every=2, convention="countdown"),
    "countdown 3": partial(interval, every=3, convention="countdown"),
    "nearest": partial(nearest_interval, cur=0.4),
    "random": partial(random_mask, cur=0.4, seed=0),
    "uniform": partial(uniform_mask, cur=0.4),
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
    for conventions in (["alternate"], ["countdown"], ["alternate", "countdown"]):
        only = conventions[0] if len(conventions) == 1 else None
        for wanted in np.linspace(0.4, 1, 13):
            others = [interval(20, 4, every=n, convention=c) for n in range(1, 21) for c in conventions]
            got = abs(cur(nearest_interval(20, 4, wanted, convention=only)) - wanted)
            assert got == pytest.approx(min(abs(cur(other) - wanted) for other in others))
            assert got <= FAR
    assert cur(nearest_interval(20, 4, 0.475)) == pytest.approx(0.45)  # 0.50 is as near and reuses more


@pytest.mark.parametrize("wanted", [0.0, 0.05, 0.2, 0.34])
def test_an_interval_that_would_be_far_off_is_refused(wanted):
    with pytest.raises(NoSchedule, match=f"CUR of {100 * wanted:.0f} %: 0 and 45 % are the lowest"):
        nearest_interval(20, 4, wanted)


@pytest.mark.parametrize("wanted", [0.0, 0.1, 0.37, 0.5, 0.95])
@pytest.mark.parametrize(("num_calls", "num_branches"), [(20, 6), (7, 20), (50, 56)])
def test_uniform_spreads_exactly_what_is_asked_over_branches_and_calls(num_calls, num_branches, wanted):
    wanted = min(wanted, (num_calls - 1) / num_calls)
    mask = uniform_mask(num_calls, num_branches, cur=wanted)
    assert (~mask).sum() == round(wanted * mask.size)
    of_branch, of_call = (~mask).sum(axis=0), (~mask)[1:].sum(axis=1)
    assert np.ptp(of_branch) <= 1
    # Golden-ratio phases fill an interval with at most log(N) more or fewer points than its share: 4 for N <= 56.
    assert np.abs(of_call - of_call.mean()).max() <= 4
    quota = of_branch.max() / (
        num_calls - 1
    )  # evenly spread: between computing twice there are at most this many calls
    if quota < 1:
        longest = max(len(run) for column in mask.T for run in "".join("cr"[not x] for x in column).split("c"))
        assert longest <= np.ceil(quota / (1 - quota))


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
    for rule in (partial(random_mask, seed=0), uniform_mask):
        with pytest.raises(NoSchedule, match=r"CUR of 0\.96 is out of reach: 20 calls allow 0 to 0\.95"):
            rule(20, 6, cur=0.96)
    with pytest.raises(ScheduleError, match="interval of 0 calls"):
        interval(20, 6, every=0)


DEPTH = 3
BLOCKS = [f"in.{i}" for i in range(DEPTH)] + ["mid"] + [f"out.{i}" for i in range(DEPTH)]
UVIT = BranchGraph(tuple(Branch(f"{block}.{kind}", 8, (4, 2), 8) for block in BLOCKS for kind in ("attn", "mlp")), 4, 4)
LONG_SKIPS = {
    "deepcache": partial(deepcache, UVIT, every=3, pairs=1),
    "deepcache 2": partial(deepcache, UVIT, every=2, pairs=2),
    "faster-diffusion": partial(faster_diffusion, UVIT, every=4),
    "keys": partial(faster_diffusion, UVIT, keys=[1, 5]),
}


@pytest.mark.parametrize("rule", LONG_SKIPS.values(), ids=LONG_SKIPS)
def test_long_skip_rules_compute_everything_first_and_whole_blocks_always(rule):
    compute = rule(7)
    assert compute.shape == (7, len(UVIT)) and compute[0].all() and not compute.all()
    assert (compute[:, ::2] == compute[:, 1::2]).all()  # attention and MLP of a block share their decision


def computed(row):
    return [block for block, flag in zip(BLOCKS, row[::2], strict=True) if flag]


def test_deepcache_keeps_the_outermost_pairs_between_full_calls():
    compute = deepcache(UVIT, 7, every=3, pairs=2)
    assert [len(computed(row)) for row in compute] == [7, 4, 4, 7, 4, 4, 7]
    assert computed(compute[1]) == ["in.0", "in.1", "out.1", "out.2"]
    # caching.md gives 1 / N + (1 - 1 / N) 2 m / blocks for the cost; 7 of 7 calls have one full call more than 7 / 3.
    assert deepcache(UVIT, 6, every=3, pairs=2).mean() == pytest.approx(1 / 3 + 2 / 3 * 4 / 7)


def test_faster_diffusion_runs_the_decoder_alone_between_keys():
    compute = faster_diffusion(UVIT, 6, keys=[3])
    assert [len(computed(row)) for row in compute] == [7, 3, 3, 7, 3, 3]
    assert computed(compute[1]) == ["out.0", "out.1", "out.2"]
    assert (faster_diffusion(UVIT, 6, every=3) == compute).all()


def test_what_no_network_can_do_is_refused():
    for rule in (partial(deepcache, every=2, pairs=1), partial(faster_diffusion, every=2)):
        with pytest.raises(NoSchedule, match=r"no long skips: its branches are called 0\.attn"):
            rule(BranchGraph((Branch("0.attn", 1, (1,), 1),), 1, 1), 5)
    with pytest.raises(NoSchedule, match="3 pairs of blocks would leave nothing to reuse; pass 1 to 2"):
        deepcache(UVIT, 5, every=2, pairs=DEPTH)
    with pytest.raises(NoSchedule, match="key call 5 is outside 0 to 4"):
        faster_diffusion(UVIT, 5, keys=[5])
