"""What a reused branch yields: the arithmetic against a loop written out by hand, and what no schedule may hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_table, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load, save
from test_sampling import mask
from test_schedule import COMPUTE, GRAPH, IDENTITY, schedule

from hcompress.branches import BranchGraph
from hcompress.corrections import Corrections, computed_before, history, taylor
from hcompress.errors import ScheduleError
from hcompress.sampling import hard_route, sample, start_noise, terms_of
from hcompress.schedule import Schedule

CPU = torch.device("cpu")


def drawn(compute: np.ndarray, widths: tuple[int, ...], seed: int = 0) -> Corrections:
    """Corrections of every reused entry, none of them zero; d only where there is history."""
    random, known = np.random.default_rng(seed), history(compute)

    def term(allowed: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = [random.uniform(0.1, 0.5, (len(compute), width)).astype(np.float32) for width in widths]
        return tuple(row * allowed[:, [branch]] for branch, row in enumerate(rows))

    return Corrections("corrected", term(~compute), term(known), term(~compute))


def plain(compute: np.ndarray, widths: tuple[int, ...]) -> Corrections:
    zeros = tuple(np.zeros((len(compute), width), np.float32) for width in widths)
    return Corrections("corrected", zeros, zeros, zeros)


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
def test_c_and_p_are_the_last_two_computed_values(calls: int, branches: int, seed: int) -> None:
    compute = random_mask(calls, branches, seed=seed)
    last, older = computed_before(compute)
    for call in range(calls):
        for branch in range(branches):
            before = [-1, -1, *np.flatnonzero(compute[:call, branch]).tolist()]
            assert (last[call, branch], older[call, branch]) == (before[-1], before[-2])
    assert (history(compute) == (~compute & (older >= 0))).all()


@settings(deadline=None)
@given(st.integers(0, 99))
def test_a_route_yields_the_rule_on_computed_values(seed: int) -> None:
    """By hand: lists of everything computed so far, and the formula. Exact but for the order of three additions."""
    compute, widths = random_mask(8, 3, seed=seed), (2, 3, 4)
    vectors = drawn(compute, widths, seed)
    random, slots, older = np.random.default_rng(seed), {}, {}
    computed: list[list[np.ndarray]] = [[], [], []]
    for call, terms in enumerate(terms_of(vectors, len(compute), CPU, torch.float32)):
        route = hard_route(compute[call], slots, terms, older)
        for branch, width in enumerate(widths):
            fresh = random.standard_normal((5, 4, width), np.float32)
            got = route(branch, lambda fresh=fresh: torch.from_numpy(fresh)).numpy()
            if compute[call, branch]:
                computed[branch].append(fresh)
                want = fresh
            else:
                c, p = computed[branch][-1], ([np.zeros(())] + computed[branch])[-2]
                a, d, b = (term[branch][call] for term in (vectors.a, vectors.d, vectors.b))
                want = (1 + a) * c + d * (c - p) + b
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


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


def test_taylor_continues_a_straight_line_and_falls_back_where_one_value_is_known() -> None:
    compute = np.array([[1, 1], [0, 1], [1, 0], [0, 0], [0, 1], [1, 0]], bool)
    line = np.arange(6, dtype=np.float32)[:, None] * np.float32([1, 2])  # what a branch of width 2 would give
    slots, older = {}, {}
    corrections = taylor(compute, (2, 2))
    for call, terms in enumerate(terms_of(corrections, 6, CPU, torch.float32)):
        route = hard_route(compute[call], slots, terms, older)
        for branch in range(2):
            got = route(branch, lambda call=call: torch.from_numpy(line[call]))
            want = line[0] if (call, branch) == (1, 0) else line[call]  # exact: small integers
            assert got.tolist() == want.tolist()
    assert corrections.fallbacks(compute) == 1


@settings(deadline=None)
@given(st.integers(0, 99))
def test_a_saved_schedule_keeps_its_corrections_and_its_fingerprint(tmp_path_factory, seed: int) -> None:
    compute, path = random_mask(5, 4, seed=seed), tmp_path_factory.mktemp("saved") / "s.safetensors"
    one = schedule(compute=compute, corrections=drawn(compute, GRAPH.widths, seed))
    one.save(path)
    loaded = Schedule.load(path)
    assert loaded.fingerprint == one.fingerprint
    assert loaded.fingerprint != schedule(compute=compute).fingerprint or (compute[1:]).all()
    assert loaded.reuse == "corrected" and loaded.corrections is not None
    for term in "adb":
        for got, want in zip(getattr(loaded.corrections, term), getattr(one.corrections, term), strict=True):
            assert (got == want).all() and got.dtype == np.float32


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
    "no history": (lambda: changed("d", 1, 1, 1.0), "call 1 of '0.mlp' extrapolates, but was computed only once"),
    "few branches": (lambda: drawn(COMPUTE[:, :3], GRAPH.widths[:3]), "of 3 branches do not fit a schedule of 4"),
    "few calls": (lambda: drawn(COMPUTE[:4], GRAPH.widths), "cover 4 calls, but the schedule has 5"),
    "halves": (lambda: replace(GOOD, a=tuple(r.astype(np.float16) for r in GOOD.a)), "must be float32.* got float16"),
    "other rule": (lambda: replace(GOOD, rule="magic"), "rule 'magic' are unknown; it is one of taylor, corrected"),
    "ragged": (lambda: replace(GOOD, b=GOOD.b[:2]), "corrections of 4, 4 and 2 branches"),
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


def test_a_file_that_lacks_a_branch_is_refused(tmp_path: Path) -> None:
    schedule(corrections=GOOD).save(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "numpy") as file:
        metadata = file.metadata()
    tensors = load((tmp_path / "good.safetensors").read_bytes())
    for name, change in {"lacks": None, "correction.1": tensors["correction.1"][0]}.items():
        broken = dict(tensors)
        if change is None:
            del broken["correction.2"]
        else:
            broken[name] = change
        (tmp_path / "bad.safetensors").write_bytes(save(broken, metadata))
        with pytest.raises(ScheduleError):
            Schedule.load(tmp_path / "bad.safetensors")


def test_only_fitted_corrections_warn_at_another_guidance_scale() -> None:
    fitted = schedule(corrections=GOOD)
    assert fitted.fitted_elsewhere(1.5) is None
    assert "fitted at guidance 1.5, not 3.0" in fitted.fitted_elsewhere(3.0)
    assert fitted.reusing("taylor", GRAPH).fitted_elsewhere(3.0) is schedule().fitted_elsewhere(3.0) is None
