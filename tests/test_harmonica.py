"""HarmoniCa's training, held against its definition on a tiny DiT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_dit, make_table
from diffusers import DDIMScheduler
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from hcompress.adapter import compute_all
from hcompress.caching.harmonica import Training
from hcompress.caching.problem import Problem
from hcompress.caching.router import Router, soft_route
from hcompress.caching.settings import HarmoniCaSettings
from hcompress.errors import ModelError
from hcompress.models.dit import DiT
from hcompress.sampling import constants_of, fill_route
from hcompress.solver import probe

CALLS, BRANCHES = 4, 4


@pytest.fixture(scope="module")
def adapter() -> DiT:
    return make_dit(out_channels=4)  # with a learned variance, which no trajectory may see


@pytest.fixture(scope="module")
def table():
    return probe(DDIMScheduler(clip_sample=False, timestep_spacing="trailing"), CALLS)


def training_of(adapter, table, seed: int = 3, **settings) -> Training:
    given = {"beta": 1e-3, "trajectories": 3, "batch": 2, "lr": 0.1, "refresh": 2 * CALLS} | settings
    return Training(Problem(adapter, table, 1.5, seed, process=None, images=None), HarmoniCaSettings(**given))


def run(training: Training) -> np.ndarray:
    for _ in training.run():
        pass
    return training.router.logits()


def test_training_stops_at_the_first_call_that_is_not_finite(table):
    """Of its own output, or of the loss alone: a lambda that overflows."""
    adapter = make_dit(out_channels=4)
    whole = adapter.step_constants

    def broken(timesteps: torch.Tensor) -> dict[str, torch.Tensor]:
        constants = dict(whole(timesteps))
        for rows in constants.values():
            rows[timesteps == float(table.timesteps[2])] = torch.nan
        return constants

    adapter.step_constants = broken
    with pytest.raises(ModelError, match="the model's output is not finite at call 2"):
        next(training_of(adapter, table).run())
    training = training_of(make_dit(out_channels=4), table, proxy="none")
    steps = training.steps(*training.draw(0))
    training.router.lambdas[1:] = np.inf
    with pytest.raises(ModelError, match="training diverged at call 1: the loss is not finite"):
        next(steps)


def test_the_gradient_of_an_update_is_that_of_the_whole_loss(adapter, table):
    """lambda mse + beta sum r by autograd alone, against the update's split into autograd and a hand-made penalty."""
    training = training_of(adapter, table, beta=0.3)
    condition, start, _ = training.draw(0)
    slots: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        first = training.denoise(0, start, condition, fill_route(slots))
        x = table.combine(1, start, [first])
        target = training.denoise(1, x, condition, compute_all)
    theta = training.router.rows[1]
    r = torch.sigmoid(theta)
    student = training.denoise(1, x, condition, soft_route(r, np.ones(BRANCHES, bool), dict(slots)))
    error = torch.nn.functional.mse_loss(student, target)
    (expected,) = torch.autograd.grad(7.0 * error + 0.3 * r.sum(), theta, retain_graph=True)
    training.router.lambdas[1] = 7.0
    training.router.update(1, 7.0 * error, training.ranks)
    torch.testing.assert_close(theta.grad, expected, rtol=1e-5, atol=1e-8)  # float32 sums in another order


@pytest.mark.parametrize("proxy", ["leave_one_out", "cumulative"])
def test_lambda_equals_whole_generations_without_forking(adapter, table, proxy):
    """The proxy by its definition, one full generation for each lambda, against the forked one."""
    training = training_of(adapter, table, proxy=proxy)
    condition, start, noises = training.draw(0)
    scores = torch.from_numpy(training.router.scores()).float()
    keep = training.router.hard()

    @torch.no_grad()
    def generation(routed: set[int]) -> torch.Tensor:
        slots: dict[int, torch.Tensor] = {}
        outputs: list[torch.Tensor] = []
        for call in range(CALLS):
            route = soft_route(scores[call], keep[call], slots) if call in routed else fill_route(slots)
            outputs.append(training.denoise(call, table.combine(call, start, outputs), condition, route))
        return table.combine(CALLS, start, outputs)

    later = range(1, CALLS)
    if proxy == "leave_one_out":
        whole = generation(set(later))
        expected = [(generation(set(later) - {call}) - whole).square().mean().item() for call in later]
    else:
        chain = [generation(set(range(1, call))) for call in range(1, CALLS + 1)]
        expected = [(chain[call] - chain[call - 1]).square().mean().item() for call in later]
    training.refresh(condition, start, noises)
    np.testing.assert_allclose(training.router.lambdas[1:], expected, rtol=1e-5)
    assert training.router.lambdas[0] == 0


def test_sensitivity_is_the_image_error_over_the_calls_own_error(adapter, table):
    by = {proxy: training_of(adapter, table, proxy=proxy) for proxy in ("leave_one_out", "sensitivity")}
    for training in by.values():
        training.refresh(*training.draw(0))
    ratio = by["leave_one_out"].router.lambdas[1:] / by["sensitivity"].router.lambdas[1:]
    condition, start, _ = by["leave_one_out"].draw(0)
    training, slots = by["leave_one_out"], {}
    scores = torch.from_numpy(training.router.scores()).float()
    with torch.no_grad():
        first = training.denoise(0, start, condition, fill_route(slots))
        x = table.combine(1, start, [first])
        routed = training.denoise(1, x, condition, soft_route(scores[1], training.router.hard()[1], slots))
        own_error = (routed - training.denoise(1, x, condition, compute_all)).square().mean().item()
    assert ratio[0] == pytest.approx(own_error, rel=1e-4)


def test_the_slot_takes_the_mixture_only_where_the_score_exceeds_the_threshold():
    slots = {0: torch.zeros(1), 1: torch.zeros(1)}
    scores = torch.tensor([0.75, 0.05], requires_grad=True)
    route = soft_route(scores, np.array([True, False]), slots)
    mixed = [route(branch, lambda: torch.full((1,), 8.0)) for branch in (0, 1)]
    assert [m.item() for m in mixed] == pytest.approx([6.0, 0.4])
    assert slots[0].item() == 6.0 and not slots[0].requires_grad
    assert slots[1].item() == 0.0


def test_the_first_row_stays_pinned_and_the_rest_within_the_clamp(adapter, table):
    training = training_of(adapter, table, lr=3.0, clamp=2.25, init="normal")
    logits = run(training)
    assert (logits[0] == 2.25).all()
    assert np.abs(logits).max() <= 2.25
    assert (np.abs(logits[1:]) == 2.25).any()  # else this test saw no clamping


def test_the_network_is_frozen_and_gets_no_gradients(adapter, table):
    before = {name: tensor.clone() for name, tensor in adapter.network.state_dict().items()}
    run(training_of(adapter, table))
    assert all(p.grad is None and not p.requires_grad for p in adapter.network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.network.state_dict().items())


def test_a_huge_beta_reuses_all_that_may_be_and_a_tiny_one_nothing(adapter, table):
    generous = training_of(adapter, table, beta=1e9, lr=3.0, init=1.0)
    run(generous)
    assert 1 - generous.router.hard().mean() == pytest.approx((CALLS - 1) / CALLS)
    strict = training_of(adapter, table, beta=1e-30, lr=0.1, init=1.0)
    run(strict)
    assert strict.router.hard().all()


def test_only_the_row_of_the_call_is_moved_by_its_update(adapter, table):
    """One parameter a row: Adam's momentum must not move rows whose gradient is absent (caching.md, trap 2)."""
    training = training_of(adapter, table)
    condition, start, noises = training.draw(0)
    training.refresh(condition, start, noises)
    steps = training.steps(condition, start, noises)
    before = training.router.logits()
    for call in range(1, CALLS):
        next(steps)
        after = training.router.logits()
        assert (after[call] != before[call]).any()
        others = [row for row in range(CALLS) if row != call]
        assert (after[others] == before[others]).all()
        before = after


def test_without_iepo_lambda_is_one_whatever_was_measured_before(adapter, table):
    training = training_of(adapter, table, proxy="none")
    training.router.lambdas[:] = 7.0
    training.refresh(*training.draw(0))
    assert (training.router.lambdas[1:] == 1.0).all()


def test_a_hard_score_trains_in_the_network_that_is_deployed(adapter, table):
    """With every r above tau the hard student is the teacher, exactly, where the soft one is not; both still learn."""
    moved, errors = {}, {}
    for score in ("soft", "hard"):
        training = training_of(adapter, table, score=score, init=1.0)
        drawn = training.draw(0)
        training.refresh(*drawn)
        errors[score] = training.walk(*drawn)[1]
        moved[score] = training.router.logits()[1:] - 1.0
    assert errors["hard"] == 0.0 < errors["soft"]
    wanting = training_of(adapter, table, score="hard", init=-3.0, proxy="none", beta=1e-30)  # r below tau: all reused
    drawn = wanting.draw(0)
    wanting.refresh(*drawn)
    assert wanting.walk(*drawn)[1] > 0 and (wanting.router.logits()[1:] != -3.0).any()
    assert (moved["soft"] != 0).any()


def test_refreshing_the_proxy_leaves_the_training_noise_alone(adapter, table):
    often, seldom = training_of(adapter, table, refresh=CALLS), training_of(adapter, table, refresh=100 * CALLS)
    drawn = []
    for training in (often, seldom):
        run(training)
        drawn.append([training.draw(number)[1] for number in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("settings", [{"beta": 1e-3}, {"beta": None, "target_cur": 0.5}])
def test_a_restored_router_ends_where_an_uninterrupted_one_does(adapter, table, settings):
    whole = run(training_of(adapter, table, trajectories=5, **settings))
    first = training_of(adapter, table, trajectories=5, **settings)
    walk = first.run()
    for _ in range(2):
        next(walk)
    second = training_of(adapter, table, trajectories=5, **settings)
    second.restore(first.state())
    assert (run(second) == whole).all()
    assert not (first.router.logits() == whole).all()


STEERED = {"beta": None, "trajectories": 120, "lr": 0.2, "refresh": 24, "proxy": "sensitivity"}
ENTRIES = 1.5 / (6 * 4)  # of 24 entries, which differ by decades in what they matter, one or two may stay behind


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_steering_lands_on_the_target_cur(tiny_dit, target):
    training = training_of(tiny_dit, make_table(calls=6)[0], target_cur=target, **STEERED)
    run(training)
    assert abs(1 - training.router.hard().mean() - target) <= ENTRIES


def test_steering_by_macs_reaches_the_speedup(tiny_dit):
    training = training_of(tiny_dit, make_table(calls=6)[0], target_speedup=1.5, **STEERED)
    run(training)
    assert abs(1 / tiny_dit.graph.mac_ratio(training.router.hard()) - 1 / 1.5) <= ENTRIES


def test_a_router_may_start_from_logits_and_keeps_its_first_row_pinned(adapter, table):
    first = np.linspace(-3, 3, CALLS * BRANCHES, dtype=np.float32).reshape(CALLS, BRANCHES)
    problem = Problem(adapter, table, 1.5, 0, process=None, images=None, first=first)
    training = Training(problem, HarmoniCaSettings(beta=1e-3))
    logits = training.router.logits()
    assert (logits[1:] == first[1:]).all() and (logits[0] == training.settings.clamp).all()
    assert (training.router.previous == logits).all()  # else steering would take the start for a movement


@given(clamp=st.floats(0.05, 30), threshold=st.floats(1e-12, 1 - 1e-9))
def test_a_threshold_that_no_logit_falls_to_is_refused_and_no_other(clamp, threshold):
    """Those within a millionth of it, where float32 decides, aside."""
    lowest = np.log((1 - threshold) / threshold)
    assume(abs(clamp - lowest) > 1e-6 * clamp)
    settled = np.full((3, 2), -clamp, np.float32)
    try:
        settings = HarmoniCaSettings(beta=1e-3, clamp=clamp, threshold=threshold)
    except ValidationError as error:
        told = str(error)
        assert clamp < lowest and "reuses nothing" in told
        least = float(told.partition("or clamp to ")[2].split()[0])
        settings = HarmoniCaSettings(beta=1e-3, clamp=least, threshold=threshold)
        settled[:] = -least
    router = Router(3, 2, settings, 0, learned=[1, 2], first=settled)
    assert router.hard()[0].all() and not router.hard()[1:].any()


def test_another_model_may_be_the_teacher(adapter, table):
    """The target is the other's output, while the student and lambda stay with the adapter."""
    other, settings = make_dit(out_channels=4, seed=5), HarmoniCaSettings(beta=1e-3, batch=2)
    problem = Problem(adapter, table, 1.5, 0, process=None, images=None)
    taught, alone = Training(replace(problem, teacher=other), settings), Training(problem, settings)
    condition, start, noises = taught.draw(0)
    for training, teacher in ((taught, other), (alone, adapter)):
        with torch.no_grad():
            want = teacher.guided(start, condition, constants_of(teacher, table)[1], 1.5, compute_all)
            assert torch.equal(training.target(1, start, condition), want[:, : training.channels])
        training.refresh(condition, start, noises)
    assert (taught.router.lambdas == alone.router.lambdas).all()
