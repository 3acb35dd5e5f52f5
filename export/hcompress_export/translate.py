"""The operators that torch's exporter translates poorly for our purpose, and how they are translated instead.

- A linear layer on [rows, tokens, width] becomes MatMul + Add with a transposed copy of the weight. As Gemm on
  [rows tokens, width] the bias is free and the weight keeps PyTorch's layout, byte for byte. 8 % of a whole step of
  zoo:fashion-dit on ONNX Runtime 1.30, CPU.
- Attention gets a dozen nodes that take shapes apart to transpose the keys. Here it is five, none of them about shapes,
  and one more where there is a mask. Its softmax is float32 even between halves, as in PyTorch's kernels. (Layer norms
  already are: `stash_type` 1.)
- A convolution in bfloat16 is not ONNX before opset 22. Here it is one in float32 between casts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from hcompress_export.qdq import quantized_linear


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x [..., in] times weight [out, in], plus bias [out]."""
    _, *inner, _ = x.shape
    if not inner:
        return op.Gemm(x, weight, bias, transB=1)
    width_out, width_in = weight.shape
    rows = op.Reshape(x, op.Constant(value_ints=[-1, width_in]))
    return op.Reshape(op.Gemm(rows, weight, bias, transB=1), op.Constant(value_ints=[-1, *inner, width_out]))


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query key^T scale + attn_mask) value, [rows, heads, tokens, width] each; the mask is added, no bool."""
    if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL):
        raise NotImplementedError("attention with a mask of bools, dropout, causality or grouped queries")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Scaled before the product, which float16 may not hold otherwise; ONNX Runtime makes both orders one FusedMatMul.
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 3, 2]))
    if query.dtype == ir.DataType.FLOAT:
        scores = scores if attn_mask is None else op.Add(scores, attn_mask)
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    scores = op.Cast(scores, to=ir.DataType.FLOAT)
    if attn_mask is not None:
        scores = op.Add(scores, op.Cast(attn_mask, to=ir.DataType.FLOAT))
    return op.MatMul(op.Cast(op.Softmax(scores, axis=-1), to=query.dtype), value)


def convolution(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Any:
    """x [rows, in, H, W] under weight [out, in / groups, h, w], plus bias [out]."""
    geometry: dict[str, Any] = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    if x.dtype != ir.DataType.BFLOAT16:
        return op.Conv(x, weight, bias, **geometry)
    wide = [value if value is None else op.Cast(value, to=ir.DataType.FLOAT) for value in (x, weight, bias)]
    return op.Cast(op.Conv(*wide, **geometry), to=ir.DataType.BFLOAT16)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: linear,
    torch.ops.hcompress.quantized_linear.default: quantized_linear,
    torch.ops.aten.conv2d.default: convolution,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}
