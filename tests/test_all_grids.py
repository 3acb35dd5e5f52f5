"""Rounding and its gradients, held against their definition for every grid and every shape of a step size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcompress.lowbit.grid import ACTIVATION_GRIDS, WEIGHT_GRIDS, Grid

GRIDS = {f"{kind} {name}": grid for kind, grids in (("weight", WEIGHT_GRIDS), ("input", ACTIVATION_GRIDS))
         for name, grid in grids.items()}  # fmt: skip
SHAPES = {"one": (1,), "a channel": (6, 1), "an element": (6, 40)}


@pytest.fixture(params=GRIDS.values(), ids=GRIDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def drawn(request: pytest.FixtureRequest, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Values [6, 40], some of them clipped and some at either end of the grid; step sizes; a gradient."""
    generator = torch.Generator().manual_seed(0)
    scale = 2.0 ** torch.randint(-6, 3, request.param, generator=generator)  # so that v / s is exact
    multiples = grid.high * torch.randn(6, 40, generator=generator)
    multiples[:, 0], multiples[:, 1] = grid.low, grid.high
    return multiples * scale, scale, torch.randn(6, 40, generator=generator)


def by_autograd(grid: Grid, v: Tensor, scale: Tensor) -> Tensor:
    """The straight-through estimator as one writes it down."""
    multiples = (v / scale).clamp(grid.low, grid.high)
    return (multiples + (grid.round(multiples) - multiples).detach()) * scale


def test_gradients_are_the_straight_through_ones(grid, drawn):
    v, scale, grad = drawn
    found = []
    for fake in (grid.fake, lambda v, scale: by_autograd(grid, v, scale)):
        inputs = [v.clone().requires_grad_(), scale.clone().requires_grad_()]
        result = fake(*inputs)
        result.backward(grad)
        found.append((result.detach(), *(one.grad for one in inputs)))
    (value, of_v, of_scale), (expected, expected_of_v, expected_of_scale) = found
    assert torch.equal(value, expected)
    assert (of_v == 0).any()  # something was clipped
    torch.testing.assert_close(of_v, expected_of_v, rtol=1e-6, atol=0)  # g s / s against g
    # sums of up to 240 products of the size of `grid.high`, in another order
    torch.testing.assert_close(of_scale, expected_of_scale, rtol=1e-5, atol=1e-5 * grid.high)


def test_only_what_asks_for_a_gradient_gets_one(grid, drawn):
    v, scale, grad = drawn
    step = scale.clone().requires_grad_()
    grid.fake(v, step).backward(grad)
    values = v.clone().requires_grad_()
    grid.fake(values, scale).backward(grad)
    assert v.grad is None and scale.grad is None and step.grad is not None and values.grad is not None


def test_what_is_stored_is_what_was_learned(grid, drawn):
    """`store` keeps the multiples of what `fake` yields, bit for bit."""
    v, scale, _ = drawn
    assert torch.equal(grid.store(v, scale).to(scale.dtype) * scale, grid.fake(v, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_so(grid, dtype):
    v = torch.linspace(-2, 2, 9, dtype=dtype).requires_grad_()
    result = grid.fake(v, torch.ones(1, dtype=dtype))
    result.sum().backward()
    assert result.dtype == dtype and torch.equal(v.grad, torch.ones_like(v))
