"""The two operators that torch's exporter translates poorly for our purpose, and how they are translated instead.

- A linear layer on [rows, tokens, width] becomes MatMul + Add with a transposed copy of the weight. As Gemm on
  [rows tokens, width] the bias is free and the weight keeps PyTorch's layout, byte for byte. 8 % of a whole step of
  zoo:fashion-dit on ONNX Runtime 1.30, CPU.
- Attention gets a dozen nodes that take shapes apart to transpose the keys. Here it is four, none of them about shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset20 as op


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
    """softmax(query key^T scale) value, [rows, heads, tokens, width] each."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("attention with a mask, dropout, causality or grouped queries")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), op.Constant(value_float=factor))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}
