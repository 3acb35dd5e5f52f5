"""Corrections in the graphs, and the vectors that they are given at each call.

    v = c + a c + d (c - p) + e (p - q) + b = gain c + before p + share q + offset
        gain = 1 + a + d, before = e - d, share = -e, offset = b

Vectors of the branch's width, so that calls with equal patterns share a graph: three are one row of
`step.correction.<branch>` [1, 3 D], and the share of q, only where it counts, is `step.correction.<slot of q>` [1, D].
Two products and two sums instead of three and four, of order 2 three instead of four and six; what c - p would save by
being small, float32 has to spare: the arithmetic is float32 whatever slots are in, which a compiler that fuses it gets
for nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from hcompress.corrections import Corrections
from hcompress_runtime.bundle import CORRECTION
from hcompress_runtime.plan import Plan, before


def correct(graph: ir.Graph, c: ir.Value, branch: str, corrects: Collection[str]) -> tuple[ir.Value, list[ir.Node]]:
    """The corrected value of `branch`, like `c` [rows tokens, D], and the nodes that make it, in order.

    They are in no graph yet. `graph` is given as inputs the vectors and, where `corrects` names them, p and q.
    """
    if c.shape is None or not isinstance(width := c.shape[-1], int):
        raise AssertionError(f"{c.name} has no width")
    tape, kind = Tape(), c.dtype or ir.DataType.FLOAT

    def given(name: str, size: int) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape([1, size]), type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(value)
        return value

    def cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if kind == ir.DataType.FLOAT else tape.op("Cast", [value], {"to": dtype.value})

    vectors = given(f"step.{CORRECTION}{branch}", 3 * width)
    gain, of_p, offset = tape.op_multi_out("Split", [vectors], {"axis": 1, "num_outputs": 3}, num_outputs=3)
    v = tape.op("Mul", [cast(c, ir.DataType.FLOAT), gain])
    p, q = before(branch), before(before(branch))
    older = [(p, of_p)] if p in corrects else []
    if q in corrects:
        older.append((q, given(f"step.{CORRECTION}{q}", width)))
    for name, share in older:
        slot = ir.Value(name=f"cache_in.{name}", shape=c.shape, type=c.type)
        graph.inputs.append(slot)
        v = tape.op("Add", [v, tape.op("Mul", [cast(slot, ir.DataType.FLOAT), share])])
    v = cast(tape.op("Add", [v, offset]), kind)
    for index, value in enumerate(value for node in tape.nodes for value in node.outputs):
        value.name = f"corrected.{branch}.{index}"  # unique also in the body of an If
    v.shape, v.type = c.shape, c.type
    return v, [*tape.nodes]


def vectors_of(plan: Plan, corrections: Corrections) -> dict[str, NDArray[np.float32]]:
    """What is given for each branch that some call corrects, a row for each of T calls.

    `correction.<branch>`, float32[T, 3 D]: gain, before and offset; `correction.<slot of q>`, float32[T, D], where q
    counts anywhere: its share. A call that computes the branch has what the next one, which is finished there, would
    have had. Where nothing is corrected a row is 1, 0, 0 and 0.
    """
    ever = {name for step in plan.steps for name in step.corrects}
    found = {}
    for branch, a, d, b, e in zip(plan.branches, *corrections.terms, strict=True):
        ahead = [call for call, step in enumerate(plan.steps) if branch in {*step.computes} & {*step.corrects}]
        for name, vectors in ((branch, [1 + a + d, -(d - e), b]), (before(before(branch)), [-e])):
            if name in ever:
                rows = np.concatenate(vectors, axis=1, dtype=np.float32)
                rows[ahead] = rows[[call + 1 for call in ahead]]
                found[f"{CORRECTION}{name}"] = rows
    return found
