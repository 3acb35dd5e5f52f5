"""Leave out the part of a linear layer that only absent branches used.

A block's adaLN layer gives shift, scale and gate of all its branches in one product. A reused branch needs its gate and
nothing else, so two thirds of its share are rows of the weight that a step graph need not read. For DiT-XL/2, where
adaLN holds a third of all weights, a step that reuses everything reads 74 M parameters of it instead of 223 M.

What is left of a weight keeps its place in the weight file: rows of it are a part of its bytes. That holds for integers
and their scales too, whose DequantizeLinear becomes one of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import onnx_ir as ir


def narrow(model: ir.Model) -> None:
    """Make linear layers compute only what is used of them.

    Before: Gemm, perhaps Add of a bias, perhaps Unsqueeze, then Split into equal parts of the last axis, some unused.
    After: one such chain for each run of neighbouring parts in use; its initializers are named by `rows_name`.
    """
    for split in [node for node in model.graph if node.op_type == "Split"]:
        used = [bool(part.uses()) for part in split.outputs]
        chain = _chain(split)
        if all(used) or not chain:
            continue
        for begin, end in _runs(used):
            _insert(model.graph, chain, split, begin, end)
        model.graph.remove([split, *reversed(chain)], safe=True)


def rows_name(name: str, begin: int, end: int) -> str:
    """What rows `begin` to `end` of the tensor called `name` are called."""
    return f"{name}[{begin}:{end}]"


def parse_rows(name: str) -> tuple[str, int, int] | None:
    """The name of the whole and the two bounds; None for the name of a whole."""
    whole, bracket, bounds = name.partition("[")
    if not bracket:
        return None
    begin, end = bounds.removesuffix("]").split(":")
    return whole, int(begin), int(end)


def _chain(split: ir.Node) -> list[ir.Node] | None:
    """[Gemm, Add?, Unsqueeze?] that feed `split` alone, where its parts are equal runs of the weight's rows."""
    if "num_outputs" not in split.attributes:
        return None
    chain: list[ir.Node] = []
    node = _only_producer(split)
    for optional in ("Unsqueeze", "Add"):
        if node is not None and node.op_type == optional:
            chain, node = [node, *chain], _only_producer(node)
    if node is None or node.op_type != "Gemm" or not node.attributes.get_int("transB", 0):
        return None
    last_axis = 1 + sum(other.op_type == "Unsqueeze" for other in chain)
    if split.attributes.get_int("axis", 0) not in (-1, last_axis):
        return None
    biases = [other.inputs[1] for other in chain if other.op_type == "Add"]
    weights = [tensor for value in (*node.inputs[1:], *biases) if value for tensor in _stored(value)]
    even = all(tensor is not None and tensor.shape.numpy()[0] % len(split.outputs) == 0 for tensor in weights)
    return [node, *chain] if even else None


def _stored(value: ir.Value) -> list[ir.TensorProtocol | None]:
    """The initializer that `value` is, or those that it is dequantized from; None among them for what is neither."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return [value.const_value]
    return [part.const_value for part in node.inputs if part]


def _only_producer(node: ir.Node) -> ir.Node | None:
    """What computes the first input of `node`, if that has no other use."""
    value = node.inputs[0]
    alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return value.producer() if value is not None and alone else None


def _runs(used: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each run of neighbours that are used."""
    for is_used, run in groupby(range(len(used)), key=used.__getitem__):
        members = [*run]
        if is_used:
            yield members[0], members[-1] + 1


def _insert(graph: ir.Graph, chain: list[ir.Node], split: ir.Node, begin: int, end: int) -> None:
    """Compute parts `begin` to `end` of `split` before it and hand them to whom they are for."""
    gemm, *between = chain

    def rows(value: ir.Value) -> ir.Value:
        node = value.producer()
        if node is None:
            return _rows(graph, value, begin, end, len(split.outputs))
        parts = [rows(part) for part in node.inputs if part]
        return _node(graph, split, node.op_type, parts, node, begin)

    weights = [rows(value) for value in gemm.inputs[1:] if value]
    value = _node(graph, split, "Gemm", [gemm.inputs[0], *weights], gemm, begin)
    for node in between:
        others = [rows(other) if node.op_type == "Add" and other else other for other in node.inputs[1:]]
        value = _node(graph, split, node.op_type, [value, *others], node, begin)
    old = split.outputs[begin:end]
    if len(old) == 1:
        new: Sequence[ir.Value] = [value]
    else:
        axis = ir.AttrInt64("axis", split.attributes.get_int("axis", 0))
        node = ir.Node("", "Split", [value], [axis, ir.AttrInt64("num_outputs", len(old))], num_outputs=len(old))
        for part, name in zip(node.outputs, old, strict=True):
            part.name = f"{name.name}.narrow"
        graph.insert_before(split, node)
        new = node.outputs
    for before, after in zip(old, new, strict=True):
        ir.convenience.replace_all_uses_with(before, after)


def _node(
    graph: ir.Graph, at: ir.Node, kind: str, inputs: Sequence[ir.Value | None], like: ir.Node, begin: int
) -> ir.Value:
    """A node with the attributes of `like`, before `at`."""
    node = ir.Node("", kind, inputs, [*like.attributes.values()])
    node.outputs[0].name = f"{like.outputs[0].name}.{begin}"
    graph.insert_before(at, node)
    return node.outputs[0]


def _rows(graph: ir.Graph, value: ir.Value, begin: int, end: int, parts: int) -> ir.Value:
    """The initializer that holds parts `begin` to `end` of `value`, cut into `parts` along its first axis."""
    whole = value.const_value
    if whole is None:
        raise AssertionError(f"{value.name} is no initializer")
    each = whole.numpy().shape[0] // parts
    name = rows_name(str(value.name), begin * each, end * each)
    if name not in graph.initializers:
        tensor = ir.Tensor(whole.numpy()[begin * each : end * each], dtype=whole.dtype, name=name)
        graph.initializers[name] = ir.Value(name=name, shape=tensor.shape, type=value.type, const_value=tensor)
    return graph.initializers[name]
