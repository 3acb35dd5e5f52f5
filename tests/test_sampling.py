"""The reference sampler: what caching means, held against a loop written out by hand, and where noise comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_dit
from torch import Tensor

from hcompress.adapter import Adapter
from hcompress.caching.rules import interval
from hcompress.models.dit import DiT
from hcompress.sampling import constants_of, hard_route, sample_seeded, solver_noises, start_noise
from hcompress.solver import SOLVERS, make_scheduler, probe

STEPS, SEED, LABELS = 6, 11, [4, 0, 2]
CONFIG = {"beta_schedule": "linear", "clip_sample": False}


def run(adapter: Adapter, compute: np.ndarray | None, *, solver: str = "ddim", cfg: float = 1.5) -> Tensor:
    table = probe(make_scheduler(solver, CONFIG), STEPS)
    return sample_seeded(adapter, table, LABELS, seed=SEED, cfg=cfg, compute=compute)


def mask(seed: int = 0, branches: int = 4) -> np.ndarray:
    compute = np.random.default_rng(seed).random((STEPS, branches)) < 0.5
    compute[0] = True
    return compute


def by_hand(adapter: Adapter, compute: np.ndarray, *, cfg: float) -> Tensor:
    """A diffusers loop over the wrapped network, whose attention and MLP modules are kept from running.

    A module's output is what is added after the gate, so a forward that returns an old one is the cache before the
    gate. Shares nothing with hcompress.sampling but the start noise.
    """
    network, scheduler = adapter.network, make_scheduler("ddim", CONFIG)
    kinds = ("attn1", "ff") if isinstance(adapter, DiT) else ("attn", "mlp")
    modules = [module for name, module in network.named_modules() if name.endswith(kinds)]
    kept: dict[int, Tensor] = {}
    hooks = []
    row = compute[0]

    def keep_or_reuse(branch: int):
        def hook(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
            if row[branch]:
                kept[branch] = output
            return kept[branch]

        return hook

    for branch, module in enumerate(modules):
        hooks.append(module.register_forward_hook(keep_or_reuse(branch)))
    labels = torch.tensor(LABELS * 2)
    labels[len(LABELS) :] = 5  # the null class
    x = start_noise(adapter, SEED, range(len(LABELS)))
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for call, t in enumerate(scheduler.timesteps):
            row = compute[call]
            both = network(torch.cat([x, x]), timestep=t.expand(len(labels)), class_labels=labels).sample
            cond, uncond = both.chunk(2)
            x = scheduler.step(uncond + cfg * (cond - uncond), t, x).prev_sample
    for hook in hooks:
        hook.remove()
    return x


# The table is float64, the scheduler float32 (eps 6e-8) over 6 steps; and one row of time embedding is not rounded as
# six are.
TOLERANCE = 2e-6


RULES = {
    "dense": lambda branches: np.ones((STEPS, branches), bool),
    "every 2": lambda branches: interval(STEPS, branches, every=2),
    "every 3": lambda branches: interval(STEPS, branches, every=3),
    "random": lambda branches: mask(0, branches),
    "another": lambda branches: mask(1, branches),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["tiny_dit", "tiny_uvit"])
def test_a_schedule_means_what_a_loop_by_hand_does(family: str, rule: str, request: pytest.FixtureRequest) -> None:
    adapter = request.getfixturevalue(family)
    compute = RULES[rule](len(adapter.graph))
    want = by_hand(adapter, compute, cfg=1.5)
    assert (run(adapter, compute) - want).abs().max() <= TOLERANCE * want.abs().max()


def test_what_the_masks_of_these_tests_change_is_far_above_rounding(tiny_dit: Adapter) -> None:
    results = [run(tiny_dit, compute) for compute in (None, interval(STEPS, 4, every=2), mask(0), mask(1))]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 50 * TOLERANCE * one.abs().max() for other in results[:i])


@pytest.fixture(scope="module")
def guessing_dit() -> Adapter:
    """With the variance that IDDPM asks a model for."""
    return make_dit(out_channels=4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_an_all_true_schedule_equals_the_dense_model(guessing_dit: Adapter, solver: str, cfg: float) -> None:
    if solver in ("edm-euler", "flow-euler"):
        pytest.skip("for models of another kind than this one")
    table = probe(make_scheduler(solver, CONFIG), STEPS)
    full = np.ones((table.num_calls, 4), bool)
    cached, dense = (run(guessing_dit, compute, solver=solver, cfg=cfg) for compute in (full, None))
    assert torch.equal(cached, dense)


def test_a_slot_is_written_only_when_computed_and_handed_out_otherwise() -> None:
    slots: dict[int, Tensor] = {}
    first, second = torch.zeros(2), torch.ones(2)
    assert hard_route(np.array([True, True]), slots)(0, lambda: first) is first
    assert slots == {0: first}
    route = hard_route(np.array([False, True]), slots)
    assert route(0, lambda: pytest.fail("a reused branch was computed")) is first
    assert route(1, lambda: second) is second
    assert slots[0] is first and slots[1] is second
    assert hard_route(np.array([True, False]), slots)(0, lambda: second) is second
    assert slots[0] is second


def test_the_age_of_a_slot_is_unbounded(tiny_dit: Adapter) -> None:
    compute = np.ones((STEPS, 4), bool)
    compute[1:, 2] = False
    want = by_hand(tiny_dit, compute, cfg=1.5)
    assert (run(tiny_dit, compute) - want).abs().max() <= TOLERANCE * want.abs().max()


def test_nothing_stays_from_one_generation_to_the_next(tiny_dit: Adapter) -> None:
    want = run(tiny_dit, mask(0))
    run(tiny_dit, mask(1))
    assert torch.equal(run(tiny_dit, mask(0)), want)


@pytest.mark.parametrize("draw", ["start", "solver"])
def test_noise_depends_on_seed_and_sample_only(tiny_dit: Adapter, draw: str) -> None:
    table = probe(make_scheduler("ddpm", CONFIG), STEPS)

    def noise(seed: int, samples: list[int]) -> Tensor:
        if draw == "start":
            return start_noise(tiny_dit, seed, samples)
        return torch.stack(solver_noises(tiny_dit, table, seed, samples), dim=1)

    eight = noise(3, [*range(8)])
    assert torch.equal(torch.cat([noise(3, [0, 1, 2]), noise(3, [3, 4, 5, 6, 7])]), eight)
    assert torch.equal(noise(3, [7, 2]), eight[[7, 2]])
    assert not torch.isclose(noise(4, [*range(8)]), eight).any()
    assert eight.dtype == torch.float32
    # 8 samples of 128 numbers, or 5 times as many: mean and variance within five standard deviations.
    count = eight.numel()
    assert abs(eight.mean()) < 5 / count**0.5
    assert abs(eight.var() - 1) < 5 * (2 / count) ** 0.5


def test_every_draw_of_a_stochastic_solver_is_another(tiny_dit: Adapter) -> None:
    table = probe(make_scheduler("ddpm", CONFIG), STEPS)
    draws = [start_noise(tiny_dit, 3, [0]), *solver_noises(tiny_dit, table, 3, [0])]
    assert len(draws) == 1 + table.num_noises > 2
    assert len({draw.numpy().tobytes() for draw in draws}) == len(draws)
    assert torch.equal(run(tiny_dit, mask(), solver="ddpm"), run(tiny_dit, mask(), solver="ddpm"))


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_sample_does_not_depend_on_its_batch(tiny_dit: Adapter, solver: str) -> None:
    table = probe(make_scheduler(solver, CONFIG), STEPS)
    done: list[int] = []

    def generate(labels: list[int], **how: object) -> Tensor:
        return sample_seeded(tiny_dit, table, labels, seed=SEED, cfg=1.5, compute=mask(), **how)

    five = generate([0, 1, 2, 3, 4])
    in_twos = generate([0, 1, 2, 3, 4], batch=2, progress=done.append)
    last = generate([3, 4], first=3)
    # Products of other numbers of rows round differently: float32, eps 6e-8, over 6 steps.
    tolerance = 1e-5 * float(five.abs().max())
    assert torch.allclose(in_twos, five, rtol=0, atol=tolerance)
    assert torch.allclose(last, five[3:], rtol=0, atol=tolerance)
    assert done == [2, 4, 5]


def test_constants_are_one_row_a_call(tiny_dit: Adapter) -> None:
    table = probe(make_scheduler("heun", CONFIG), STEPS)
    constants = constants_of(tiny_dit, table)
    assert len(constants) == table.num_calls == 2 * STEPS - 1
    for call, timestep in enumerate(table.timesteps):
        want = tiny_dit.step_constants(torch.tensor([timestep]))
        for name, row in constants[call].items():
            assert row.shape[0] == 1
            # Rounded differently as one row and as eleven: float32, eps 6e-8.
            assert torch.allclose(row, want[name], rtol=0, atol=1e-6 * float(want[name].abs().max() + 1))


def test_outputs_beyond_the_sample_channels_are_left_out() -> None:
    """A learned variance takes no part in the trajectory."""
    adapter = make_dit(out_channels=4)
    got = run(adapter, mask())
    with torch.no_grad():
        # rows of proj_out_2 are [patch, patch, channel]: change those of channels 2 and 3
        adapter.network.proj_out_2.weight.view(2, 2, 4, -1)[:, :, 2:] += 1
    assert torch.equal(run(adapter, mask()), got)
