"""A linear layer in few bits, as standard ONNX that engines recognise and compute in few bits.

    x ─▶ QuantizeLinear ─▶ DequantizeLinear ─▶ Gemm ─▶ Add        to integers and back, at the step size of the call
                                                ▲       ▲
             integers [out, in] ─▶ DequantizeLinear    bias       a scale for each output, or for each block of inputs

Nothing stands between DequantizeLinear and Gemm, all zero points are 0 and typed, scales have the type of the
activations. The integers lie as PyTorch has them, [out, in]: rows of them are a part of the weight file's bytes, so
`narrow` works on them too, and Gemm takes them transposed for nothing.

What ONNX Runtime 1.30 makes of it on a CPU (512 x 768 x 3072, one thread, AVX-512 VNNI): with int8 on both sides
QuantizeLinear, QGemm and Add, 3.2 ms where float32 takes 10.5. That is why the bias is not the Gemm's: with one in
float nothing is fused, 11.9 ms. MatMul and a transposed weight would become MatMulIntegerToFloat, equally fast, but
only where MatMulAddFusion does not come first. In all other formats the product is one of floats anyway and the Gemm
has a bias, of zeros if need be: ONNX Runtime would make a QGemm of FP8 too, and then refuse its own graph.

The instruction multiplies unsigned by signed. So ONNX Runtime shifts int8 activations to uint8, but only those between
a QuantizeLinear and a DequantizeLinear that nobody else uses and whose zero point lies in the same graph; any other
product takes 16 times as long. Hence `unshare`: query, key and value are given a pair each of what quantizes their
input, and each pair its own zero point, which also goes with it into the body of an If. DiT-B/2, 131 M parameters, two
threads: 85 ms a call, 325 where pairs are shared, 223 in float32.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnxscript import opset20 as op
from onnxscript import opset21
from torch import nn

from hcompress.errors import InputError
from hcompress.lowbit.linear import QuantLinear

ELEMENTS = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
LEAST_OPSET = {"int8": 20, "fp8": 20, "int4": 21}
"""For each grid. ONNX has typed scales from 19 and INT4 and blocks from 21; from 21 on ONNX Runtime loses fusions."""


def quantized_linear(
    x: Any,
    integers: Any,
    weight_scale: Any,
    step: Any = None,
    bias: Any = None,
    weight: str = "int8",
    activation: str | None = None,
) -> Any:
    """How `hcompress::quantized_linear` is translated; what it leaves between weights and Gemm, `settle` takes away."""
    _, *inner, _ = x.shape
    width_out, width_in = integers.shape
    rows = op.Reshape(x, op.Constant(value_ints=[-1, width_in])) if inner else x
    if activation is not None:
        zero, scale = op.Constant(value=_zero(activation)), op.Squeeze(step)
        newest = opset21 if activation == "int4" else op
        rows = newest.DequantizeLinear(newest.QuantizeLinear(rows, scale, zero), scale, zero)
    scale = op.Cast(weight_scale, to=x.dtype)
    if weight == "int4":
        integers = opset21.Cast(integers, to=ir.DataType.INT4)
    if (blocks := weight_scale.shape[1]) == 1:
        scale = op.Reshape(scale, op.Constant(value_ints=[width_out]))
        zeros = [op.Constant(value=_zero(weight, width_out))] if weight == "int8" else []  # QGemm insists
        newest = opset21 if weight == "int4" else op
        weights = newest.DequantizeLinear(integers, scale, *zeros, axis=0)
    else:
        weights = opset21.DequantizeLinear(integers, scale, axis=1, block_size=width_in // blocks)
    if activation == weight == "int8":
        product = op.Gemm(rows, weights, transB=1)
        product = product if bias is None else op.Add(product, bias)
    else:
        none = ir.Tensor(np.zeros(width_out, x.dtype.numpy()), dtype=x.dtype)
        product = op.Gemm(rows, weights, op.Constant(value=none) if bias is None else bias, transB=1)
    return op.Reshape(product, op.Constant(value_ints=[-1, *inner, width_out])) if inner else product


def settle(model: ir.Model) -> None:
    """Store integers and their scales as they are used.

    Before: a DequantizeLinear may be given an initializer by way of Cast and Reshape. After: it is given one as it is.
    """
    graph = model.graph
    for node in [*graph]:
        whole = node.inputs[0].const_value if node.op_type in ("Cast", "Reshape") and node.inputs[0] else None
        uses = [use.node.op_type for use in node.outputs[0].uses()]
        if whole is None or not {*uses} <= {"Cast", "Reshape", "DequantizeLinear"}:
            continue
        name = f"{node.inputs[0].name}.{node.op_type}"
        array = whole.numpy()
        if node.op_type == "Cast":
            dtype = ir.DataType(node.attributes.get_int("to"))
            array = array.astype(dtype.numpy())
        else:
            dtype = whole.dtype
            array = array.reshape(node.inputs[1].const_value.numpy())
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
        graph.initializers[name] = value
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)


def unshare(model: ir.Model) -> None:
    """Let every product of integers quantize its input itself.

    Before: Gemms of one input share the int8 QuantizeLinear and DequantizeLinear before it. After: each that has an
    int8 weight has its own, with a Constant for a zero point: ONNX Runtime takes no two of these for equal.
    """
    graph = model.graph
    for gemm in [node for node in graph if node.op_type == "Gemm"]:
        restore, weight = (_int8_source(value) for value in gemm.inputs[:2])
        quantize = restore and restore.inputs[0] and restore.inputs[0].producer()
        if not restore or not weight or not quantize:
            continue
        zero = ir.Node("", "Constant", [], {"value": ir.AttrTensor("value", _zero("int8"))})
        own = ir.Node("", "QuantizeLinear", [*quantize.inputs[:2], zero.outputs[0]])
        back = ir.Node("", "DequantizeLinear", [own.outputs[0], restore.inputs[1], zero.outputs[0]])
        for node, kind in ((zero, "zero"), (own, "integers"), (back, "restored")):
            node.outputs[0].name = f"{gemm.outputs[0].name}.{kind}"
        graph.insert_before(gemm, [zero, own, back])
        gemm.replace_input_with(0, back.outputs[0])
        for shared in (restore, quantize):
            if not shared.outputs[0].uses():
                graph.remove(shared, safe=True)


def layers_of(network: nn.Module) -> list[dict[str, Any]]:
    """What is in few bits, for the manifest: weight, activation, block, and how many layers are so; [] if none is."""
    formats = Counter(module.format for module in network.modules() if isinstance(module, QuantLinear))
    return [
        {"weight": one.weight, "activation": one.activation, "block": one.block, "layers": count}
        for one, count in sorted(formats.items(), key=str)
    ]


def opset_of(network: nn.Module, default: int, asked: int | None) -> int:
    """The opset to export in: `default` or newer, unless `asked`. Raises InputError where that is too old for it."""
    grids = {grid for one in layers_of(network) for grid in (one["weight"], one["activation"]) if grid}
    if any(one["block"] for one in layers_of(network)):
        grids.add("int4")  # for the sake of its blocks
    least = {LEAST_OPSET[grid]: grid for grid in grids}
    needed = max(least, default=0)
    if asked is not None and asked < needed:
        raise InputError(f"ONNX opset {asked} has no {least[needed]} weights; use {needed}, or leave it out")
    return asked or max(default, needed)


def _int8_source(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes `value` of int8, which its zero point says; None if none does."""
    restore = value.producer() if value is not None else None
    if restore is None or restore.op_type != "DequantizeLinear" or len(restore.inputs) < 3:
        return None
    zero = restore.inputs[2] and restore.inputs[2].const_value
    return restore if zero is not None and zero.dtype == ELEMENTS["int8"] else None


def _zero(grid: str, *shape: int) -> ir.TensorProtocol:
    kinds = {"int8": np.int8, "int4": ml_dtypes.int4, "fp8": ml_dtypes.float8_e4m3fn}
    return ir.Tensor(np.zeros(shape, kinds[grid]), dtype=ELEMENTS[grid])
