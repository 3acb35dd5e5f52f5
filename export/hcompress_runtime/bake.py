"""What TensorRT wants otherwise than ONNX Runtime in a graph of few bits.

- It takes no step size that is only known at run time: `bake` makes inputs constants.
- Its advice is one pair of QuantizeLinear and DequantizeLinear for all that read a tensor, where ONNX Runtime's fast
  integer kernels ask for a pair each (export/FORMAT.md, Few bits): `bake` makes equal pairs one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray


def bake(graph: Path, constants: Mapping[str, NDArray[Any]]) -> bytes:
    """The ONNX file `graph` with `constants` in place of inputs of these names, and what follows from them computed.

    So a step size that was split off an input is an initializer, right where it is used. Nodes that quantize the same
    alike are one. Weights in other files stay there: paths to them are relative to `graph`.
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
    kept = _merged(kept)
    used = {name for node in kept for name in node.input}
    for value in given:
        model.graph.input.remove(value)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(found[name], name) for name in sorted(found.keys() & used))
    return bytes(model.SerializeToString(deterministic=True))


def _merged(nodes: list[Any]) -> list[Any]:
    """`nodes`, in order, without what quantizes or restores again just as one before does; changes their inputs."""
    kept, first, same = [], dict[tuple[Any, ...], str](), dict[str, str]()
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type in ("Constant", "QuantizeLinear", "DequantizeLinear"):
            attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
            (output,) = node.output
            original = first.setdefault((node.op_type, *node.input, *attributes), output)
            if original != output:
                same[output] = original
                continue
        kept.append(node)
    return kept
