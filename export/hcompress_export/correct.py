"""Corrections in the graphs, and the vectors that they are given at each call.

    v = c + a c + d (c - p) + b = gain c + before p + offset        gain = 1 + a + d, before = -d, offset = b

Three vectors of the branch's width, one row of `step.correction.<branch>` [1, 3 D], so that calls with equal patterns
share a graph. Two products and two sums instead of three and four; what c - p would save by being small, float32 has to
spare: the arithmetic is float32 whatever slots are in, which a compiler that fuses it gets for nothing.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from hcompress.corrections import Corrections
from hcompress_runtime.bundle import CORRECTION
from hcompress_runtime.plan import Plan, before


def correct(graph: ir.Graph, c: ir.Value, branch: str, *, p: bool) -> tuple[ir.Value, list[ir.Node]]:
    """The corrected value of `branch`, like `c` [rows tokens, D], and the nodes that make it, in order.

    They are in no graph yet. `graph` is given the vectors as an input and, if `p` counts, the slot that holds it.
    """
    if c.shape is None or not isinstance(width := c.shape[-1], int):
        raise AssertionError(f"{c.name} has no width")
    vectors = ir.Value(
        name=f"step.{CORRECTION}{branch}", shape=ir.Shape([1, 3 * width]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.inputs.append(vectors)
    tape, kind = Tape(), c.dtype or ir.DataType.FLOAT

    def cast(value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return value if kind == ir.DataType.FLOAT else tape.op("Cast", [value], {"to": dtype.value})

    gain, share, offset = tape.op_multi_out("Split", [vectors], {"axis": 1, "num_outputs": 3}, num_outputs=3)
    v = tape.op("Mul", [cast(c, ir.DataType.FLOAT), gain])
    if p:
        older = ir.Value(name=f"cache_in.{before(branch)}", shape=c.shape, type=c.type)
        graph.inputs.append(older)
        v = tape.op("Add", [v, tape.op("Mul", [cast(older, ir.DataType.FLOAT), share])])
    v = cast(tape.op("Add", [v, offset]), kind)
    for index, value in enumerate(value for node in tape.nodes for value in node.outputs):
        value.name = f"corrected.{branch}.{index}"  # unique also in the body of an If
    v.shape, v.type = c.shape, c.type
    return v, [*tape.nodes]


def vectors_of(plan: Plan, corrections: Corrections) -> dict[str, NDArray[np.float32]]:
    """`correction.<branch>`, float32[T, 3 D], of each branch that some call corrects: gain, before and offset.

    A call that computes the branch has what the next one, which is finished there, would have had. Where nothing is
    corrected the row is 1, 0, 0.
    """
    ever = {name for step in plan.steps for name in step.corrects}
    found = {}
    for n, branch in enumerate(plan.branches):
        if branch in ever:
            rows = np.concatenate(
                [1 + corrections.a[n] + corrections.d[n], -corrections.d[n], corrections.b[n]], axis=1, dtype=np.float32
            )
            ahead = [call for call, step in enumerate(plan.steps) if branch in {*step.computes} & {*step.corrects}]
            rows[ahead] = rows[[call + 1 for call in ahead]]
            found[f"{CORRECTION}{branch}"] = rows
    return found
