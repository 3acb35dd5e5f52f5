"""Calibration and what methods make of it, against modelopt, and against what they are defined to be."""

from __future__ import annotations

import statistics
import sys
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CFG, make_dit, make_pixart, make_table, make_uvit, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hcompress.adapter import Adapter
from hcompress.errors import MissingExtra, ModelError, RecipeError
from hcompress.lowbit.adapter import twin
from hcompress.lowbit.grid import FORMATS, SMALLEST_SCALE, pack, unpack
from hcompress.lowbit.linear import QuantLinear, absmax_scale, widen
from hcompress.quant.analysis import KEPT, OUTLIER, analyze, keep
from hcompress.quant.balance import balanced, folds_of
from hcompress.quant.build import build
from hcompress.quant.calibration import Walk, draw, least_error, nearest_run, observe, sampled, watch
from hcompress.quant.ptq import calibrate, convert, ptq
from hcompress.quant.ptq4dit import Salience, percentile_scale, spearman
from hcompress.quant.selection import layers_of, select
from hcompress.quant.settings import PtqSettings
from hcompress.sampling import sample

FAMILIES = {"dit": make_dit, "pixart": make_pixart}


def walk_of(**changes: Any) -> Walk:
    return Walk(make_table()[0], CFG, **{"samples": 4, "batch": 2} | changes)


@pytest.fixture(scope="module")
def timesteps() -> torch.Tensor:
    return torch.from_numpy(make_table()[0].timesteps)


def refused(kind: type[Exception], make: Any) -> str:
    """The line that `make` is refused with."""
    with pytest.raises(kind) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- which layers


def test_layers_are_those_that_a_call_runs_with_their_branches(tiny_dit: Adapter) -> None:
    layers = {layer.name: layer for layer in layers_of(tiny_dit)}
    assert not any("emb" in name for name in layers)  # timestep MLPs give step constants
    for name, layer in layers.items():
        branch = None if layer.branch is None else tiny_dit.graph.names[layer.branch]
        kind = {"attn1": "attn", "ff": "mlp"}.get(name.split(".")[2] if name.count(".") > 1 else "")
        assert branch == (f"{name.split('.')[1]}.{kind}" if kind else None), name
    q, k, v = (layers[f"transformer_blocks.1.attn1.to_{x}"].input for x in "qkv")
    assert q == k == v != layers["transformer_blocks.1.attn1.to_out.0"].input


def test_text_is_one_input_of_all_blocks(tiny_pixart: Adapter) -> None:
    selection = select(tiny_pixart, "w8a8")
    readers = selection.readers(selection.columns["transformer_blocks.0.attn2.to_k"])
    assert readers == [f"transformer_blocks.{n}.attn2.to_{x}" for n in range(2) for x in "kv"]
    assert not any(name.startswith(("caption", "adaln", "proj_out")) for name in selection.formats)


def test_modulation_is_weight_only_and_first_and_last_layers_are_kept(tiny_dit: Adapter) -> None:
    formats = select(tiny_dit, "w8a8").formats
    assert formats["transformer_blocks.0.norm1.linear"] == FORMATS["w8"]
    assert {"proj_out_1", "proj_out_2"}.isdisjoint(formats)
    assert "transformer_blocks.0.norm1.linear" not in select(tiny_dit, "w8a8", modulation=None).formats


def test_patterns_decide(tiny_dit: Adapter) -> None:
    assert set(select(tiny_dit, "w8a8", only=["proj_out_*"]).formats) == {"proj_out_1", "proj_out_2"}
    kept = select(tiny_dit, "w8a8", keep=["*.attn1.*"]).formats
    assert kept and not any("attn1" in name for name in kept)
    with pytest.raises(RecipeError, match=r"'\*attention\*' matches no linear layer; .*'transformer_blocks"):
        select(tiny_dit, "w8a8", keep=["*attention*"])
    with pytest.raises(RecipeError, match="no layer is left"):
        select(tiny_dit, "w8a8", keep=["*"])
    with pytest.raises(RecipeError, match="no format 'w2a2'; choose from: w8a8"):
        select(tiny_dit, "w2a2")


def test_a_shared_layer_is_replaced_wherever_it_is_held(timesteps: torch.Tensor) -> None:
    adapter: Any = make_dit()
    first, second = adapter.network.transformer_blocks
    second.ff = first.ff
    selection = select(adapter, "w8a8", only=["*.ff.*"])
    assert all(name.startswith("transformer_blocks.0") for name in selection.formats)
    seen = observe(adapter, selection, walk_of())
    quantized: Any = build(adapter, selection, seen.amax, timesteps, {"name": "x"})
    blocks = quantized.network.transformer_blocks
    assert isinstance(blocks[1].ff.net[2], QuantLinear) and blocks[0].ff.net[2] is blocks[1].ff.net[2]


# ---- calibration


def everything(adapter: Adapter, walk: Walk, names: list[str]) -> dict[tuple[int, int], list[torch.Tensor]]:
    """All inputs of the layers `names`, by call and layer."""
    kept: dict[tuple[int, int], list[torch.Tensor]] = {}

    def keep(column: int, call: int, x: torch.Tensor) -> None:
        kept.setdefault((call, column), []).append(x.clone())

    watch(adapter, walk, {name: partial(keep, column) for column, name in enumerate(names)})
    return kept


def test_ranges_are_those_of_the_trajectory(tiny_dit: Adapter) -> None:
    """Against all inputs kept and reduced afterwards; also under a mask, where a skipped call borrows the nearest."""
    selection = select(tiny_dit, "w8a8")
    compute = random_mask(5, len(tiny_dit.graph), seed=3)
    for walk in (walk_of(), walk_of(compute=compute)):
        names = [selection.readers(column)[0] for column in range(selection.num_inputs)]
        kept = everything(tiny_dit, walk, names)
        seen = observe(tiny_dit, selection, walk)
        for call in range(5):
            for column in range(selection.num_inputs):
                assert seen.ran[call, column] == ((call, column) in kept)
                if (call, column) in kept:
                    whole = torch.cat(kept[call, column]).flatten(0, -2)
                    assert seen.amax[call, column] == whole.abs().max()
                    values, weights = seen.values[column][call], seen.weights[column][call]
                    assert torch.isin(values[weights > 0], whole).all()
                    assert weights.sum().item() == pytest.approx(whole.numel(), rel=1e-5)  # a float32 sum
        branches = {layer.name: layer.branch for layer in selection.layers}
        if walk.compute is not None:
            assert all(seen.ran[:, c].tolist() == compute[:, branches[name]].tolist() for c, name in enumerate(names))


def test_the_nearest_call_that_ran_stands_in_for_one_that_did_not() -> None:
    ran = torch.tensor([[True], [False], [False], [False], [True]])
    assert nearest_run(torch.tensor([[1.0], [0], [0], [0], [5]]), ran).flatten().tolist() == [1, 1, 1, 5, 5]


def test_what_a_sample_draws_does_not_depend_on_its_batch(tiny_dit: Adapter) -> None:
    selection = select(tiny_dit, "w8a8")
    together, apart = (observe(tiny_dit, selection, walk_of(batch=batch)).amax for batch in (4, 1))
    assert torch.allclose(together, apart, rtol=1e-5)  # float32 sums of a batched product in another order


def test_calls_at_one_timestep_share_the_larger_range(tiny_dit: Adapter) -> None:
    selection = select(tiny_dit, "w8a8", modulation=None)
    amax = torch.rand(3, selection.num_inputs) + 0.5
    quantized = build(tiny_dit, selection, amax, torch.tensor([900.0, 500.0, 500.0]), {"name": "x"})
    scales = quantized.step_constants(torch.tensor([900.0, 500.0]))["activation_scales"]
    want = torch.stack([amax[0], amax[1:].amax(dim=0)]) / 127
    assert torch.allclose(scales, want, rtol=1e-6)  # through a logarithm and back


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["w8a8", "w4a4", "fp8"]), st.floats(2.5, 30.0), st.integers(0, 1000))
def test_the_range_of_least_error_is_that_of_all_values(name: str, tail: float, seed: int) -> None:
    """Found on one value in a hundred, it is no worse on all of them: what it clips is among those that are kept."""
    grid = FORMATS[name].activation_grid
    assert grid is not None
    values = torch.from_numpy(np.random.default_rng(seed).standard_t(tail, (1, 200_000))).float()
    amax = values.abs().amax(dim=1)
    few, weights = sampled(values[0], 2048, torch.Generator().manual_seed(seed))
    assert len(few) <= 2048 and weights.sum().item() == pytest.approx(values.numel(), rel=1e-5)  # a float32 sum

    def error(range_: torch.Tensor) -> float:
        return (values - grid.fake(values, (range_ / grid.high)[:, None])).abs().pow(2.4).mean().item()

    best = error(least_error(values, torch.ones_like(values), amax, grid))
    found = error(least_error(few[None], weights[None], amax, grid))
    assert best <= error(amax)
    assert found < 1.1 * best  # of 80 ranges a neighbour, as the middle is known by 1 792 draws


def test_a_value_in_a_hundred_thousand_counts_in_the_range_of_least_error() -> None:
    """Where clipping it costs more than a finer step size gains, it is not clipped."""
    adapter: Any = make_dit()
    layer = adapter.network.transformer_blocks[1].ff.net[2]
    found: list[torch.Tensor] = []

    def spike(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0].clone()
        x.view(-1)[7] = 40 * x.abs().max()
        found.append(x)
        return (x,)

    with layer.register_forward_pre_hook(spike):
        selection = select(adapter, "w8a8", only=["transformer_blocks.1.ff.net.2"])
        found.clear()
        seen = observe(adapter, selection, walk_of(samples=64, batch=64))
    grid = FORMATS["w8a8"].activation_grid
    assert grid is not None and found[0].numel() > 1e5
    whole = torch.stack([x.flatten() for x in found])
    want = least_error(whole, torch.ones_like(whole), seen.amax[:, 0], grid)
    got = least_error(seen.values[0], seen.weights[0], seen.amax[:, 0], grid)
    assert torch.allclose(got, want, rtol=0.1)  # a few of the 80 ranges: the middle is drawn


# ---- against modelopt


@pytest.mark.parametrize("format", ["w8a8", "fp8", "w4a8", "w4"])
def test_layers_round_as_modelopt_does(format: str, timesteps: torch.Tensor) -> None:
    """Each layer of modelopt's simulation against ours, at the same ranges, on the input that calibrated it.

    modelopt multiplies by 127 / amax where we divide by amax / 127: a value within an ulp of a tie may go to the other
    neighbour. So all but a few outputs agree to float32 rounding, and none is off by more than what a few inputs of one
    step each make.
    """
    base = make_dit()
    selection, walk = select(base, format, modulation=None), walk_of()
    found = calibrate(base, selection, walk)
    amax = found.amax.amax(dim=0, keepdim=True)  # modelopt's own quantizers hold one range for all calls
    ours = build(base, selection, amax, timesteps, {"name": "x"}, found.weight_scales)
    theirs = twin(base)
    convert(theirs, selection, "max", None, walk)
    generator = torch.Generator().manual_seed(0)
    steps = ours.log_scales[0].exp().split(1)
    for name in selection.formats:
        layer: Any = ours.network.get_submodule(name)
        reference: Any = theirs.network.get_submodule(name)
        scale = 1.0 if layer.column is None else amax[0, layer.column]
        x = torch.randn(64, layer.in_features, generator=generator) / 3 * scale
        with torch.no_grad(), ours.scales.during(steps):
            got, want = layer(x), reference(x)
        assert torch.equal(layer.integers.float().abs().amax(dim=1) > 0, reference.weight.abs().amax(dim=1) > 0)
        size = want.abs().max()
        off = (got - want).abs() / size
        assert (off > 1e-5).float().mean() < 0.01, name  # ties: at most one row of the 64 here and there
        assert off.max() < 0.05, name  # one step of one input: a sixteenth of it in e4m3, 1/127 of the range in int8


def test_modelopt_sees_the_ranges_that_we_see(tiny_dit: Adapter) -> None:
    selection = select(tiny_dit, "w8a8")
    found = calibrate(tiny_dit, selection, walk_of())
    assert torch.equal(found.amax, observe(tiny_dit, selection, walk_of()).amax)
    for name, format in selection.formats.items():
        weight: Any = tiny_dit.network.get_submodule(name).weight
        assert torch.allclose(found.weight_scales[name], absmax_scale(weight, format), rtol=1e-6)  # one division


def test_a_percentile_clips_and_one_scale_is_the_largest(tiny_dit: Adapter) -> None:
    def scales(**settings: Any) -> torch.Tensor:
        return ptq(tiny_dit, walk_of(), PtqSettings(**settings)).log_scales.detach()

    whole, clipped = scales(), scales(method="int8-percentile", percentile=99.0)
    assert (clipped < whole).all()  # the last hundredth of thousands of values reaches beyond the others
    one = scales(one_scale=True)
    assert torch.equal(one, whole.amax(dim=0, keepdim=True).expand_as(one))


def test_modelopt_under_a_mask_knows_which_call_it_is(tiny_dit: Adapter) -> None:
    """Its own step-aware calibrator counts forwards, and would be off after the first skipped branch."""
    selection, walk = select(tiny_dit, "w8a8"), walk_of(compute=random_mask(5, len(tiny_dit.graph), seed=1))
    assert torch.equal(calibrate(tiny_dit, selection, walk).amax, observe(tiny_dit, selection, walk).amax)


def test_ranges_for_modelopt_are_where_its_weights_are() -> None:
    """On a GPU, of which only shapes and devices are needed: SmoothQuant multiplies what both sides found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of modelopt's own imports
        from modelopt.torch.quantization.calib import MaxCalibrator

        from hcompress.quant.by_call import ByCall, Now

    calibrator = ByCall("layer", Now())
    with FakeTensorMode():
        one = MaxCalibrator(8, -1, False)
        one._calib_amax = torch.empty(1, 1, 4, device="cuda", dtype=torch.float16)
        calibrator.each = {0: one, 3: one}
        found, weight = calibrator.compute_amax(), torch.empty(8, 4, device="cuda")
        assert found is not None and (weight.abs().amax(dim=0) / found).device.type == "cuda"
        assert {call: range_.device.type for call, range_ in calibrator.by_call().items()} == {0: "cpu", 3: "cpu"}


def test_without_modelopt_the_command_that_installs_it(tiny_dit: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    line = refused(MissingExtra, lambda: ptq(tiny_dit, walk_of(), PtqSettings()))
    assert line == "nvidia-modelopt is not installed; pip install 'hcompress[train]'"


# ---- balancing


@pytest.mark.parametrize("family", FAMILIES)
def test_balancing_changes_nothing_but_the_inputs(family: str) -> None:
    base = FAMILIES[family]()
    selection, walk = select(base, "w8a8"), walk_of()
    folds = folds_of(base, selection)
    assert folds
    generator = torch.Generator().manual_seed(0)
    widths = {column: base.network.get_submodule(fold.readers[0]).weight.shape[1] for column, fold in folds.items()}
    divisors = {column: torch.rand(width, generator=generator) * 4 + 0.2 for column, width in widths.items()}
    moved = balanced(base, folds, divisors)
    batch = draw(base, walk, first=0, count=2)
    want, got = (sample(a, walk.table, batch.condition, batch.start, cfg=CFG) for a in (base, moved))
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max())  # float32, factors of 0.2 to 4.2 apart, five calls
    names = [selection.readers(column)[0] for column in range(selection.num_inputs)]
    before, after = everything(base, walk, names), everything(moved, walk, names)
    for (call, column), inputs in before.items():
        for one, other in zip(inputs, after[call, column], strict=True):
            error = (other * divisors.get(column, torch.ones(())) - one).abs().max()
            assert error < 1e-3 * one.abs().max()  # as above


def test_smoothquant_takes_a_weight_that_ignores_an_input() -> None:
    """As pruned or masked channels leave it; modelopt would divide by its zeros."""
    base = FAMILIES["dit"]()
    reader = folds_of(base, select(base, "w8a8"))[0].readers[0]
    with torch.no_grad():
        base.network.get_submodule(reader).weight[:, 3] = 0
    quantized = ptq(base, walk_of(), PtqSettings(method="int8-smoothquant"))
    assert quantized.log_scales.isfinite().all()
    assert not quantized.network.get_submodule(reader).integers[:, 3].any()


def test_smoothquant_names_a_weight_that_ignores_all_inputs() -> None:
    """It would make an input of rounding errors for the next layer, and a range of those."""
    base = FAMILIES["dit"]()
    value = base.network.get_submodule("transformer_blocks.0.attn1.to_v")
    with torch.no_grad():
        value.weight.zero_()
    with pytest.raises(ModelError, match=r"blocks\.0\.attn1\.to_v is all zero, which nothing can balance"):
        ptq(base, walk_of(), PtqSettings(method="int8-smoothquant"))


def test_smoothquant_is_refused_where_it_would_balance_nothing() -> None:
    with pytest.raises(RecipeError, match="nothing to balance; use int8-max"):
        ptq(make_uvit(), walk_of(), PtqSettings(method="int8-smoothquant"))


def test_smoothquant_needs_no_second_walk(tiny_dit: Adapter) -> None:
    """Ranges of the folded model follow from each channel's: those of a walk over it agree."""
    quantized: Any = ptq(tiny_dit, walk_of(), PtqSettings(method="int8-smoothquant"))
    selection = select(tiny_dit, "w8a8")
    found = calibrate(tiny_dit, selection, walk_of(), {"method": "smoothquant", "alpha": 0.8})
    folds = folds_of(tiny_dit, selection)
    divisors = {
        column: 1 / torch.stack([found.multipliers[name] for name in fold.readers]).amax(dim=0)
        for column, fold in folds.items()
    }
    walked = observe(balanced(tiny_dit, folds, divisors), selection, walk_of()).amax
    assert torch.allclose(quantized.log_scales.exp() * 127, walked, rtol=1e-3)  # float32 through another factoring
    column, fold = next(iter(folds.items()))
    weights = torch.cat([tiny_dit.network.get_submodule(name).weight for name in fold.readers]).abs().amax(dim=0)
    inputs = found.channels[column].amax(dim=0)
    assert torch.allclose(divisors[column], inputs**0.8 / weights**0.2, rtol=1e-4)  # Xiao et al. 2023, eq. 4


@settings(deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=20, unique=True), st.integers(0, 9))
def test_spearman_is_the_correlation_of_ranks(values: list[int], seed: int) -> None:
    a, b = torch.tensor(values).float(), torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    ranks = np.argsort(np.argsort(a.numpy())), b.numpy()
    assert spearman(a[None], b.float()).item() == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-5)


def test_salience_is_the_softmax_of_all_samples_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, inputs = torch.rand(8, generator=generator), torch.randn(6, 5, 8, generator=generator)
    salience = Salience("layer", weights)
    salience.see(0, inputs[:2])
    salience.see(3, inputs[2:])
    each = inputs.abs().amax(dim=1)
    want = torch.softmax(-spearman(each, weights), dim=0) @ each
    assert torch.allclose(salience.mean(), want, rtol=1e-5)


@pytest.mark.parametrize("name", ["w8a8", "w4", "fp8"])
def test_a_percentile_is_taken_only_where_it_is_better(name: str) -> None:
    format = FORMATS[name]
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 100.0  # an outlier that is worth keeping or not, as the grid is fine or coarse

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (weight - format.weight_grid.fake(weight, widen(scale, 256))).square().sum()

    found = percentile_scale(weight, format)
    assert found.shape == absmax_scale(weight, format).shape and (found >= SMALLEST_SCALE).all()
    assert error(found) <= error(absmax_scale(weight, format))


# ---- analysis


def test_the_layer_that_hurts_most_is_ranked_first(tiny_dit: Adapter) -> None:
    selection = select(tiny_dit, "w8a8", modulation="w4a4")
    ranked = analyze(tiny_dit, selection, walk_of())
    assert {one.name for one in ranked} == selection.formats.keys()
    assert [one.error for one in ranked] == sorted((one.error for one in ranked), reverse=True)
    assert all("norm1" in one.name for one in ranked[:2])  # the two in four bits, of fourteen
    assert all(one.error > 0 for one in ranked)


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.floats(1e-9, 1e3), st.integers(1, 10**6)), min_size=1))
def test_what_is_proposed_stands_out_and_is_a_twentieth_of_the_weights(layers: dict[str, tuple[float, int]]) -> None:
    errors = {name: error for name, (error, _) in layers.items()}
    weights = {name: count for name, (_, count) in layers.items()}
    kept = keep(errors, weights)
    limit, most = OUTLIER * statistics.median(errors.values()), KEPT * sum(weights.values())
    assert all(errors[name] > limit for name in kept)
    total = sum(weights[name] for name in kept)
    assert total <= most
    worst = max((errors[name] / weights[name] for name in kept), default=0)
    for name in errors.keys() - kept:  # left out: borne, or too large for what was left
        if errors[name] > limit and errors[name] / weights[name] > worst:
            assert weights[name] > most


# ---- weights alone


@pytest.mark.parametrize("method", ["int8-max", "int4-wo", "ptq4dit"])
def test_weights_alone_take_no_walk(tiny_dit: Adapter, method: str) -> None:
    """And a walk would change nothing: a weight's range is its own."""
    from hcompress.quant import QUANTIZERS

    calls: list[int] = []
    told = PtqSettings(method=method, format="w4" if method == "int4-wo" else "w8")
    quantized = QUANTIZERS[method](tiny_dit, walk_of(), told, calls.append)
    assert not calls and quantized.log_scales.shape == (5, 0)
    for name, format in select(tiny_dit, told.resolved_format).formats.items():
        layer: Any = quantized.network.get_submodule(name)
        weight: Any = tiny_dit.network.get_submodule(name).weight
        want = percentile_scale(weight, format) if method == "ptq4dit" else absmax_scale(weight, format)
        assert torch.allclose(layer.weight_scale, want, rtol=1e-6)  # one division


# ---- what is refused


def test_an_empty_calibration_set() -> None:
    assert "0 samples in batches of 2 calibrate nothing" in refused(RecipeError, lambda: walk_of(samples=0))


@pytest.mark.parametrize("method", ["int8-max", "ptq4dit"])
@pytest.mark.parametrize(("value", "said"), [(np.nan, "holds NaN or infinity"), (0.0, "is all zero")])
def test_an_input_without_a_range_is_named(method: str, value: float, said: str) -> None:
    from hcompress.quant import QUANTIZERS

    adapter: Any = make_dit()
    linear = torch.nn.functional.linear
    values = adapter.network.transformer_blocks[1].attn1.to_v
    values.weight.fill_(0.0)
    values.bias.fill_(value)
    line = refused(ModelError, lambda: QUANTIZERS[method](adapter, walk_of(), PtqSettings(method=method)))
    assert line.startswith(
        f"the input of transformer_blocks.1.attn1.to_out.0 {said} at call 0; leave the layer in float"
    )
    x = torch.ones(1, 1, 4, 8, requires_grad=True)  # modelopt replaces functions of torch while a layer runs
    torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
    trained = checkpoint(torch.nn.Linear(8, 8), x, use_reentrant=False)
    trained.sum().backward()
    assert x.grad is not None and trained.grad_fn is not None
    assert torch.is_grad_enabled() and torch.nn.functional.linear is linear


def test_a_weight_that_is_nan_is_named() -> None:
    adapter: Any = make_dit()
    adapter.network.transformer_blocks[0].ff.net[2].weight[3, 4] = torch.nan
    assert "weight of transformer_blocks.0.ff.net.2 holds NaN" in refused(ModelError, lambda: select(adapter, "w8a8"))


def test_a_quantized_model_is_not_quantized_again(tiny_dit: Adapter, timesteps: torch.Tensor) -> None:
    selection = select(tiny_dit, "w8")
    quantized = build(tiny_dit, selection, torch.zeros(5, 0), timesteps, {"name": "x"})
    assert "quantized already" in refused(ModelError, lambda: select(quantized, "w8"))


# ---- storage


@settings(deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda values: len(values) % 2 == 0))
def test_packing_four_bits_loses_none(values: list[int]) -> None:
    integers = torch.tensor([values], dtype=torch.int8)
    packed = pack(integers)
    assert packed.shape == (1, len(values) // 2) and packed[0, 0] & 15 == values[0] & 15  # ONNX: first in the low half
    assert torch.equal(unpack(packed), integers)
