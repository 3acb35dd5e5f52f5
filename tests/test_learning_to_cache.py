"""Learning-to-Cache, held against its definition on a tiny DiT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_method

from hcompress.caching.problem import OneProcess

CALLS = 6
SETTINGS = {"beta": 0.3, "sweeps": 2, "batch": 3, "lr": 0.1}


@pytest.fixture
def method(skipping_dit):
    return make_method("learning-to-cache", skipping_dit, SETTINGS)


def test_every_other_row_learns_and_the_rest_computes_everything(method):
    before = method.router.logits()
    for _ in method.run():
        pass
    moved = (method.router.logits() != before).any(axis=1)
    assert not moved[::2].any() and method.found().compute[::2].all()
    assert moved[1::2].any()
    reckless = make_method("learning-to-cache", method.adapter, SETTINGS | {"beta": 1e9, "lr": 9.0, "sweeps": 6})
    for _ in reckless.run():
        pass
    assert 1 - reckless.found().compute.mean() == 0.5  # all that it may


def test_an_iteration_is_the_papers(method):
    """Forward diffusion, a full call, one DDIM step, teacher and soft student, written out."""
    skipping_dit, number = method.adapter, 4
    full: dict[int, torch.Tensor] = {}

    def store(branch, evaluate):
        full[branch] = evaluate()
        return full[branch]

    call = int(method.problem.rng((1 << 32) + number, 3).choice([1, 3, 5]))
    x, condition = method.images_at(call - 1, number)
    level = method.process
    with torch.no_grad():
        noise = skipping_dit(x, condition, method.constants[call - 1], store)[:, :2]
        clean = (x - level.sigma[call - 1] * noise) / level.alpha[call - 1]
        x = (level.alpha[call] * clean + level.sigma[call] * noise).float()
        target = skipping_dit(x, condition, method.constants[call], lambda branch, evaluate: evaluate())
    theta = method.router.rows[call].detach().clone().requires_grad_()
    r = theta.sigmoid()
    student = skipping_dit(
        x, condition, method.constants[call], lambda n, evaluate: r[n] * evaluate() + (1 - r[n]) * full[n]
    )
    mse = (student - target).square().mean()
    loss = mse + 0.3 * r.sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    got = method.iterate(number)
    # float32 in another order: some 1e-6 of a loss whose error term is small beside the penalty
    assert got == (pytest.approx(loss.item(), rel=1e-5), pytest.approx(mse.item(), rel=1e-3))
    torch.testing.assert_close(method.router.rows[call].grad, gradient, rtol=1e-4, atol=1e-7)


def test_the_network_sees_no_guidance_and_gives_its_variance(method):
    shapes = []
    hook = method.adapter.register_forward_hook(lambda module, given, output: shapes.append(output.shape))
    method.iterate(0)
    hook.remove()
    assert (
        shapes == [torch.Size([3, 4, 8, 8])] * 3
    )  # full call, teacher, student; 3 images, 2 of 4 channels are variance


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_labels_are_those_of_the_images_but_for_the_dropped_ones(skipping_dit, dropout):
    method = make_method("learning-to-cache", skipping_dit, SETTINGS | {"label_dropout": dropout, "batch": 200})
    labels = method.images_at(0, 0)[1]["labels"]
    asked = torch.tensor(method.images.batch(0, 200, flip=True)[1])
    null = labels == skipping_dit.num_classes
    assert (labels[~null] == asked[~null]).all()
    assert abs(null.float().mean().item() - dropout) <= 0.15  # four standard deviations of 200 draws


def test_images_without_classes_are_shown_as_none(skipping_dit, monkeypatch):
    method = make_method("learning-to-cache", skipping_dit, SETTINGS)
    monkeypatch.setattr(type(method.images.source), "label", lambda source, index: None)
    assert (method.images_at(0, 0)[1]["labels"] == skipping_dit.num_classes).all()


def test_two_ranks_see_the_images_of_one_with_both_batches(skipping_dit):
    one = make_method("learning-to-cache", skipping_dit, SETTINGS | {"batch": 4})
    whole = one.images_at(2, 7)
    halves = []
    for rank in (0, 1):
        half = make_method("learning-to-cache", skipping_dit, SETTINGS | {"batch": 2})
        half.ranks = OneProcess(rank, 2)
        halves.append(half.images_at(2, 7))
    assert torch.equal(whole[0], torch.cat([x for x, _ in halves]))
    assert torch.equal(whole[1]["labels"], torch.cat([condition["labels"] for _, condition in halves]))


def test_it_counts_the_images_it_has_seen(method):
    for _ in method.run():
        pass
    assert method.found().history["images_used"] == min(11, 2 * (CALLS // 2) * 3)
    assert np.isfinite(method.found().logits).all()
