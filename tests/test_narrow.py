"""A step graph computes no part of a linear layer that nothing uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import CALLS, CFG, export, make_dit, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from hcompress_export.narrow import narrow, parse_rows, rows_name
from hcompress_export.passes import remove_unused
from hcompress_runtime.bundle import open_bundle

PARTS, WIDTH, INPUT = 6, 5, 4


def layer(used: list[bool], *, unsqueeze: bool) -> ir.Model:
    """Gemm, perhaps Unsqueeze, Split into PARTS; those that are `used` are outputs."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["rows", INPUT]), type=ir.TensorType(ir.DataType.FLOAT))
    arrays = {
        "w": rng.standard_normal((PARTS * WIDTH, INPUT), np.float32),
        "b": rng.standard_normal(PARTS * WIDTH, np.float32),
        "axes": np.array([1]),
    }
    constants = {name: ir.Value(name=name, const_value=ir.Tensor(array, name=name)) for name, array in arrays.items()}
    nodes = [ir.Node("", "Gemm", [x, constants["w"], constants["b"]], [ir.AttrInt64("transB", 1)])]
    if unsqueeze:
        nodes.append(ir.Node("", "Unsqueeze", [nodes[-1].outputs[0], constants["axes"]]))
    attributes = [ir.AttrInt64("axis", 1 + unsqueeze), ir.AttrInt64("num_outputs", PARTS)]
    nodes.append(ir.Node("", "Split", [nodes[-1].outputs[0]], attributes, num_outputs=PARTS))
    outputs = []
    for index, part in enumerate(nodes[-1].outputs):
        if used[index]:
            nodes.append(ir.Node("", "Neg", [part]))
            nodes[-1].outputs[0].name = f"y{index}"
            nodes[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            outputs.append(nodes[-1].outputs[0])
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[*constants.values()], opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> list[np.ndarray]:
    x = np.random.default_rng(1).standard_normal((3, INPUT), np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@settings(deadline=None, max_examples=30)
@given(used=st.lists(st.booleans(), min_size=PARTS, max_size=PARTS).filter(any), unsqueeze=st.booleans())
def test_every_part_in_use_is_what_it_was_and_no_other_is_computed(used: list[bool], unsqueeze: bool) -> None:
    want = run(layer(used, unsqueeze=unsqueeze))
    model = layer(used, unsqueeze=unsqueeze)
    narrow(model)
    remove_unused(model)
    # Dot products of INPUT floats, summed in another order where another kernel takes the narrower matrix.
    assert all(np.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(run(model), want, strict=True))
    rows = [node.inputs[1].const_value.shape[0] for node in model.graph if node.op_type == "Gemm"]
    assert sum(rows) == WIDTH * sum(used)


def test_a_layer_with_another_use_is_left_alone() -> None:
    model = layer([True] + [False] * (PARTS - 1), unsqueeze=False)
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "Gemm").outputs[0])
    before = [node.op_type for node in model.graph]
    narrow(model)
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (5, 12)])
def test_names_of_rows_are_read_back(begin: int, end: int) -> None:
    assert parse_rows(rows_name("w.0123", begin, end)) == ("w.0123", begin, end)
    assert parse_rows("w.0123") is None


def test_rows_lie_inside_the_whole_tensor_in_the_weight_file(tmp_path: Path) -> None:
    adapter = make_dit()
    mask = random_mask(CALLS, len(adapter.graph))
    mask[1:] = False
    bundle = open_bundle(export(tmp_path / "bundle", adapter, mask, cfg=CFG).path)
    places = {}
    for file in dict.fromkeys(bundle.graphs):
        for name, value in ir.load(bundle.path / file).graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                places[name] = (value.const_value.offset, value.const_value.length, value.const_value.numpy())
    parts = {name: found for name in places if (found := parse_rows(name))}
    assert len(parts) == 2 * 2  # the weights of two gates of two blocks; their biases are small and stay in the graphs
    for name, (whole, begin, end) in parts.items():
        offset, length, array = places[name]
        start, size, values = places[whole]
        assert start <= offset and offset + length <= start + size
        assert np.array_equal(array, values[begin:end])
    dense = sum(bundle.weight_bytes[file] for file in bundle.graphs[:1])
    assert (bundle.path / "graphs/weights.safetensors").stat().st_size < 1.02 * dense + 1e4
