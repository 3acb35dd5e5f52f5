"""What a reused branch yields: the arithmetic against a loop written out by hand, and what no schedule may hold."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_problem, make_table, random_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load, save
from test_sampling import mask
from test_schedule import COMPUTE, GRAPH, IDENTITY, schedule

from hcompress.branches import BranchGraph
from hcompress.corrections import Corrections, computed_before, history, taylor
from hcompress.errors import ScheduleError
from hcompress.sampling import constants_of, hard_route, sample, start_noise, terms_of
from hcompress.schedule import Schedule

CPU = torch.device("cpu")


def drawn(compute: np.ndarray, widths: tuple[int, ...], seed: int = 0, order: int = 2) -> Corrections:
    """Corrections of every reused entry, none of them zero; d only where there is a p, e only where there is a q."""
    random = np.random.default_rng(seed)

    def term(allowed: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = [random.uniform(0.1, 0.5, (len(compute), width)).astype(np.float32) for width in widths]
        return tuple(row * allowed[:, [branch]] for branch, row in enumerate(rows))

    by_q = history(compute, 2) & (order == 2)
    return Corrections("corrected", term(~compute), term(history(compute)), term(~compute), term(by_q))


def plain(compute: np.ndarray, widths: tuple[int, ...]) -> Corrections:
    zeros = tuple(np.zeros((len(compute), width), np.float32) for width in widths)
    return Corrections("corrected", zeros, zeros, zeros, zeros)


def by_hand(computed: list, a, d, b, e):
    """What a branch yields of all that it ever computed, by the formula; what there is not counts as zero."""
    c, p, q = ([0, 0, *computed])[:-4:-1]
    return (1 + a) * c + d * (c - p) + e * (p - q) + b


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
def test_c_p_and_q_are_the_last_three_computed_values(calls: int, branches: int, seed: int) -> None:
    compute = random_mask(calls, branches, seed=seed)
    c, p, q = computed_before(compute)
    for call in range(calls):
        for branch in range(branches):
            before = [-1, -1, -1, *np.flatnonzero(compute[:call, branch]).tolist()]
            assert [q[call, branch], p[call, branch], c[call, branch]] == before[-3:]
    assert (history(compute) == (~compute & (p >= 0))).all()
    assert (history(compute, 2) == (~compute & (q >= 0))).all()


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 2))
def test_a_route_yields_the_rule_on_computed_values(seed: int, order: int) -> None:
    """By hand: lists of everything computed so far, and the formula. Exact but for the order of four additions."""
    compute, widths = random_mask(8, 3, seed=seed), (2, 3, 4)
    vectors = drawn(compute, widths, seed, order)
    random, slots, older = np.random.default_rng(seed), {}, {}
    computed: list[list[np.ndarray]] = [[], [], []]
    for call, terms in enumerate(terms_of(vectors, len(compute), CPU, torch.float32)):
        route = hard_route(compute[call], slots, terms, older, order)
        for branch, width in enumerate(widths):
            fresh = random.standard_normal((5, 4, width), np.float32)
            got = route(branch, lambda fresh=fresh: torch.from_numpy(fresh)).numpy()
            if compute[call, branch]:
                computed[branch].append(fresh)
                want = fresh
            else:
                want = by_hand(computed[branch], *(term[branch][call] for term in vectors.terms))
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert all(len(values) <= order for values in older.values())


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 99), order=st.integers(1, 2))
def test_a_sample_is_the_rule_on_recorded_values(tiny_dit, seed: int, order: int) -> None:
    """A generation whose route keeps all that was ever computed, and knows no slots."""
    problem = make_problem(tiny_dit)
    compute = random_mask(*problem.shape, reuse=0.4, seed=seed)
    vectors = drawn(compute, tiny_dit.graph.widths, seed, order)
    condition, start, _ = problem.draw(0, 2)
    computed: list[list[torch.Tensor]] = [[] for _ in tiny_dit.graph.names]
    outputs: list[torch.Tensor] = []
    for call, constants in enumerate(constants_of(tiny_dit, problem.table)):

        def route(branch: int, evaluate, call=call) -> torch.Tensor:
            if not compute[call, branch]:
                return by_hand(computed[branch], *(torch.from_numpy(term[branch][call]) for term in vectors.terms))
            computed[branch].append(evaluate())
            return computed[branch][-1]

        x = problem.table.combine(call, start, outputs)
        with torch.no_grad():
            outputs.append(tiny_dit.guided(x, condition, constants, problem.cfg, route))
    want = problem.table.combine(len(compute), start, outputs)
    got = sample(tiny_dit, problem.table, condition, start, cfg=problem.cfg, compute=compute, corrections=vectors)
    # as for a route, over 6 calls of a network
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_corrections_of_zeros_are_plain_reuse_to_the_bit(cfg: float, tiny_dit) -> None:
    compute = mask()
    table, start = make_table(calls=len(compute))[0], start_noise(tiny_dit, 1, range(3))
    condition = tiny_dit.label_condition([0, 1, 2])
    for corrections in (plain(compute, tiny_dit.graph.widths), drawn(compute, tiny_dit.graph.widths)):
        how = {"cfg": cfg, "compute": compute}
        without = sample(tiny_dit, table, condition, start, **how)
        with_them = sample(tiny_dit, table, condition, start, corrections=corrections, **how)
        assert torch.equal(without, with_them) == (not corrections.changes.any())


def continued(corrections: Corrections, compute: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What each call yields, [T, N, D], where a branch would give `values`."""
    slots, older, found = {}, {}, np.empty_like(values)
    for call, terms in enumerate(terms_of(corrections, len(compute), CPU, torch.float32)):
        route = hard_route(compute[call], slots, terms, older, corrections.order)
        for branch in range(compute.shape[1]):
            found[call, branch] = route(branch, lambda call=call, n=branch: torch.from_numpy(values[call, n])).numpy()
    return found


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_continues_a_straight_line_and_falls_back_where_too_few_values_are_known(order: int) -> None:
    compute = np.array([[1, 1], [0, 1], [1, 0], [0, 0], [0, 1], [1, 0]], bool)
    line = np.arange(6, dtype=np.float32)[:, None, None] * np.float32([[1, 2], [3, 4]])
    corrections = taylor(compute, (2, 2), order)
    want = line.copy()
    want[1, 0] = line[0, 0]
    np.testing.assert_allclose(continued(corrections, compute, line), want, atol=1e-5)  # thirds in float32 (6e-8)
    without_q = [(1, 0), (3, 0), (4, 0), (2, 1), (3, 1)]
    assert corrections.order == order and corrections.fallbacks(compute) == (1 if order == 1 else len(without_q))
    if order == 2:
        assert {*map(tuple, np.argwhere(corrections.depth == 2).tolist())} == {(5, 1)}
        first = taylor(compute, (2, 2))
        for call, branch in without_q:
            assert (corrections.d[branch][call] == first.d[branch][call]).all()


@pytest.mark.parametrize("gap", [2, 3, 4])
def test_what_either_order_misses_of_a_parabola_is_known(gap: int) -> None:
    """Of k t^2, x calls after the last of equal gaps h: order 1 misses k x (x + h), order 2 k x h."""
    calls, k = 5 * gap, np.float32([0.5, -2.0])
    compute = (np.arange(calls) % gap == 0)[:, None]
    parabola = np.arange(calls)[:, None, None].astype(np.float32) ** 2 * k
    x = (np.arange(calls) % gap)[:, None, None]
    missed = {1: k * x * (x + gap), 2: k * x * gap}
    settled = np.arange(calls) >= 2 * gap  # where there is a q
    for order, want in missed.items():
        got = parabola - continued(taylor(compute, (2,), order), compute, parabola)
        np.testing.assert_allclose(got[settled], want[settled], atol=1e-3)  # float32 (6e-8) of up to 800, a few times


@given(st.integers(3, 12), st.integers(0, 99), st.integers(1, 2))
def test_taylor_is_the_recursion_of_the_paper(calls: int, seed: int, order: int) -> None:
    """Derivatives kept and renewed as TaylorSeer does: each computed call takes differences of what was kept."""
    compute, random = random_mask(calls, 2, reuse=0.4, seed=seed), np.random.default_rng(seed)
    values = random.standard_normal((calls, 2, 3), np.float32)
    got = continued(taylor(compute, (3, 3), order), compute, values)
    for branch in range(2):
        kept: list[np.ndarray] = []
        last = 0
        for call in range(calls):
            if compute[call, branch]:
                renewed = [values[call, branch]]
                for known in kept[:order]:
                    renewed.append((renewed[-1] - known) / (call - last))
                kept, last = renewed, call
            want = sum((call - last) ** i / math.factorial(i) * derivative for i, derivative in enumerate(kept))
            # sums of at most six terms, the largest weight being 12^2: float32 (6e-8) a few hundred times
            np.testing.assert_allclose(got[call, branch], want, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 2))
def test_a_saved_schedule_keeps_its_corrections_and_its_fingerprint(tmp_path_factory, seed: int, order: int) -> None:
    compute, path = random_mask(6, 4, reuse=0.4, seed=seed), tmp_path_factory.mktemp("saved") / "s.safetensors"
    one = schedule(compute=compute, logits=None, corrections=drawn(compute, GRAPH.widths, seed, order))
    one.save(path)
    loaded = Schedule.load(path)
    assert loaded.fingerprint == one.fingerprint
    assert loaded.fingerprint != schedule(compute=compute, logits=None).fingerprint or (compute[1:]).all()
    assert loaded.reuse == "corrected" and loaded.corrections is not None
    for got, want in zip(loaded.corrections.terms, one.corrections.terms, strict=True):
        for ours, theirs in zip(got, want, strict=True):
            assert (ours == theirs).all() and ours.dtype == np.float32
    assert loaded.order == one.order == (2 if order == 2 and history(compute, 2).any() else 1)
    assert {rows.shape[0] for name, rows in load(path.read_bytes()).items() if "correction" in name} == {2 + one.order}


def test_order_1_is_written_as_it_was_before_there_was_a_second(tmp_path: Path) -> None:
    """Three rows a branch, and a fingerprint of these: files and fingerprints of then stay what they were."""
    one = drawn(COMPUTE, GRAPH.widths, order=1)
    rows = {f"correction.{n}": np.stack(terms) for n, terms in enumerate(zip(one.a, one.d, one.b, strict=True))}
    assert {name: array.tobytes() for name, array in one.tensors().items()} == {
        name: array.tobytes() for name, array in rows.items()
    }
    assert one.fingerprint == hashlib.sha256(b"".join(row.tobytes() for row in (*one.a, *one.d, *one.b))).hexdigest()
    loaded = Corrections.of_tensors("corrected", rows)
    assert loaded.fingerprint == one.fingerprint and not any(row.any() for row in loaded.e)
    schedule(corrections=one).save(tmp_path / "s.safetensors")
    before = (tmp_path / "s.safetensors").read_bytes()
    Schedule.load(tmp_path / "s.safetensors").save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == before


@pytest.mark.parametrize("rule", ["plain", "taylor", "corrected", None])
def test_a_schedule_keeps_its_order_under_its_own_rule_alone(rule: str | None, tmp_path: Path) -> None:
    compute = np.array([[1] * 4, [1] * 4, [1] * 4, [0] * 4, [0] * 4], bool)
    second = taylor(compute, GRAPH.widths, order=2)
    for own in ("taylor", "corrected"):
        one = schedule(compute=compute, corrections=replace(second, rule=own))
        one.save(tmp_path / "s.safetensors")
        if rule == "corrected" != own:
            continue
        got = Schedule.load(tmp_path / "s.safetensors", reuse=rule).reusing(rule, GRAPH)
        assert got.fingerprint == one.reusing(rule, GRAPH).fingerprint
        assert (got.reuse, got.order) == (rule or own, 2 if rule in (None, own) else 1)


def test_a_schedule_changes_its_rule_where_that_needs_no_fit() -> None:
    fitted = schedule(corrections=drawn(COMPUTE, GRAPH.widths))
    assert [fitted.reusing(rule, GRAPH).reuse for rule in ("plain", "taylor", "corrected")] == [
        "plain",
        "taylor",
        "corrected",
    ]
    assert fitted.reusing(None, GRAPH) is fitted
    assert schedule().fingerprint == fitted.reusing("plain", GRAPH).fingerprint
    with pytest.raises(ScheduleError, match=r"holds no fitted corrections, its rule is plain; .*--reuse corrected"):
        schedule().reusing("corrected", GRAPH)
    with pytest.raises(ScheduleError, match="no rule of reuse 'magic'; choose from: plain, taylor, corrected"):
        schedule().reusing("magic", GRAPH)


GOOD = drawn(COMPUTE, GRAPH.widths)


def changed(term: str, call: int, branch: int, value: float) -> Corrections:
    rows = [row.copy() for row in getattr(GOOD, term)]
    rows[branch][call, 0] = value
    return replace(GOOD, **{term: tuple(rows)})


WRONG = {
    "NaN": (lambda: changed("a", 1, 1, np.nan), "correction a of branch 1 at call 1 holds NaN or infinity"),
    "infinite": (lambda: changed("b", 2, 0, np.inf), "correction b of branch 0 at call 2 holds NaN or infinity"),
    "computed": (lambda: changed("b", 3, 0, 1.0), "call 3 of '0.attn' is corrected, but is computed there"),
    "no p": (lambda: changed("d", 1, 1, 1.0), "call 1 of '0.mlp' extrapolates, but was computed only once"),
    "no p for e": (lambda: changed("e", 1, 1, 1.0), "call 1 of '0.mlp' extrapolates, but was computed only once"),
    "no q": (lambda: changed("e", 2, 3, 1.0), "call 2 of '1.mlp' looks at three values, but was computed only twice"),
    "few branches": (lambda: drawn(COMPUTE[:, :3], GRAPH.widths[:3]), "of 3 branches do not fit a schedule of 4"),
    "few calls": (lambda: drawn(COMPUTE[:4], GRAPH.widths), "cover 4 calls, but the schedule has 5"),
    "halves": (lambda: replace(GOOD, a=tuple(r.astype(np.float16) for r in GOOD.a)), "must be float32.* got float16"),
    "other rule": (lambda: replace(GOOD, rule="magic"), "rule 'magic' are unknown; it is one of taylor, corrected"),
    "ragged": (lambda: replace(GOOD, b=GOOD.b[:2]), "corrections of 4, 4, 2 and 4 branches"),
    "no e": (lambda: replace(GOOD, e=()), "corrections of 4, 4, 4 and 0 branches"),
    "ragged e": (
        lambda: replace(GOOD, e=tuple(r[:, :3] for r in GOOD.e)),
        r"correction e of branch 0 .* float32\[5, 3\]",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_in_one_line(make, message) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule(corrections=make())
    assert "\n" not in str(caught.value)


def test_corrections_of_another_width_are_refused() -> None:
    wide = tuple(replace(branch, shape=(4, 9 if branch.name == "1.attn" else 8)) for branch in GRAPH.branches)
    with pytest.raises(ScheduleError, match=r"corrections of '1\.attn' are 8 wide, but in zoo:tiny .* is 9 wide"):
        schedule(corrections=GOOD).check_fits(BranchGraph(wide, 5, 7), IDENTITY)
    schedule(corrections=GOOD).check_fits(GRAPH, IDENTITY)


def test_a_file_that_lacks_a_branch_or_has_other_rows_is_refused(tmp_path: Path) -> None:
    schedule(corrections=GOOD).save(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "numpy") as file:
        metadata = file.metadata()
    tensors = load((tmp_path / "good.safetensors").read_bytes())
    rows = tensors["correction.1"]
    for change in (None, rows[0], rows[:2], np.concatenate([rows, rows[:2]])):
        broken = {name: tensor for name, tensor in tensors.items() if name != "correction.1"}
        if change is not None:
            broken["correction.1"] = change
        (tmp_path / "bad.safetensors").write_bytes(save(broken, metadata))
        with pytest.raises(ScheduleError) as caught:
            Schedule.load(tmp_path / "bad.safetensors")
        assert "\n" not in str(caught.value)


def test_only_fitted_corrections_warn_at_another_guidance_scale() -> None:
    fitted = schedule(corrections=GOOD)
    assert fitted.fitted_elsewhere(1.5) is None
    assert "fitted at guidance 1.5, not 3.0" in fitted.fitted_elsewhere(3.0)
    assert fitted.reusing("taylor", GRAPH).fitted_elsewhere(3.0) is schedule().fitted_elsewhere(3.0) is None
