"""A bundle in few bits that rounds otherwise than PyTorch is found out, at any call and in every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import CFG, Exported, export, make_dit
from test_qdq import MASK, quantized

from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.linear import QuantLinear
from hcompress_export.parity import CHAINED, INPUT, STEP, TOLERANCE, Drift, drifts, first_drift
from hcompress_export.rounded import readers, shown
from hcompress_export.trace import trace
from hcompress_runtime import Runtime
from hcompress_runtime.bundle import LAYOUTS, open_bundle
from hcompress_runtime.kernels import OF_FLOATS, OF_INTEGERS, executed

LAST = len(MASK) - 1
LABELS = [0, 3]


@pytest.fixture(scope="module")
def dit() -> QuantizedAdapter:
    return quantized(make_dit())


@pytest.fixture(scope="module")
def traced(dit: QuantizedAdapter) -> ir.Model:
    return trace(dit, CFG)


@pytest.fixture(scope="module", params=LAYOUTS)
def bundle(request, dit: QuantizedAdapter, traced: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    return export(folder / "b", dit, MASK, layout=request.param, traced=traced)


def late(sizes: torch.Tensor) -> torch.Tensor:
    return sizes.roll(1, dims=0)


def backwards(sizes: torch.Tensor) -> torch.Tensor:
    return sizes.flip(0)


def larger(sizes: torch.Tensor) -> torch.Tensor:
    return sizes + log(1.25)


def one_at_the_last_call(sizes: torch.Tensor) -> torch.Tensor:
    """An input of block 1's attention, which that call computes, by a hundredth."""
    changed = sizes.clone()
    changed[LAST, 3] += log(1.01)
    return changed


@contextmanager
def tampered(adapter: QuantizedAdapter, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    sizes = adapter.log_scales.data
    adapter.log_scales.data = change(sizes)
    try:
        yield
    finally:
        adapter.log_scales.data = sizes


def compared(adapter: QuantizedAdapter, path: Path) -> tuple[list[Drift], list[Drift]]:
    """What is compared call by call, and all else."""
    with Runtime(path, threads=1) as runtime:
        found = drifts(adapter, runtime, LABELS, MASK)
    others = (*CHAINED, STEP)
    return [one for one in found if one.tensor not in others], [one for one in found if one.tensor in others]


def test_call_by_call_nothing_more_is_allowed_than_without_rounding(dit: QuantizedAdapter, bundle: Exported) -> None:
    by_call, others = compared(dit, bundle.path)
    assert first_drift([*by_call, *others]) is None
    assert {drift.allowed for drift in by_call} == {TOLERANCE["float32"]}


def test_each_input_of_a_call_is_compared_where_something_computed_reads_it(
    dit: QuantizedAdapter, bundle: Exported
) -> None:
    names = readers(dit.network)
    by_call, _ = compared(dit, bundle.path)
    seen = [{one.tensor for one in by_call if one.call == call and one.tensor.startswith(INPUT)} for call in (0, 1)]
    assert seen[0] == {f"{INPUT}{name}" for name in names.values()}
    blocks = [name for name in names.values() if "attn1" in name or "ff" in name]
    absent = {f"{INPUT}{name}" for name in blocks if ("blocks.0" in name) == ("ff" in name)}  # MASK[1]
    assert seen[1] == seen[0] - absent


@pytest.mark.parametrize("change", [late, backwards, larger, one_at_the_last_call])
def test_step_sizes_of_another_call_or_layer_are_found(dit: QuantizedAdapter, bundle: Exported, change) -> None:
    with tampered(dit, change):
        by_call, others = compared(dit, bundle.path)
    drift = first_drift(by_call)
    # A step of the grid is 1/127 of the largest input, and no layer here makes a hundredth of what it is given.
    assert drift is not None and max(one.error for one in by_call) > 10 * TOLERANCE["float32"]
    assert drift.call == (LAST if change is one_at_the_last_call else 0)
    assert any(one.tensor == STEP and not one.holds for one in others)


def test_a_graph_that_feeds_other_step_sizes_is_found_though_those_in_the_bundle_are_right(
    dit: QuantizedAdapter, traced: ir.Model, bundle: Exported, tmp_path: Path
) -> None:
    """Each input is given that of the next."""
    path = export(tmp_path / "b", dit, MASK, layout=open_bundle(bundle.path).layout, traced=traced).path
    opened = open_bundle(path)
    for file in {*opened.graphs}:
        model = onnx.load(path / file, load_external_data=False)
        (split,) = (node for node in model.graph.node if node.op_type == "Split" and len(node.output) == 9)
        names = [*split.output]
        split.output[:] = [*names[1:], names[0]]
        (path / file).write_bytes(model.SerializeToString())
    with Runtime(opened, threads=1) as runtime:
        found = drifts(dit, runtime, LABELS, MASK)
    drift = first_drift(found)
    assert drift is not None and drift.call == 0 and drift.tensor not in (*CHAINED, STEP)


def test_a_layer_without_its_weights_is_found_at_what_follows_it(dit: QuantizedAdapter, bundle: Exported) -> None:
    layer = dit.network.get_submodule("transformer_blocks.0.attn1.to_out.0")
    assert isinstance(layer, QuantLinear)
    integers, layer.integers = layer.integers, torch.zeros_like(layer.integers)
    try:
        drift = first_drift(compared(dit, bundle.path)[0])
    finally:
        layer.integers = integers
    assert drift is not None and (drift.call, drift.tensor) == (0, f"{INPUT}transformer_blocks.0.ff.net.0.proj")


def test_showing_what_is_rounded_changes_no_kernel(bundle: Exported) -> None:
    with Runtime(bundle.path, threads=1) as runtime, shown(runtime) as other:
        for call in (0, 1):
            before, after = executed(runtime.bundle, call), executed(other.bundle, call)
            assert all(before[name] == after[name] for name in (*OF_INTEGERS, *OF_FLOATS)) and before["QGemm"]


def test_in_a_half_step_sizes_are_still_those_of_the_model(tmp_path: Path) -> None:
    adapter = quantized(make_dit(1)).half()
    mask = np.array(MASK[:, :2])
    path = export(tmp_path / "b", adapter, mask).path
    with Runtime(path, threads=1) as runtime:
        assert first_drift(drifts(adapter, runtime, LABELS, mask)) is None
        with tampered(adapter, larger):
            drift = first_drift(drifts(adapter, runtime, LABELS, mask))
    assert drift is not None and drift.tensor == STEP and drift.error == pytest.approx(0.2)  # 1 - 1 / 1.25
