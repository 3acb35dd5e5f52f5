"""What holds of every quantizer, on a tiny model of each family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CFG, make_dit, make_pixart, make_table, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hcompress.adapter import Adapter
from hcompress.errors import ModelError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.artefact import Origin, load_quantized, network_bytes, read_origin, save_quantized
from hcompress.lowbit.linear import QuantLinear
from hcompress.quant import QUANTIZERS
from hcompress.quant.calibration import Walk, draw, observe
from hcompress.quant.efficientdm import Distillation, start_amax, student_of
from hcompress.quant.selection import select_as
from hcompress.quant.settings import EfficientDMSettings, PtqSettings
from hcompress.sampling import sample, trajectory
from hcompress.schedule import Schedule

FAMILIES = {"dit": make_dit, "pixart": make_pixart}
METHODS = [*QUANTIZERS, "efficientdm"]
MEMBERS = [(method, family) for method in METHODS for family in FAMILIES]
every = pytest.mark.parametrize(("method", "family"), MEMBERS)


@dataclass(frozen=True)
class Case:
    """A float model, the trajectory it was calibrated on, and what came of it."""

    base: Adapter
    walk: Walk
    quantized: QuantizedAdapter


def distilled(adapter: Adapter, walk: Walk) -> QuantizedAdapter:
    """EfficientDM as hcompress.distil runs it, without a folder."""
    told = EfficientDMSettings(updates=10, batch=1, rank=2)
    selection = select_as(adapter, told)
    amax = start_amax(observe(adapter, selection, walk), selection)
    distillation = Distillation(adapter, student_of(adapter, selection, amax, walk, told), walk, told)
    assert len(list(distillation.run())) == 2
    return distillation.finish()


def quantize(method: str, family: str, seed: int = 0) -> Case:
    base = FAMILIES[family]()
    walk = Walk(make_table()[0], CFG, samples=4, batch=2, seed=seed)
    if method == "efficientdm":
        return Case(base, walk, distilled(base, walk))
    return Case(base, walk, QUANTIZERS[method](base, walk, PtqSettings(method=method)))


case = cache(quantize)


def layers(adapter: Adapter) -> dict[str, QuantLinear]:
    return {name: module for name, module in adapter.network.named_modules() if isinstance(module, QuantLinear)}


def samples(adapter: Adapter, walk: Walk, compute: np.ndarray | None = None) -> Tensor:
    batch = draw(adapter, walk, first=0, count=3)
    return sample(adapter, walk.table, batch.condition, batch.start, cfg=walk.cfg, compute=compute)


@every
def test_branches_stay_so_schedules_fit(method: str, family: str) -> None:
    one = case(method, family)
    assert one.quantized.graph == one.base.graph
    solver = make_table()[1]
    identity = one.quantized.identity("q", solver, CFG)
    assert identity.weight_hash != one.base.identity("f", solver, CFG).weight_hash
    mask = random_mask(one.walk.table.num_calls, len(one.base.graph))
    Schedule(mask, one.base.graph.names, identity).check_fits(one.quantized.graph, identity)


@every
def test_the_float_model_is_left_as_it_was(method: str, family: str) -> None:
    want, got = FAMILIES[family]().network.state_dict(), case(method, family).base.network.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@every
def test_integers_lie_on_the_grid_and_scales_above_zero(method: str, family: str) -> None:
    one = case(method, family)
    found = layers(one.quantized)
    assert found
    for layer in found.values():
        grid, integers = layer.format.weight_grid, layer.integers.float()
        assert layer.integers.dtype == grid.dtype
        assert grid.low <= integers.min() and integers.max() <= grid.high
        assert torch.equal(grid.round(integers), integers)
        assert (layer.weight_scale > 0).all() and layer.weight_scale.isfinite().all()
        assert (layer.column is None) == (layer.format.activation is None)
    assert one.quantized.log_scales.isfinite().all()
    assert one.quantized.log_scales.shape == (
        one.walk.table.num_calls,
        len({x.column for x in found.values()} - {None}),
    )


@every
def test_no_multiplication_is_left_beside_a_layer(method: str, family: str) -> None:
    """What was moved into weights is folded: the network has the modules it had, in few bits or not."""
    one = case(method, family)
    before = dict(one.base.network.named_modules())
    after = dict(one.quantized.network.named_modules())
    assert before.keys() == after.keys()
    changed = {name for name in before if type(after[name]) is not type(before[name])}
    assert changed == layers(one.quantized).keys()
    assert all(type(before[name]) is nn.Linear for name in changed)


@every
def test_samples_stay_close_to_the_float_model(method: str, family: str) -> None:
    one = case(method, family)
    want, got = samples(one.base, one.walk), samples(one.quantized, one.walk)
    assert not torch.equal(want, got)
    error = ((got - want).norm() / want.norm()).item()
    # A random network has no redundancy. 8-bit weights are off by up to 1/254 of the largest of a row and e4m3 by up to
    # 1/16 of themselves, 4-bit ones by 1/14 of their block's; a wrong scale, fold or column would be off by about 1.
    assert error < (0.2 if method == "int4-wo" else 0.05)


@every
def test_all_computed_under_a_schedule_equals_dense(method: str, family: str) -> None:
    one = case(method, family)
    everything = np.ones((one.walk.table.num_calls, len(one.base.graph)), bool)
    assert torch.equal(samples(one.quantized, one.walk, everything), samples(one.quantized, one.walk))


@every
def test_a_seed_decides_everything(method: str, family: str) -> None:
    one, again = case(method, family).quantized, quantize(method, family).quantized
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=8)  # the first builds the model
@given(mask=st.integers(0, 2**31))
def test_skipping_any_branches_leaves_all_others_at_their_call(family: str, mask: int) -> None:
    """A layer that runs at call t rounds its input at row t, whatever ran before."""
    one = case("int8-max", family)
    compute = random_mask(one.walk.table.num_calls, len(one.base.graph), seed=mask)
    want = one.quantized.log_scales.detach().exp()
    used: list[tuple[str, float]] = []
    found = {name: layer for name, layer in layers(one.quantized).items() if layer.column is not None}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, _, name=name: used.append((name, layer.scales[layer.column].item()))
        )
        for name, layer in found.items()
    ]
    batch = draw(one.base, one.walk, first=0, count=1)
    ran = 0
    for call, _ in enumerate(
        trajectory(one.quantized, one.walk.table, batch.condition, batch.start, cfg=CFG, compute=compute)
    ):
        ran += len(used)
        assert all(scale == want[call, found[name].column].item() for name, scale in used)
        used.clear()
    for hook in hooks:
        hook.remove()
    assert 0 < ran < one.walk.table.num_calls * len(found) or compute.all()


@every
def test_a_layer_refuses_to_run_outside_its_adapter(method: str, family: str) -> None:
    rounding = [layer for layer in layers(case(method, family).quantized).values() if layer.column is not None]
    for layer in rounding[:1]:
        with pytest.raises(ModelError, match="outside its adapter"):
            layer(torch.zeros(1, layer.in_features))
    assert rounding or method == "int4-wo"


@every
def test_a_saved_model_is_read_back_bit_for_bit(method: str, family: str, tmp_path: Path) -> None:
    one = case(method, family)
    origin = Origin(one.base.identity("tiny", {"class": "x"}, CFG), one.quantized.plan, {})
    file = tmp_path / "quantized.safetensors"
    save_quantized(one.quantized, one.base, origin, file)
    assert read_origin(file) == origin
    again = load_quantized(file, one.base)
    want, got = one.quantized.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].dtype == got[name].dtype and torch.equal(want[name], got[name]), name
    assert torch.equal(samples(again, one.walk), samples(one.quantized, one.walk))
    assert again.identity("a", {}, CFG) == one.quantized.identity("a", {}, CFG)


@every
def test_the_file_holds_integers_and_nothing_that_the_float_model_has(method: str, family: str, tmp_path: Path) -> None:
    one = case(method, family)
    origin = Origin(one.base.identity("tiny", {}, CFG), one.quantized.plan, {})
    file = tmp_path / "quantized.safetensors"
    save_quantized(one.quantized, one.base, origin, file)
    float_bytes, few = network_bytes(one.base), network_bytes(one.quantized)
    quantized = sum(layer.integers.numel() for layer in layers(one.quantized).values())
    saved = 4 * quantized - (float_bytes - few)  # what integers and scales take
    folded = 4 * sum(p.numel() for name, p in one.base.network.named_parameters() if name.endswith("bias"))
    header = file.stat().st_size - saved - 4 * one.quantized.log_scales.numel() - 4 * one.walk.table.num_calls
    # JSON of about 150 bytes a tensor and 250 a layer of the plan; biases only where something was folded into them
    assert 0 < header < 600 * (len(layers(one.quantized)) + 4) + folded


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_leaves_integers_and_scales(family: str) -> None:
    """float8 is a float to torch, and `.to(float16)` would make another model of it."""
    one = quantize("fp8", family)
    before = one.quantized.state_dict()
    kept = {name: before[name].clone() for name in before if name.endswith(("integers", "_scale", "_scales", "steps"))}
    one.quantized.to(torch.float16)
    after = one.quantized.state_dict()
    assert kept and all(after[name].dtype == was.dtype and torch.equal(after[name], was) for name, was in kept.items())
    assert one.quantized.dtype == torch.float16
    assert samples(one.quantized, one.walk).isfinite().all()
