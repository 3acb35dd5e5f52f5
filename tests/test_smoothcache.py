"""SmoothCache: its errors by their definition, its scan by what it promises."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from conftest import CFG, make_method, make_problem
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from hcompress.caching.smoothcache import measure, scan, schedule
from hcompress.errors import NoSchedule
from hcompress.sampling import constants_of

CALLS = 6


def padded(values):
    """Errors as they are measured: gap g has none at the last g calls."""
    table = values.copy()
    for gap in range(1, len(table) + 1):
        table[gap - 1, -gap:] = np.inf
    return table


ERRORS = st.tuples(st.integers(1, 4), st.integers(5, 12)).flatmap(
    lambda shape: stn.arrays(np.float64, shape, elements=st.floats(0, 1))
)


@given(errors=ERRORS.map(padded), alpha=st.floats(0, 1))
def test_every_run_of_reuse_is_one_that_alpha_allows_and_no_longer_one_is(errors, alpha):
    compute = scan(errors, alpha)
    assert compute[0] and compute[-1]
    at = np.flatnonzero(compute)
    for call, after in pairwise(at):
        allowed = [gap for gap in range(1, len(errors) + 1) if errors[gap - 1, call] <= alpha]
        longest = max(allowed, default=0)
        last = call + 1 + longest > len(compute) - 1  # the last call computes, whatever was allowed before it
        assert after - call - 1 == (len(compute) - 1 - call - 1 if last else longest)


def test_equal_outputs_reuse_as_far_as_may_be_and_the_ends_compute():
    assert scan(padded(np.zeros((3, 50))), 0.0).astype(int).tolist() == [1, 0, 0, 0] * 12 + [1, 1]
    assert scan(padded(np.ones((3, 50))), 0.99).all()


def test_the_errors_are_relative_changes_of_uncached_outputs(skipping_dit):
    problem = make_problem(skipping_dit)
    errors = measure(problem, lookahead=2, samples=2)
    condition, start, noises = problem.draw(1 << 32, 2)
    kept, outputs = [], []
    for call, constants in enumerate(constants_of(skipping_dit, problem.table)):
        seen = {}

        def store(branch, evaluate, seen=seen):
            seen[branch] = evaluate()
            return seen[branch]

        x = problem.table.combine(call, start, outputs, noises)
        outputs.append(skipping_dit.guided(x, condition, constants, CFG, store)[:, :2])
        kept.append(seen)
    for kind, columns in {"attn": range(0, 10, 2), "mlp": range(1, 10, 2)}.items():
        for gap in (1, 2):
            for call in range(CALLS - gap):
                pairs = [(kept[call + gap][n], kept[call][n]) for n in columns]
                changes = [((now - then).abs().sum() / now.abs().sum()).item() for now, then in pairs]
                # 1e-5: float32 sums in the same order, averaged in another
                assert errors[kind][gap - 1, call] == pytest.approx(np.mean(changes), rel=1e-5)
            assert np.isinf(errors[kind][gap - 1, CALLS - gap :]).all()


def test_branches_of_a_kind_share_their_decision_and_a_larger_alpha_ends_in_more_reuse(skipping_dit):
    names, errors = skipping_dit.graph.names, measure(make_problem(skipping_dit), lookahead=3, samples=2)
    finite = np.concatenate([table[np.isfinite(table)] for table in errors.values()])
    masks = [schedule(errors, names, alpha) for alpha in (finite.min() / 2, np.median(finite), finite.max())]
    assert all((mask[:, kind::2] == mask[:, kind : kind + 1]).all() for mask in masks for kind in (0, 1))
    assert masks[0].all() and masks[0].mean() > masks[1].mean() > masks[2].mean()


def test_a_target_by_macs_and_one_that_is_out_of_reach(skipping_dit):
    asked = {"samples": 2, "target_speedup": 1.5}
    mask = make_method("smoothcache", skipping_dit, asked).found().compute
    assert abs(1 / skipping_dit.graph.mac_ratio(mask) - 1 / 1.5) <= 0.1
    with pytest.raises(NoSchedule, match=r"no alpha saves 80 %: .* raise caching.lookahead = 1"):
        make_method("smoothcache", skipping_dit, {"samples": 2, "lookahead": 1, "target_cur": 0.8}).found()
