"""Surgery on ONNX graphs. Each pass is one function that changes `model` in place and says what holds before and after.

They meet in `step_graph`, which cuts the graph of one step out of the traced one (see trace.py for its contract).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from hcompress_export.correct import correct
from hcompress_export.narrow import narrow
from hcompress_export.qdq import unshare
from hcompress_runtime.plan import Pattern


@dataclass(frozen=True)
class Region:
    """Where a tensor lies in the weight file, in bytes."""

    offset: int
    length: int


def step_graph(traced: ir.Model, pattern: Pattern) -> ir.Model:
    """The graph of a step of `pattern`: absent branches and what only they used left out. Copies `traced`."""
    model = traced.clone()
    expose(model, pattern)
    reuse(model, pattern)
    remove_unused(model)
    narrow(model)
    unshare(model)
    remove_unused(model)
    return model


def name_batch(model: ir.Model) -> None:
    """Name the two free dimensions and forget the rest of what the exporter noted.

    Before: the first dimension of `latent` is a symbol of the exporter's, caches have an expression of it.
    After: inputs and outputs say "batch" and, for caches, "rows"; values in between have no shape, nothing has notes.
    """
    ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            free = "rows" if value.name and value.name.startswith("cache.") else "batch"
            value.shape = ir.Shape([size if isinstance(size, int) else free for size in value.shape])


def count_by_latent(model: ir.Model) -> None:
    """Take the number of samples from `latent`, which every step is given.

    Before: from the shape of whichever input the exporter chose. After: no step keeps prompts for their number.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for node in model.graph:
        bounds = [node.attributes.get_int(name, -1) for name in ("start", "end")]
        if node.op_type == "Shape" and bounds == [0, 1] and node.inputs[0] in inputs.values():
            node.replace_input_with(0, inputs["latent"])


def keep_slots_flat(model: ir.Model) -> None:
    """Keep what a branch computed as its last linear layer leaves it, [rows tokens, width].

    Before: `cache.<branch>` is [rows, tokens, width]: a Reshape of what a Gemm gave or, in joint attention, a Concat of
    two of these. After: it is what the Gemm gave, or the Concat laid flat, and a Reshape is part of its use. A Reshape
    costs nothing unless its result leaves the graph: then ONNX Runtime copies it.
    """
    outputs = model.graph.outputs
    for index, value in enumerate([*outputs]):
        node, name = value.producer(), str(value.name)
        if not name.startswith("cache.") or node is None or node.op_type not in ("Reshape", "Concat"):
            continue
        _, tokens, width = value.shape or (None, None, None)
        if not isinstance(tokens, int) or not isinstance(width, int):
            raise AssertionError(f"{name} has no shape")
        value.name = f"{name}.shaped"
        if node.op_type == "Concat":
            node = _lay_flat(model.graph, node, tokens, width)
        flat = node.inputs[0]
        if flat is None:
            raise AssertionError(f"{name} is reshaped from nothing")
        flat.name, flat.type = name, value.type
        flat.shape = ir.Shape([f"rows x {tokens}", width])  # dimensions of one name have to be equal
        outputs[index] = flat


def _lay_flat(graph: ir.Graph, node: ir.Node, tokens: int, width: int) -> ir.Node:
    """Reshape what `node` gives to [rows tokens, width], and back for all its uses; returns the second Reshape."""
    value = node.outputs[0]
    flat = ir.Node("", "Reshape", [value, _sizes(graph, f"{value.name}.flat", [-1, width])])
    back = ir.Node("", "Reshape", [flat.outputs[0], _sizes(graph, f"{value.name}.back", [-1, tokens, width])])
    back.outputs[0].name = f"{value.name}.again"
    ir.convenience.replace_all_uses_with(value, back.outputs[0], replace_graph_outputs=True)
    flat.replace_input_with(0, value)
    graph.insert_after(node, [flat, back])
    return back


def _sizes(graph: ir.Graph, name: str, sizes: list[int]) -> ir.Value:
    """An initializer that says a shape."""
    graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(sizes, ir.DataType.INT64, name=name))
    return graph.initializers[name]


def name_weights_by_content(model: ir.Model) -> None:
    """Make equal initializers one, and let their name say what they hold.

    Before: every initializer has a value. After: each is called `w.<key>`, see `content_key`, and no two are equal.
    """
    initializers = model.graph.initializers
    for old in [*initializers.values()]:
        del initializers[str(old.name)]
        if old.const_value is None:
            raise AssertionError(f"the exporter left initializer {old.name} without a value")
        name = f"w.{content_key(old.const_value)}"
        if name in initializers:
            ir.convenience.replace_all_uses_with(old, initializers[name])
        else:
            old.name = old.const_value.name = name
            initializers[name] = old


def content_key(tensor: ir.TensorProtocol) -> str:
    """The first 32 hex digits of the SHA-256 over dtype, shape and bytes."""
    head = f"{tensor.dtype.name} {list(tensor.shape.numpy())} ".encode()
    return hashlib.sha256(head + tensor.tobytes()).hexdigest()[:32]


def expose(model: ir.Model, pattern: Pattern) -> None:
    """Before: outputs `model_output` and `cache.<branch>` for all. After: `model_output` and `cache_out.<slot>`."""
    graph = model.graph
    outputs = {value.name: value for value in graph.outputs}
    graph.outputs.clear()  # a value that is still an output cannot have its uses replaced
    graph.outputs.append(outputs["model_output"])
    for name in pattern.writes:
        value = outputs[f"cache.{name}"]
        if name in pattern.corrects:
            value = _corrected(graph, value, value, name, pattern)
        value.name = f"cache_out.{name}"
        graph.outputs.append(value)


def reuse(model: ir.Model, pattern: Pattern) -> None:
    """Before: values `cache.<branch>` of what is read, none an output. After: inputs `cache_in.<slot>` instead."""
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    for name in pattern.reads:
        branch = values[f"cache.{name}"]
        slot = ir.Value(name=f"cache_in.{name}", shape=branch.shape, type=branch.type)
        graph.inputs.append(slot)
        value = _corrected(graph, branch, slot, name, pattern) if name in pattern.corrects else slot
        ir.convenience.replace_all_uses_with(branch, value)


def _corrected(graph: ir.Graph, branch: ir.Value, c: ir.Value, name: str, pattern: Pattern) -> ir.Value:
    """`c` corrected, behind what computes `branch`."""
    value, nodes = correct(graph, c, name, pattern.corrects)
    if (last := branch.producer()) is None:
        raise AssertionError(f"nothing computes {branch.name}")
    graph.insert_after(last, nodes)
    return value


def remove_unused(model: ir.Model) -> None:
    """Before: anything. After: every node, initializer and input leads to an output."""
    RemoveUnusedNodesPass()(model)
    used = [value for value in model.graph.inputs if value.uses() or value.is_graph_output()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(used)


def move_weights_out(model: ir.Model, regions: Mapping[str, Region], file: str) -> None:
    """Before: initializers hold their bytes. After: those named in `regions` point into `file` beside the graph."""
    for name, value in model.graph.initializers.items():
        if region := regions.get(name):
            tensor = value.const_value
            if tensor is None:
                raise AssertionError(f"initializer {name} has no value")
            value.const_value = ir.ExternalTensor(
                file, region.offset, region.length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )


def make_weights_inputs(model: ir.Model, regions: Mapping[str, Region]) -> None:
    """Before: initializers hold their bytes. After: those named in `regions` are inputs, for whoever runs to bind.

    What TensorRT wants to be constant stays: scales and zero points, and INT4, of which ONNX Runtime's Python has no
    values either.
    """
    graph = model.graph
    for name in [name for name in graph.initializers if name in regions]:
        value = graph.initializers[name]
        if any(use.node.op_type == "DequantizeLinear" and use.idx > 0 for use in value.uses()):
            continue
        tensor = value.const_value
        if tensor is None:
            raise AssertionError(f"initializer {name} has no value")
        if tensor.dtype == ir.DataType.INT4:
            continue
        del graph.initializers[name]
        value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        value.const_value = None
        graph.inputs.append(value)
