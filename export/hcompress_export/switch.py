"""One graph for all steps: an `If` round every branch that some step reuses, with the step's row of the mask as input.

    compute[i]  ──▶ If ── then: the nodes that only branch i needs, weights taken from the graph around it
                      └── else: cache_in.<branch>, corrected if some step does

One session then serves all steps, so weights are held once and may be packed for the kernels, however many patterns a
schedule has. What is given up: inside one graph no slot can be left out, so every branch that is ever reused has an
input and an output at each step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from hcompress_export.correct import correct
from hcompress_export.passes import remove_unused
from hcompress_export.qdq import unshare
from hcompress_runtime.plan import Plan

COMPUTE = "compute"


def switch_graph(traced: ir.Model, plan: Plan) -> ir.Model:
    """The graph of every step of `plan`, which finishes nothing: what is ever reused is computed where `compute` says.

    traced: see trace.py; is copied. In: `compute`, bool[N], and `cache_in.<slot>` for all slots of `plan`; out:
    `cache_out.<branch>` for those that are ever reused.
    """
    branches, corrects = plan.branches, {name for step in plan.steps for name in step.corrects}
    model = traced.clone()
    unshare(model)
    graph = model.graph
    mask = ir.Value(name=COMPUTE, shape=ir.Shape([len(branches)]), type=ir.TensorType(ir.DataType.BOOL))
    outputs = {str(value.name): value for value in graph.outputs}
    graph.outputs.clear()  # a value that is still an output cannot have its uses replaced
    graph.outputs.append(outputs["model_output"])
    graph.inputs.append(mask)
    for index, name in enumerate(branches):
        if name in plan.slots:
            # At once an output, so that no later branch takes it in: in joint attention one may be all that reads it.
            graph.outputs.append(_switch(graph, outputs[f"cache.{name}"], mask, index, name, corrects))
    remove_unused(model)
    return model


def _switch(
    graph: ir.Graph, branch: ir.Value, mask: ir.Value, index: int, name: str, corrects: Collection[str]
) -> ir.Value:
    """Put an If round what computes `branch`; its output takes the branch's place."""
    last = branch.producer()
    if last is None:
        raise AssertionError(f"nothing computes {branch.name}")
    slot = ir.Value(name=f"cache_in.{name}", shape=branch.shape, type=branch.type)
    graph.inputs.append(slot)
    at = ir.Value(name=f"branch.{index}", const_value=ir.tensor(index, ir.DataType.INT64, name=f"branch.{index}"))
    graph.initializers[f"branch.{index}"] = at
    condition = ir.Node("", "Gather", [mask, at])
    condition.outputs[0].name = f"compute.{name}"
    if name in corrects:
        _, kept = correct(graph, slot, name, corrects)
    else:
        kept = [ir.Node("", "Identity", [slot])]
    chosen = ir.Node("", "If", [condition.outputs[0]])
    graph.insert_after(last, [condition, chosen])
    result = chosen.outputs[0]
    ir.convenience.replace_all_uses_with(branch, result)
    inside = exclusive(graph, last)
    graph.remove(inside)
    for value, what in ((kept[-1].outputs[0], "kept"), (branch, "computed"), (result, "cache_out")):
        value.name, value.shape, value.type = f"{what}.{name}", branch.shape, branch.type
    chosen.attributes["then_branch"] = ir.AttrGraph("then_branch", _body("then", [*inside], branch))
    chosen.attributes["else_branch"] = ir.AttrGraph("else_branch", _body("else", kept, kept[-1].outputs[0]))
    return result


def exclusive(graph: ir.Graph, last: ir.Node) -> list[ir.Node]:
    """`last` and the nodes before it of which nobody else uses anything, in order."""
    found = {last}
    for node in reversed([*graph]):
        uses = [use.node for value in node.outputs for use in value.uses()]
        if uses and found.issuperset(uses) and not any(value.is_graph_output() for value in node.outputs):
            found.add(node)
    return [node for node in graph if node in found]


def _body(kind: str, nodes: Sequence[ir.Node], output: ir.Value) -> ir.Graph:
    return ir.Graph([], [output], nodes=nodes, name=f"{kind} {output.name}")
