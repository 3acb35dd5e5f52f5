"""Fitted corrections: that they are the least squares they claim to be, on every family, in every method."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CFG, make_dit, make_flux, make_method, make_pixart, make_problem, make_sd3, make_uvit, random_mask
from test_all_methods import QUICK, USUAL
from test_all_quantizers import case as quantized_case

from hcompress.caching import CACHING
from hcompress.caching.correct import MEASURED, RIDGE, correct, fit, solve, taylor_terms
from hcompress.caching.problem import OneProcess, Problem
from hcompress.caching.rules import interval
from hcompress.caching.settings import IntervalSettings
from hcompress.caching.tune import tune
from hcompress.corrections import history, taylor
from hcompress.errors import ModelError, RecipeError
from hcompress.recipe import resolve
from hcompress.rundir import RunDir
from hcompress.sampling import Terms, corrected, sample, terms_of
from hcompress.schedule import Schedule
from hcompress.setting import open_finished
from hcompress.train import train

FAMILIES = {
    "dit": (make_dit, "ddim"),
    "learned variance": (lambda: make_dit(out_channels=4), "ddpm"),
    "pixart": (make_pixart, "ddim"),
    "sd3": (make_sd3, "flow-euler"),
    "flux": (make_flux, "flow-euler"),
    "uvit": (make_uvit, "dpm++"),
}
SAMPLES = 8
ORDERS, NO_TERMS = [1, 2], Terms(None, None, None, None)


def every(order: int) -> int:
    """An interval under which 6 calls have an entry with as many older values."""
    return 4 - order


def drawn(width: int, *, depth: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """c, and of p and q the first `depth`."""
    generator = torch.Generator().manual_seed(width)
    c, first, second = (torch.randn(6, 4, width, generator=generator) + 0.5 for _ in range(3))
    return c, [c + 0.1 * first, c + 0.1 * first - 0.1 * second][:depth]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_fit_is_ridge_least_squares_channel_by_channel(depth: int) -> None:
    c, older = drawn(5, depth=depth)
    true = c * 1.3 + torch.randn(c.shape, generator=torch.Generator().manual_seed(1))
    terms, degenerate = solve(true, c, older, OneProcess())
    for channel in range(5):
        columns = [c, *(one - other for one, other in zip([c, *older], older, strict=False)), torch.ones_like(c)]
        x = torch.stack([column[..., channel].flatten() for column in columns], dim=1).double().numpy()
        y = (true - c)[..., channel].flatten().double().numpy()
        gram = x.T @ x / len(x)
        want = np.linalg.solve(gram + RIDGE * np.diag(np.diag(gram)), x.T @ y / len(x))
        got = [float(term[channel]) for term in (terms.a, terms.d, terms.e, terms.b) if term is not None]
        # sums over 24 float32 products: a few rounding errors of 6e-8, times the condition of a ridge of 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert degenerate == 0 and (terms.d is None) == (depth < 1) and (terms.e is None) == (depth < 2)


def test_a_drift_that_follows_the_rule_is_found() -> None:
    c, (p, q) = drawn(3)
    a, d, b = torch.tensor([0.1, 0.0, -0.2]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.0, 0.3, -0.1])
    true = c + a * c + d * (c - p) + torch.tensor([-0.5, 0.0, 1.0]) * (p - q) + b
    terms, _ = solve(true, c, (p, q), OneProcess())
    left = (corrected(c, (p, q), terms) - true).square().mean()
    assert left <= (2 * RIDGE) ** 2 * 10 * (true - c).square().mean()  # a ridge shrinks by RIDGE times the condition


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_degenerate_channel_falls_to_plain_and_is_counted(value: float) -> None:
    c, older = drawn(4)
    for one in (c, *older):
        one[..., 2] = value
    terms, degenerate = solve(c * 1.1, c, older, OneProcess())
    assert degenerate == 1
    for term in terms:
        assert term[2] == 0 and term.isfinite().all() and (term[[0, 1, 3]] != 0).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("make", "solver"), FAMILIES.values(), ids=FAMILIES)
def test_on_every_family_corrected_samples_are_nearer_to_the_dense_ones_than_plain_ones(
    make, solver: str, order: int
) -> None:
    problem = make_problem(make(), solver=solver)
    compute = interval(*problem.shape, every=every(order))
    fitted = fit(problem, compute, SAMPLES, order)
    assert fitted.degenerate == 0
    corrections = fitted.corrections(problem.adapter.graph.widths)
    corrections.check_fits(compute, problem.adapter.graph.names)
    assert corrections.order == order and (corrections.changes == ~compute).all()
    depth = history(compute).astype(int) + (history(compute, 2) & (order == 2))
    assert (corrections.depth == depth).all()
    condition, start, noises = problem.draw(0, SAMPLES)  # not those that it was fitted on
    run = {"cfg": CFG, "noises": noises}
    dense, plain, better = (
        sample(problem.adapter, problem.table, condition, start, compute=mask, corrections=vectors, **run)
        for mask, vectors in ((None, None), (compute, None), (compute, corrections))
    )
    assert (better - dense).square().mean() < (plain - dense).square().mean()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("make", "solver"), FAMILIES.values(), ids=FAMILIES)
def test_tuning_brings_samples_nearer_and_leaves_all_else_alone(make, solver: str, order: int) -> None:
    """From order 1 also to order 2."""
    problem = make_problem(make(), solver=solver)
    compute = interval(*problem.shape, every=every(order))
    start = replace(taylor(compute, problem.adapter.graph.widths), rule="corrected")
    tuned = tune(problem, compute, start, 3, order)
    tuned.check_fits(compute, problem.adapter.graph.names)
    assert tuned.order == order and problem.score_db(compute, tuned) > problem.score_db(compute, start)
    assert tune(problem, compute, start, 3, order).fingerprint == tuned.fingerprint
    assert not any(parameter.requires_grad for parameter in problem.adapter.network.parameters())


@pytest.mark.parametrize("order", ORDERS)
def test_a_fit_everywhere_goes_the_same_way(order: int, tiny_dit) -> None:
    """What is computed is fitted too, and only looked at: the reused entries get the vectors that they get alone."""
    problem, compute = make_problem(tiny_dit), random_mask(6, 4, reuse=0.4, seed=1)
    assert history(compute, 2).any()
    alone, everywhere = (fit(problem, compute, SAMPLES, order, everywhere=flag) for flag in (False, True))
    for call in range(6):
        assert sorted(everywhere.terms[call]) == ([0, 1, 2, 3] if call else [])
        assert sorted(alone.terms[call]) == np.flatnonzero(~compute[call]).tolist()
        by_q = [branch for branch, terms in alone.terms[call].items() if terms.e is not None]
        assert sorted(by_q) == (np.flatnonzero(history(compute, 2)[call]).tolist() if order == 2 else [])
        for branch, terms in alone.terms[call].items():
            for one, other in zip(terms, everywhere.terms[call][branch], strict=True):
                assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


@pytest.mark.parametrize("method", ["int8-max", "efficientdm"])
def test_corrections_of_a_quantized_model_are_never_worse_than_none_where_they_are_measured(method: str) -> None:
    """Exact: what chooses among plain reuse, Taylor's rule and fits is the score of these very samples."""
    one = quantized_case(method, "dit")
    problem = replace(make_problem(make_dit()), adapter=one.quantized, table=one.walk.table)
    compute = interval(*problem.shape, every=2)
    settings = IntervalSettings(every=2, reuse="corrected", fit_samples=SAMPLES, fit_steps=1)
    corrections = correct(problem, compute, settings).corrections
    assert corrections is not None
    corrections.check_fits(compute, one.base.graph.names)
    scores = [
        problem.score_db(compute, vectors, MEASURED)
        for vectors in (corrections, taylor(compute, problem.adapter.graph.widths), None)
    ]
    assert scores[0] == max(scores)


@pytest.mark.parametrize("size", [1e25, 3e38])
def test_vectors_whose_samples_are_not_finite_are_never_the_best(size: float) -> None:
    """Wherever they stand among others."""
    problem = make_problem(make_dit())
    compute, widths = interval(*problem.shape, every=2), problem.adapter.graph.widths
    usual = replace(taylor(compute, widths), rule="corrected")
    reused = ~compute
    large = tuple(np.full((len(compute), width), size, np.float32) * reused[:, [n]] for n, width in enumerate(widths))
    broken = replace(usual, a=large, b=large)
    assert problem.score_db(compute, usual) > problem.score_db(compute, broken) == -np.inf
    for candidates in ({"broken": broken, "usual": usual}, {"usual": usual, "broken": broken}):
        assert [*problem.scores_db(compute, candidates, 4)] == ["usual"]
    assert not problem.scores_db(compute, {"broken": broken}, 4)


class Diverging(Problem):
    """A problem whose samples are not finite under any reuse."""

    def score_db(self, *args: object) -> float:
        return -math.inf


def test_where_no_samples_are_finite_reuse_is_plain_and_that_is_said(tiny_dit) -> None:
    said: list[str] = []
    problem = Diverging(**vars(make_problem(tiny_dit)) | {"notice": said.append})
    settings = IntervalSettings(every=2, reuse="corrected", fit_samples=SAMPLES, fit_steps=1)
    found = correct(problem, interval(*problem.shape, every=2), settings)
    assert found.corrections is None and found.history == {"reuse": "plain"}
    assert len(said) == 1 and said[0].startswith("reuse is plain, not corrected")


def test_a_damaged_model_is_not_fitted() -> None:
    adapter = make_dit()
    with torch.no_grad():
        next(adapter.parameters()).fill_(torch.inf)
    problem = make_problem(adapter)
    settings = IntervalSettings(every=2, reuse="corrected", fit_samples=SAMPLES, fit_steps=1)
    with pytest.raises(ModelError, match="not finite at call 0"):
        correct(problem, interval(*problem.shape, every=2), settings)


def test_the_model_may_be_in_a_half(tiny_dit) -> None:
    problem = make_problem(make_dit().to(torch.bfloat16))
    compute = interval(6, 4, every=2)
    corrections = correct(problem, compute, IntervalSettings(every=2, reuse="corrected", fit_steps=1)).corrections
    assert corrections is not None and problem.score_db(compute, corrections) > problem.score_db(compute)


@pytest.mark.parametrize("name", ["harmonica", "learning-to-cache", "uniform", "interval"])
@pytest.mark.parametrize("reuse", ["taylor", "corrected"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_method_runs_under_every_rule_and_plain_is_its_default(
    name: str, reuse: str, order: int, skipping_dit
) -> None:
    settings = USUAL[name] | {"reuse": reuse, "order": order, "fit_samples": SAMPLES, "fit_steps": 2}
    method = make_method(name, skipping_dit, settings)
    for _ in method.run():
        pass
    compute = method.found().compute
    rule = IntervalSettings(every=2, reuse=reuse, order=order, fit_samples=SAMPLES, fit_steps=0)
    found = correct(make_problem(skipping_dit), compute, rule)
    assert found.corrections is not None and found.corrections.rule == reuse
    assert found.corrections.order == found.history.get("order", 1) <= order
    if reuse == "taylor":
        assert found.corrections.fingerprint == taylor(compute, skipping_dit.graph.widths, order).fingerprint
    assert found.history["fallbacks"] == found.corrections.fallbacks(compute)
    assert CACHING[name] and IntervalSettings(every=2).reuse == "plain"


@pytest.mark.parametrize("order", ORDERS)
def test_the_students_taylor_terms_are_those_of_a_schedule(order: int) -> None:
    """Where an entry is reused; elsewhere they are what it would have, were it reused."""
    compute = random_mask(8, 3, reuse=0.4, seed=2)
    whole = taylor_terms(compute, order, torch.device("cpu"), torch.float32)
    fixed = terms_of(taylor(compute, (1, 1, 1), order), 8, torch.device("cpu"), torch.float32)
    for call, branch in np.argwhere(~compute).tolist():
        for ours, theirs in zip(whole[call].get(branch, NO_TERMS), fixed[call].get(branch, NO_TERMS), strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
    alone = compute.copy()
    call, branch = np.argwhere(compute & (np.cumsum(compute, axis=0) == 4))[0]
    alone[call, branch] = False
    one, other = whole[call][branch], terms_of(taylor(alone, (1, 1, 1), order), 8, torch.device("cpu"), torch.float32)
    assert torch.equal(one.d, other[call][branch].d) and (one.e is None) == (order == 1)


@pytest.mark.parametrize("reuse", ["taylor", "corrected"])
def test_a_router_that_learns_by_q_learns_something_else(reuse: str, skipping_dit) -> None:
    """Until a branch has been computed three times both orders are one; a router that computes all has them soon."""
    settings = QUICK | {"beta": 1e-3, "trajectories": 2, "refresh": 12, "fit_samples": SAMPLES, "reuse": reuse}
    learned = []
    for order in ORDERS:
        method = make_method("harmonica", skipping_dit, settings | {"order": order, "proxy": "none"})
        for _ in method.run():
            pass
        learned.append(method.found().logits)
    assert (learned[0][:3] == learned[1][:3]).all() and (learned[0][3:] != learned[1][3:]).any()


@pytest.mark.parametrize(
    ("proxy", "order"), [("leave_one_out", 1), ("leave_one_out", 2), ("cumulative", 2), ("sensitivity", 1)]
)
def test_a_router_that_learns_with_corrections_can_be_restored(proxy: str, order: int, skipping_dit) -> None:
    settings = QUICK | {
        "beta": 1e-3,
        "trajectories": 3,
        "refresh": 12,
        "fit_samples": SAMPLES,
        "fit_steps": 0,
        "reuse": "corrected",
    }
    settings |= {
        "proxy": proxy,
        "order": order,
        "lr": 2.0,
    }  # fast enough for the hard schedule to change between refreshes
    whole = make_method("harmonica", skipping_dit, settings)
    for _ in whole.run():
        pass
    first = make_method("harmonica", skipping_dit, settings)
    walk = first.run()
    next(walk)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = make_method("harmonica", skipping_dit, settings)
    second.restore(torch.load(file, weights_only=True))
    for _ in second.run():
        pass
    assert (second.found().logits == whole.found().logits).all()
    plain = make_method("harmonica", skipping_dit, settings | {"reuse": "plain", "order": 1})
    for _ in plain.run():
        pass
    assert (plain.found().logits != whole.found().logits).any()


@pytest.mark.parametrize("order", ORDERS)
def test_train_leaves_a_corrected_schedule(order: int, tiny_run, tmp_path) -> None:
    flags = {"model": str(tiny_run.parent / "model"), "solver.steps": 6, "caching.method": "interval"}
    flags |= {"caching.reuse": "corrected", "caching.fit_samples": SAMPLES, "caching.fit_steps": 1}
    flags |= {"caching.every": every(order), "caching.order": order}
    schedule = train(resolve(None, flags), tmp_path / "run")
    assert schedule.reuse == "corrected" and schedule.method["degenerate_channels"] == 0
    assert schedule.order == order == schedule.method.get("order", 1)
    scores = schedule.method["start_score_db"]
    assert {*scores} == {"least squares", "taylor", "plain"} | ({"taylor, order 2"} if order == 2 else set())
    assert scores[schedule.method["start"]] == max(scores.values())
    without = (~schedule.compute & ~history(schedule.compute, order)).sum()  # each counts, whatever its vectors
    assert schedule.method["fallbacks"] == schedule.fallbacks >= without >= 2 * len(schedule.names)
    setting, opened = open_finished(tmp_path / "run")
    assert opened.fingerprint == schedule.fingerprint
    again = replace(opened, corrections=None).reusing("taylor", setting.adapter.graph)
    assert again.fingerprint != opened.fingerprint


@pytest.mark.parametrize("name", ["harmonica", "smoothcache", "interval"])
def test_every_method_records_once_what_fitting_took(name, tiny_run, tmp_path) -> None:
    settings = QUICK | USUAL[name] if name == "harmonica" else USUAL[name]
    flags = {"model": str(tiny_run.parent / "model"), "solver.steps": 6, "caching.method": name}
    flags |= {f"caching.{key}": value for key, value in settings.items()}
    flags |= {"caching.reuse": "corrected", "caching.fit_samples": SAMPLES, "caching.fit_steps": 1}
    run = RunDir(tmp_path / "run")
    for resume in (False, True):
        train(resolve(None, flags), run.path, resume=resume)
        *others, last = run.records()
        assert last.keys() >= {"stage", "seconds"} and last["stage"] == "corrections" and last["seconds"] > 0
        assert others and all("stage" not in record for record in others)
        rounds = sum("round" in record for record in others)
        assert sum("seconds" in record for record in others) == (rounds or 1) and (rounds > 0) == (name == "harmonica")


def test_too_few_samples_and_unknown_rules_and_orders_are_refused_in_one_line(tiny_run) -> None:
    flags = {"model": str(tiny_run.parent / "model"), "caching.method": "interval", "caching.every": 2}
    with pytest.raises(RecipeError, match=r"caching\.fit_samples = 2 should be greater than or equal to 8"):
        resolve(None, flags | {"caching.fit_samples": 2})
    with pytest.raises(RecipeError, match=r"caching\.reuse = 'magic' should be 'plain', 'taylor' or 'corrected'"):
        resolve(None, flags | {"caching.reuse": "magic"})
    for order, wanted in ((0, "greater than or equal to 1"), (3, "less than or equal to 2")):
        with pytest.raises(RecipeError, match=rf"caching\.order = {order} should be {wanted}"):
            resolve(None, flags | {"caching.reuse": "taylor", "caching.order": order})
    with pytest.raises(RecipeError, match=r"caching: order = 2 means nothing where reuse is plain") as caught:
        resolve(None, flags | {"caching.order": 2})
    assert "\n" not in str(caught.value)
    assert resolve(None, flags | {"caching.reuse": "taylor", "caching.order": 2}).caching.order == 2


def test_the_command_line_trains_shows_and_scores_corrected_schedules(tiny_run, tmp_path, capsys, monkeypatch) -> None:
    from hcompress.cli.main import main

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hcompress", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    model, out = str(tiny_run.parent / "model"), tmp_path / "run"
    asked = ["train", model, "--method", "interval", "--steps", "6", "--set", "caching.every=3", "--reuse", "corrected"]
    asked += ["--set", f"caching.fit_samples={SAMPLES}", "--set", "caching.fit_steps=0", "--out", str(out), "--json"]
    status, told, _ = run(*asked)
    assert status == 0 and json.loads(told)["reuse"] == "corrected"
    file = str(out / "schedule.safetensors")
    fallbacks = Schedule.load(out / "schedule.safetensors").fallbacks
    assert fallbacks >= 8 and f"corrected reuse, {fallbacks} entries without an older value" in run("inspect", file)[1]
    described = json.loads(run("inspect", file, "--json")[1])
    assert (described["reuse"], described["order"], described["fallbacks"]) == ("corrected", 1, fallbacks)
    scores = {}
    for rule in ("plain", "taylor", "corrected"):
        status, told, noted = run("eval", model, "--schedule", file, "--samples", "4", "--reuse", rule, "--json")
        scores[rule] = json.loads(told)["psnr_db"]
        assert status == 0 and not noted.strip()
    assert len(set(scores.values())) == 3
    status, _, noted = run("eval", model, "--schedule", file, "--samples", "4", "--cfg", "3", "--json")
    assert status == 0 and "fitted at guidance 1.5, not 3.0" in noted
    plain = str(tiny_run / "schedule.safetensors")
    status, _, noted = run("eval", model, "--schedule", plain, "--reuse", "corrected", "--samples", "4")
    assert status == 1 and "\n" not in noted.strip() and "holds no fitted corrections" in noted
    pictures = [tmp_path / name for name in ("corrected.png", "plain.png")]
    for picture, rule in zip(pictures, ("corrected", "plain"), strict=True):
        Schedule.load(out / "schedule.safetensors").reusing(rule, make_dit(channels=1).graph).save(tmp_path / rule)
        how = ["--schedule", str(tmp_path / rule), "--labels", "0,1", "--out", str(picture)]
        assert run("generate", model, *how)[0] == 0
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


def test_the_command_line_shows_order_2_wherever_it_shows_the_rule(hcompress, tiny_run, tmp_path) -> None:
    model, out = tiny_run.parent / "model", tmp_path / "run"
    asked = ["train", model, "--method", "interval", "--steps", "6", "--set", "caching.every=2", "--reuse", "taylor"]
    asked += ["--set", "caching.order=2", "--out", out]
    planned = json.loads(hcompress(*asked, "--dry-run", "--json")[1])
    assert (planned["reuse"], planned["order"]) == ("taylor", 2)
    status, told, _ = hcompress(*asked, "--json")
    assert status == 0 and json.loads(told)["order"] == 2
    schedule = Schedule.load(out)
    line = f"taylor reuse of order 2, {schedule.fallbacks} entries without an older value"
    assert schedule.fallbacks == 8 and line in " ".join(hcompress("inspect", out)[1].split())
    assert json.loads(hcompress("inspect", out, "--json")[1])["order"] == 2
    how = ("eval", model, "--schedule", out, "--samples", "4", "--json")
    own, again, first = (json.loads(hcompress(*how, *rule)[1]) for rule in ([], ["--reuse", "taylor"], []))
    assert own == again == first and (own["reuse"], own["order"]) == ("taylor", 2)
    assert json.loads(hcompress(*how, "--reuse", "plain")[1])["psnr_db"] != own["psnr_db"]
