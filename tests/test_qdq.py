"""Bundles in few bits: standard ONNX, weights stored as integers, run as integers, equal to the model in PyTorch."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import CALLS, CFG, Exported, export, make_dit, make_pixart, make_table, random_corrections, random_mask

from hcompress.adapter import Adapter
from hcompress.corrections import Corrections
from hcompress.errors import InputError
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.lowbit.grid import FORMATS
from hcompress.lowbit.linear import QuantLinear
from hcompress.quant.build import build
from hcompress.quant.calibration import Walk, observe
from hcompress.quant.selection import select
from hcompress_export.narrow import parse_rows
from hcompress_export.parity import drifts, first_drift
from hcompress_export.passes import remove_unused
from hcompress_export.qdq import layers_of
from hcompress_export.trace import OPSET, trace
from hcompress_runtime import Runtime
from hcompress_runtime.bake import bake
from hcompress_runtime.bundle import LAYOUTS, WEIGHTS, open_bundle
from hcompress_runtime.conditions import example
from hcompress_runtime.engine_cache import _step_sizes, build_engines
from hcompress_runtime.kernels import OF_FLOATS, OF_INTEGERS, _profile, executed
from hcompress_runtime.weights import map_weights

# One product, of the same integers summed in another order. In half, scales and weights are rounded before it instead
# of after (2**-11 each), and a quotient that is rounded to a tie moves one input by one step.
ONE_LAYER = {"float32": 2e-6, "float16": 2e-2}
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
MASK = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]], bool)  # 1 and 3 are one graph


def quantized(adapter: Adapter, format: str = "w8a8", modulation: str | None = "w8a8") -> QuantizedAdapter:
    """`adapter` by the ranges that 4 samples show."""
    table, _ = make_table()
    selection = select(adapter, format, modulation=modulation)
    seen = observe(adapter, selection, Walk(table, CFG, samples=4, batch=4))
    return build(adapter, selection, seen.amax, torch.from_numpy(table.timesteps).float(), {"name": "absmax"})


@pytest.fixture(scope="module")
def dit() -> QuantizedAdapter:
    return quantized(make_dit())


@pytest.fixture(scope="module")
def traced(dit: QuantizedAdapter) -> ir.Model:
    return trace(dit, CFG)


@pytest.fixture(scope="module")
def bundles(dit: QuantizedAdapter, traced: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("layouts")
    return {layout: export(folder / layout, dit, MASK, layout=layout, traced=traced) for layout in LAYOUTS}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_the_onnx_that_its_layers_predict(format: str) -> None:
    adapter = quantized(make_dit(1), format, format)
    model = trace(adapter, CFG)
    check_layers(adapter, model, ONE_LAYER["float32"])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    layers = [module for module in adapter.network.modules() if isinstance(module, QuantLinear)]
    nodes = [*model.graph]
    kinds = Counter(node.op_type for node in nodes)
    assert {node.domain for node in nodes} == {""} and not kinds.keys() & {"Round", "Clip"}
    assert kinds["QuantizeLinear"] == adapter.log_scales.shape[1]  # one for query, key and value
    assert kinds["DequantizeLinear"] == len(layers) + kinds["QuantizeLinear"]
    assert model.opset_imports[""] == (21 if "w4" in format else OPSET)
    assert layers_of(adapter.network)[0]["weight"] == FORMATS[format].weight
    for node in nodes:
        if node.op_type == "DequantizeLinear":
            assert {use.node.op_type for use in node.outputs[0].uses()} == {"Gemm"}
        if node.op_type in QUANTIZING:
            scale, *zero = node.inputs[1:]
            assert scale.const_value is None or (scale.const_value.numpy() > 0).all()
            assert all(not value.const_value.numpy().astype(np.float32).any() for value in zero)
    kept = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
    matrices = [value.const_value for value in model.graph.initializers.values() if len(value.const_value.shape) == 2]
    stored = Counter(tensor.dtype for tensor in matrices)
    assert stored[kept[FORMATS[format].weight]] == len(layers)


def test_integers_and_scales_are_stored_as_they_are(dit: QuantizedAdapter, bundles: dict[str, Exported]) -> None:
    contents = {(bundles[layout].path / WEIGHTS).read_bytes() for layout in LAYOUTS}
    assert len(contents) == 1
    stored = map_weights(bundles["embedded"].path / WEIGHTS).values()
    bits = {array.tobytes() for array in stored if array.dtype == np.int8}
    layers = [module for module in dit.network.modules() if isinstance(module, QuantLinear)]
    assert {layer.integers.numpy().tobytes() for layer in layers} <= bits


def test_int4_is_two_to_a_byte(tmp_path: Path) -> None:
    adapter = quantized(make_dit(), "w4", None)
    path = export(tmp_path / "b", adapter, MASK).path
    packed = {array.tobytes() for array in map_weights(path / WEIGHTS).values() if array.dtype == np.uint8}
    layers = [module for module in adapter.network.modules() if isinstance(module, QuantLinear)]
    nibbles = [layer.integers.numpy().reshape(-1, 2).astype(np.uint8) & 15 for layer in layers]
    assert {(pair[:, 0] | pair[:, 1] << 4).tobytes() for pair in nibbles} == packed


def layer_by_layer(adapter: QuantizedAdapter, traced: ir.Model) -> list[tuple[np.ndarray, np.ndarray]]:
    """(what a layer gives in PyTorch, what its part of `model` gives on ONNX Runtime for the same input), in order."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    layers = [module for module in adapter.network.modules() if isinstance(module, QuantLinear)]
    flat = lambda x: x.flatten(0, -2).numpy()  # noqa: E731
    hooks = [layer.register_forward_hook(lambda _, args, y: seen.append((flat(args[0]), flat(y)))) for layer in layers]
    x, constants = torch.randn(2, *adapter.sample_shape), adapter.step_constants(adapter.timesteps[:1])
    with torch.no_grad():
        adapter.guided(x, adapter.condition(example(adapter.conditions, 2)), constants, CFG)
    for hook in hooks:
        hook.remove()
    model = traced.clone()
    graph, feeds = model.graph, {f"step.{name}": rows.float().numpy() for name, rows in constants.items()}
    graph.outputs.clear()
    products = [node for node in graph if node.op_type == "Gemm" and node.inputs[1].producer()]
    for index, (node, (given, _)) in enumerate(zip(products, seen, strict=True)):
        before = node.inputs[0].producer()
        quantize = before.inputs[0].producer() if before is not None and before.op_type == "DequantizeLinear" else node
        if str(quantize.inputs[0].name).startswith("given."):  # by the layer that reads the same
            assert np.array_equal(feeds[quantize.inputs[0].name], given)
        else:
            name = f"given.{index}"
            dtype = ir.DataType.from_numpy(given.dtype)
            graph.inputs.append(ir.Value(name=name, shape=ir.Shape([None, given.shape[1]]), type=ir.TensorType(dtype)))
            quantize.replace_input_with(0, graph.inputs[-1])
            feeds[name] = given
        after = node if len(node.inputs) == 3 else next(iter(node.outputs[0].uses())).node
        graph.outputs.append(after.outputs[0])
    for value in graph.outputs:
        value.shape, value.type = ir.Shape([None, None]), ir.TensorType(ir.DataType.from_numpy(seen[0][1].dtype))
    remove_unused(model)
    names = {value.name for value in graph.inputs}
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: array for name, array in feeds.items() if name in names})
    return [(want, array) for (_, want), array in zip(seen, got, strict=True)]


def check_layers(adapter: QuantizedAdapter, traced: ir.Model, tolerance: float) -> None:
    """Given the same input, so that no tie has been moved before."""
    for want, got in layer_by_layer(adapter, traced):
        error = np.abs(got.astype(np.float32) - want).max() / np.abs(want.astype(np.float32)).max()
        assert error <= tolerance


@pytest.mark.parametrize(("make", "dtype"), [(make_pixart, "float32"), (make_dit, "float16")])
def test_every_layer_is_that_of_pytorch(make, dtype: str) -> None:
    adapter = quantized(make(1)).to(getattr(torch, dtype))
    check_layers(adapter, trace(adapter, CFG), ONE_LAYER[dtype])


def check_trajectory(
    adapter: QuantizedAdapter, path: Path, mask: np.ndarray, corrections: Corrections | None = None
) -> None:
    with Runtime(path, threads=1) as runtime:
        given = example(adapter.conditions, 3)
        found = drifts(adapter, runtime, given, mask, corrections)
        assert first_drift(found) is None
        assert runtime.peak_cache_bytes == runtime.bundle.peak_cache_bytes(3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_cached_trajectories_are_those_of_pytorch(dit, bundles, layout: str) -> None:
    check_trajectory(dit, bundles[layout].path, MASK)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_and_so_they_are_where_reuse_is_corrected(dit, traced, layout: str, tmp_path: Path) -> None:
    corrections = random_corrections(MASK, dit.graph.widths)
    path = export(tmp_path / "b", dit, MASK, layout=layout, traced=traced, corrections=corrections).path
    check_trajectory(dit, path, MASK, corrections)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_and_float16_and_text_run_in_every_layout(layout: str, tmp_path: Path) -> None:
    adapter = quantized(make_pixart(1), "fp8").half()
    mask = random_mask(CALLS, len(adapter.graph), seed=1)
    check_trajectory(adapter, export(tmp_path / "b", adapter, mask, layout=layout).path, mask)


def test_integers_are_multiplied_as_integers_in_every_layout(
    dit: QuantizedAdapter, bundles: dict[str, Exported]
) -> None:
    layers = sum(isinstance(module, QuantLinear) for module in dit.network.modules())
    for exported in bundles.values():
        bundle = open_bundle(exported.path)
        first, *later = (executed(bundle, call) for call in range(len(bundle.graphs)))
        assert sum(first[name] for name in OF_INTEGERS) == layers
        # The last layers stay in float, and so do the two products of each attention.
        assert sum(first[name] for name in OF_FLOATS) == 2 + 2 * 2
        assert not first["DequantizeLinear"]
        assert all(counts["QGemm"] for counts in later)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_multiplied_unsigned_by_signed(bundles: dict[str, Exported], layout: str) -> None:
    """As the fast instruction has it. ONNX Runtime shifts an input only where nobody else reads it."""
    bundle = open_bundle(bundles[layout].path)
    for call in range(len(bundle.graphs)):
        products = [node for node in _profile(bundle, "cpu", 1, call) if node["op_name"] == "QGemm"]
        assert {kind for node in products for kind in node["input_type_shape"][0]} == {"uint8"}


def test_a_reused_branch_leaves_only_the_rows_of_its_gate(bundles: dict[str, Exported]) -> None:
    bundle = open_bundle(bundles["embedded"].path)
    whole, part = (ir.load(bundle.path / graph).graph for graph in bundle.graphs[:2])
    integers = [str(name) for name, value in part.initializers.items() if value.dtype == ir.DataType.INT8]
    rows = [found for name in integers if (found := parse_rows(name)) and found[0] in whole.initializers]
    kept = {(begin, end) for name, begin, end in rows if len(whole.initializers[name].shape) == 2}
    # Of six parts of 32: block 0 lacks shift and scale of its MLP, block 1 those of its attention, which come first.
    assert kept == {(0, 3 * 32), (5 * 32, 6 * 32), (2 * 32, 6 * 32)}
    weights = {file: bundle.weight_bytes[file] for file in bundle.graphs}
    assert weights[bundle.graphs[1]] < weights[bundle.graphs[0]]


def test_an_opset_that_is_too_old_is_refused() -> None:
    with pytest.raises(InputError, match="opset 20 has no int4 weights; use 21"):
        trace(quantized(make_dit(), "w4a8", None), CFG, opset=20)


@pytest.mark.parametrize("layout", ["embedded", "per-mask"])
def test_an_engine_holds_the_largest_step_sizes_of_its_calls(bundles: dict[str, Exported], layout: str) -> None:
    bundle = open_bundle(bundles[layout].path)
    name, sizes = "step.activation_scales", bundle.constants["activation_scales"]
    graph = bundle.path / bundle.graphs[1]
    assert bundle.graphs[1] == bundle.graphs[3] != bundle.graphs[2]
    largest = _step_sizes(bundle, bundle.graphs[1])
    assert np.array_equal(largest[name], np.maximum(sizes[1:2], sizes[3:4]))
    baked = onnx.load_from_string(bake(graph, largest))
    assert name in {value.name for value in onnx.load(graph, load_external_data=False).graph.input}
    assert name not in {value.name for value in baked.graph.input}
    values = {tensor.name: tensor for tensor in baked.graph.initializer}
    nodes = [node for node in baked.graph.node if node.op_type in QUANTIZING]
    assert nodes and all(node.input[1] in values for node in nodes)
    found = {
        float(onnx.numpy_helper.to_array(values[node.input[1]])) for node in nodes if node.op_type == "QuantizeLinear"
    }
    assert found <= set(largest[name].ravel().tolist())
    pairs = Counter((node.op_type, *node.input) for node in nodes)
    assert set(pairs.values()) == {1}  # one for all that read a tensor, whatever ONNX Runtime is given
    split = [node for node in onnx.load(graph, load_external_data=False).graph.node if node.op_type in QUANTIZING]
    assert len(nodes) < len(split)


@pytest.mark.parametrize(
    ("format", "dtype", "layout", "sm"),
    [
        ("w8a8", "float32", "per-mask", 89),
        ("w8a8", "float16", "embedded", 120),
        ("fp8", "float16", "per-mask", 120),
        ("fp8", "float32", "embedded", 89),
    ],
)
def test_tensorrt_rtx_builds_them_ahead_of_time(format: str, dtype: str, layout: str, sm: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hcompress[trt-rtx]'")
    adapter = quantized(make_dit(), format).to(getattr(torch, dtype))
    path = export(tmp_path / "b", adapter, MASK, layout=layout).path
    bundle = replace(open_bundle(path), graphs=open_bundle(path).graphs[1:2])  # one is enough, and slots are read
    (engines,) = build_engines(bundle, "rtx", [sm], (1, 2, 2))
    content = gzip.decompress(next(iter(engines.files.values())).read_bytes())
    names = [str(value.name) for value in ir.load(bundle.path / bundle.graphs[0]).graph.inputs]
    assert [name for name in names if name.encode() not in content] == ["step.activation_scales"]
