"""What is U-ViT's own: which tokens there are, what guidance needs, what its time means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_uvit

from hcompress.adapter import compute_all
from hcompress.errors import InputError, ModelError
from hcompress.models.loading import load_model
from hcompress.models.uvit_network import UViT2DModel
from hcompress.solver import make_scheduler


def test_a_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    adapter = make_uvit(time_shift=1.0)
    adapter.network.save_pretrained(tmp_path / "transformer")
    make_scheduler("ddim", {}).save_pretrained(tmp_path / "scheduler")
    loaded = load_model(str(tmp_path)).adapter
    assert loaded.identity("a", {}, 1.0) == adapter.identity("a", {}, 1.0)


@pytest.mark.parametrize(("classes", "extras"), [(5, 2), (0, 1)])
def test_slots_hold_the_tokens_of_label_and_time_too(classes: int, extras: int) -> None:
    assert {branch.shape for branch in make_uvit(num_classes=classes).graph.branches} == {(extras + 16, 32)}


def test_a_skip_connection_is_computed_of_what_the_reused_branches_left() -> None:
    """With every branch reused, the input still reaches the output along the skips, through all of `skip_linear`."""
    adapter = make_uvit()
    slots = [torch.randn(2, *branch.shape) for branch in adapter.graph.branches]
    condition, constants = adapter.label_condition([0, 1]), adapter.step_constants(torch.tensor([500.0]))

    def reused(x: torch.Tensor) -> torch.Tensor:
        return adapter(x, condition, constants, lambda branch, compute: slots[branch])

    x = torch.randn(2, *adapter.sample_shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(reused(x).square().sum(), x)
    assert gradient.abs().min() > 0
    weight = adapter.network.out_blocks[0].skip_linear.weight
    before = reused(x)
    with torch.no_grad():
        width = len(weight)
        weight[:, width:].mul_(2)  # the half that takes the skip
        after = reused(x)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("config", [{"num_classes": 0}, {"null_class": False}])
def test_a_model_without_a_null_class_runs_unguided_only(config: dict[str, object]) -> None:
    adapter = make_uvit(**config)
    condition, constants = adapter.label_condition([0, 0]), adapter.step_constants(torch.tensor([500.0]))
    x = torch.randn(2, *adapter.sample_shape)
    assert torch.equal(adapter.guided(x, condition, constants, 1.0), adapter(x, condition, constants, compute_all))
    with pytest.raises(ModelError, match=r"without a null class, so it cannot be guided; pass --cfg 1\.0"):
        adapter.guided(x, condition, constants, 1.5)


def test_an_unconditional_model_has_one_class() -> None:
    adapter = make_uvit(num_classes=0)
    assert adapter.even_conditions(3) == [0, 0, 0]
    with pytest.raises(InputError, match=r"label 1 is outside 0\.\.0"):
        adapter.label_condition([1])


def test_the_network_is_told_the_time_that_it_was_trained_with() -> None:
    told = make_uvit(time_scale=0.5, time_shift=3.0).step_constants(torch.tensor([10.0, 100.0]))
    plain = make_uvit().step_constants(torch.tensor([8.0, 53.0]))
    assert torch.equal(told["time_token"], plain["time_token"]) and told["time_token"].shape == (2, 1, 32)


def test_an_even_number_of_blocks_has_no_middle() -> None:
    with pytest.raises(ValueError, match="odd number of blocks, not 4"):
        UViT2DModel(num_layers=4)
