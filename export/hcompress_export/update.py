"""The solver's update as a graph: `update.onnx`, what follows each model call on the device that the call ran on.

`ahead` holds what the calls to come will be given, the next one first and the finished sample last, as far as it is
known. A model output adds its share to each of them; the first is then complete, and the rest moves up:

    sum        = ahead + share[None, :, None, None, None] * model_output[:, None]
    latent     = sum[:, 0]
    ahead_next = sum[:, 1:] and, in the last place, anything: later shares are 0 there

So one small graph of fixed shapes runs any solver, and no step needs the host. Where `share` comes from, and what
`ahead` is at first, is in hcompress_runtime.table.
"""

from __future__ import annotations

from pathlib import Path

import onnx.parser

from hcompress_runtime.bundle import UPDATE
from hcompress_runtime.files import write_atomically


def write_update(folder: Path, sample_shape: tuple[int, ...], calls: int, *, opset: int) -> None:
    """Write the update of `calls` model calls, T, on samples of (C, H, W) under the bundle in `folder`; all float32."""
    sample = ", ".join(map(str, sample_shape))
    moved = ", ".join(map(str, [*range(1, calls), 0]))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": {opset}]>
        update (float[batch, {calls}, {sample}] ahead, float[{calls}] share, float[batch, {sample}] model_output)
            => (float[batch, {sample}] latent, float[batch, {calls}, {sample}] ahead_next)
        <int64[1] time = {{1}}, int64[4] rest = {{0, 2, 3, 4}}, int64 first = {{0}}, int64[{calls}] moved = {{{moved}}}>
        {{
            output = Unsqueeze(model_output, time)
            weight = Unsqueeze(share, rest)
            added = Mul(output, weight)
            sum = Add(ahead, added)
            latent = Gather <axis = 1> (sum, first)
            ahead_next = Gather <axis = 1> (sum, moved)
        }}
    """)
    write_atomically(folder / UPDATE, model.SerializeToString(deterministic=True))
