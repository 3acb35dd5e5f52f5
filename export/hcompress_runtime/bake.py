"""Inputs of a graph as constants of it: TensorRT takes no step size that is only known at run time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def bake(graph: Path, constants: Mapping[str, NDArray[Any]]) -> bytes:
    """The ONNX file `graph` with `constants` in place of inputs of these names, and what follows from them computed.

    So a step size that was split off an input is an initializer, right where it is used. Weights in other files stay
    there: paths to them are relative to `graph`.
    """
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(graph, load_external_data=False)
    given = [value for value in model.graph.input if value.name in constants]
    found = {value.name: constants[value.name] for value in given}
    small = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data}
    kept = []
    for node in model.graph.node:
        names = [name for name in node.input if name]
        if found.keys().isdisjoint(names) or not {*names} <= found.keys() | small.keys():
            kept.append(node)
            continue
        feeds = {name: found[name] if name in found else numpy_helper.to_array(small[name]) for name in names}
        found |= dict(zip(node.output, ReferenceEvaluator(node).run(None, feeds), strict=True))
    used = {name for node in kept for name in node.input}
    for value in given:
        model.graph.input.remove(value)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(found[name], name) for name in sorted(found.keys() & used))
    return bytes(model.SerializeToString(deterministic=True))
