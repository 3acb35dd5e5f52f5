"""A bundle that also gives what its layers in few bits round, so that PyTorch can round the very same values.

An input that lies between two steps of its grid goes to either by the last bit of the arithmetic before it, and what it
moves moves others across their ties: after some layers two correct implementations of a network are as far apart as
rounding moves it at all (2 % of a branch on zoo:fashion-dit), which is no closer than with some wrong step sizes. So
the two are compared between the roundings. Graphs give the input x_k of each QuantizeLinear too; PyTorch first
compares its own with x_k, then goes on with x_k:

    bundle   x_1 ─▶ Q ─▶ ... ─▶ x_2 ─▶ Q ─▶ ... ─▶ model_output
              │                  │                      ║
    PyTorch  x_1 ─▶ Q ─▶ ... ═ x_2 ─▶ Q ─▶ ...   ═ model_output       ═ compared: arithmetic of floats, no tie

Both round the same bits at the same step size, or else the next comparison is off by steps of the grid.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from hcompress.lowbit.linear import QuantLinear
from hcompress_runtime.bundle import SCALES, UPDATE, WEIGHTS
from hcompress_runtime.engine import Value
from hcompress_runtime.files import write_atomically
from hcompress_runtime.ort import OnnxRuntime
from hcompress_runtime.runtime import Runtime

ROUNDED = "rounded."  # and the number of an input, as in the columns of step.activation_scales, "." and any number


def readers(network: nn.Module) -> dict[int, str]:
    """Each input that is rounded: its number, and the first layer that reads it; {} where none is."""
    found = dict[int, str]()
    for name, module in network.named_modules():
        if isinstance(module, QuantLinear) and module.column is not None:
            found.setdefault(module.column, name)
    return found


@contextmanager
def rounding(network: nn.Module, given: Mapping[int, NDArray[Any]], seen: dict[int, torch.Tensor]) -> Iterator[None]:
    """Layers of `network` in few bits round what is `given` in place of their own input, which is put into `seen`."""

    def exchange(module: QuantLinear, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        (x,), column = arguments, module.column
        if column is None or column not in given:  # what only reused branches would use is in no graph
            return None
        seen.setdefault(column, x)
        theirs = torch.from_numpy(given[column]).to(x)
        return (theirs.reshape(x.shape),) if theirs.numel() == x.numel() else None

    layers = [module for module in network.modules() if isinstance(module, QuantLinear)]
    hooks = [layer.register_forward_pre_hook(exchange) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def shown(runtime: Runtime) -> Iterator[Runtime]:
    """A runtime like `runtime`, on ONNX Runtime, whose graphs give what they round too. The bundle stays as it is.

    Only for float32: in a half, ONNX Runtime on a CPU rounds float32 values of which a graph can give only the halves.
    """
    bundle, engine = runtime.bundle, runtime.engines[UPDATE]
    if not isinstance(engine, OnnxRuntime):
        raise AssertionError("an engine of TensorRT gives what it was built to give")
    with tempfile.TemporaryDirectory(prefix="hcompress-rounded-") as name:
        folder = Path(name)
        (folder / WEIGHTS).parent.mkdir()
        for file in (WEIGHTS, UPDATE):
            _link(bundle.path / file, folder / file)
        for graph in {*bundle.graphs}:
            model = ir.load(bundle.path / graph)
            show(model)
            write_atomically(folder / graph, ir.to_proto(model).SerializeToString(deterministic=True))
        with Runtime(replace(bundle, path=folder), engine.provider, engine.threads) as other:
            yield other


def given_by(runtime: Runtime, results: Mapping[str, Value]) -> dict[int, NDArray[Any]]:
    """What a graph that `show` has changed rounded, by the number of the input: empty are those of a body not run."""
    found = dict[int, NDArray[Any]]()
    for name, value in results.items():
        if name.startswith(ROUNDED) and (array := runtime.to_numpy(value)).size:
            found.setdefault(int(name.split(".")[1]), array)
    return found


def show(model: ir.Model) -> None:
    """Before: a float32 graph of a bundle. After: it has an output more for each tensor that it rounds, see ROUNDED.

    The body of an If gives them to the graph around it; the other body gives tensors of no rows.
    """
    graph, count = model.graph, 0
    for node in [*graph]:
        if node.op_type != "If":
            continue
        body, other = (node.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
        inside = _rounded(body)
        if not inside:
            continue
        old = len(node.outputs)
        node.resize_outputs(old + len(inside))
        for (column, value), output in zip(inside, node.outputs[old:], strict=True):
            name, count = f"{ROUNDED}{column}.{count}", count + 1
            nothing = ir.Tensor(np.zeros((0, 0), np.float32))
            kept = ir.Node("", "Constant", [], {"value": ir.AttrTensor("value", nothing)})
            for place, last in ((body, ir.Node("", "Identity", [value])), (other, kept)):
                place.append(last)
                place.outputs.append(_named(last.outputs[0], f"{place.name}.{name}"))
            graph.outputs.append(_named(output, name))
    for column, value in _rounded(graph):
        last = ir.Node("", "Identity", [value])
        graph.append(last)
        graph.outputs.append(_named(last.outputs[0], f"{ROUNDED}{column}.{count}"))
        count += 1


def _rounded(graph: ir.Graph) -> list[tuple[int, ir.Value]]:
    """(number, value) of what `graph` itself rounds, each once; those of bodies in it are theirs."""
    found = dict[tuple[int, str], ir.Value]()
    for node in graph:
        if node.op_type == "QuantizeLinear":
            value, scale = node.inputs[:2]
            if value is None or scale is None:
                raise AssertionError(f"{node.name} rounds nothing")
            found.setdefault((_column(scale), str(value.name)), value)
    return [(column, value) for (column, _), value in found.items()]


def _column(scale: ir.Value) -> int:
    """Which column of the step sizes `scale` is: a part of their Split, unless there is but one."""
    value: ir.Value | None = scale
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Split":
            return int(value.index() or 0)
        value = node.inputs[0]
    if value is None or value.name != f"step.{SCALES}":
        raise AssertionError(f"{scale.name} is no step size")
    return 0


def _named(value: ir.Value, name: str) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
    return value


def _link(file: Path, to: Path) -> None:
    """`file` under another name; a copy where it lies on another disk."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)
