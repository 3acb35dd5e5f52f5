"""What a diffusion model can do without: first-order Taylor importance over its steps.

Diff-Pruning (Fang et al., NeurIPS 2023, arXiv 2305.10924, section 4; ddpm_prune.py). For t = 0, 1, 2, ... on one batch
of images and one noise, L_t is the training loss and its gradients add up, until

    L_t < threshold max L_s                   from there on steps carry no detail, and their gradients mostly noise

A channel's importance is sum |w dw| over everything that would go with it: of an MLP's unit its row of the first layer
and its column of the second, of a head those of queries, keys, values and of the output. What goes with what is found
by torch-pruning's dependency graph, from a trace. Importances are compared within a block's MLP and within its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from hcompress.adapter import Adapter, Condition, compute_all
from hcompress.errors import missing
from hcompress.lowbit.adapter import twin
from hcompress.process import Process
from hcompress.prune.parts import parts_of
from hcompress.pruned import Kept, Widths, blocks_of

Importance = list[tuple[Tensor, Tensor]]
"""Of each block: float32[heads] and float32[units]."""


def importance(
    adapter: Adapter,
    process: Process,
    x0: Tensor,
    condition: Condition,
    noise: Tensor,
    threshold: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    micro_batch: int | None = None,
) -> Importance:
    """Importance of every head and unit, from images x0 [B, C, H, W] of `condition` and noise of their shape.

    process:     at every timestep of the training, ascending
    micro_batch: images at a time; fewer than B cost a third more, as a step's loss decides whether its gradients count

    Raises MissingExtra without torch-pruning.
    """
    try:
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        raise missing("torch-pruning", "prune") from error

    learner = twin(adapter)
    network = _own_parameters(learner)
    trace = _Call(learner, {name: rows[:1] for name, rows in condition.items()}, _at(learner, 0, x0))
    groups = tp.DependencyGraph().build_dependency(trace, example_inputs=x0[:1], verbose=False)
    highest, parts = 0.0, parts_of(len(x0), micro_batch)

    def losses(step: int) -> Iterator[Tensor]:
        for part in parts:
            of_part = {name: rows[part] for name, rows in condition.items()}
            noisy, target = process.noised(step, x0[part], noise[part]), process.target(step, x0[part], noise[part])
            output = learner(noisy, of_part, _at(learner, step, x0), compute_all)
            yield functional.mse_loss(output[:, : x0.shape[1]], target) * (len(noisy) / len(x0))

    for step in range(len(process.alpha)):
        with torch.set_grad_enabled(len(parts) == 1):
            first = list(losses(step))
        loss = sum(part.item() for part in first)
        highest = max(highest, loss)
        if loss < threshold * highest:
            break
        for part in first if len(parts) == 1 else losses(step):
            part.backward()
        on_step(step + 1, loss)
    score = tp.importance.TaylorImportance(group_reduction="sum", normalizer=None)

    def of(layer: nn.Linear) -> Tensor:
        every = list(range(layer.out_features))
        return score(groups.get_pruning_group(layer, tp.prune_linear_out_channels, every))

    found = []
    for block in blocks_of(network):
        attention: Any = block.attn1
        found.append((of(attention.to_q).reshape(attention.heads, -1).sum(dim=1), of(block.ff.net[0].proj)))  # type: ignore[union-attr, index]
    return found


def uniform(adapter: Adapter) -> Importance:
    """As if everything were of equal importance."""
    widths = Widths.of(adapter.network)
    return [(torch.ones(heads), torch.ones(units)) for heads, units in zip(widths.heads, widths.units, strict=True)]


def most_important(found: Importance, ratios: tuple[float, float], multiple: int) -> Kept:
    """What stays where these shares of each block's heads and units go: at least one head, units in multiples."""
    return [
        (_top(heads, round((1 - ratios[0]) * len(heads))), _top(units, _units(len(units), ratios[1], multiple)))
        for heads, units in found
    ]


def ratios_for(adapter: Adapter, speedup: float, multiple: int) -> tuple[float, float]:
    """The shares of heads and units at which the MACs of a call fall by `speedup`.

    Heads are few, so equal shares would miss it: of the pairs that come within a percent, or else nearest, the one
    whose shares differ least.
    """
    heads, units = (max(counts) for counts in asdict(Widths.of(adapter.network)).values())
    found = []
    for kept in range(1, heads + 1):
        misses = {
            share / 200: abs(
                _speedup(adapter, kept / heads, _units(units, share / 200, multiple) / units) / speedup - 1
            )
            for share in range(200)
        }
        share = min(misses, key=lambda one: misses[one])
        found.append((max(misses[share], 0.01), abs(1 - kept / heads - share), (1 - kept / heads, share)))
    return min(found)[2]


def _speedup(adapter: Adapter, heads: float, units: float) -> float:
    """MACs of a call over those with these shares of heads and units: both are linear in either."""
    graph, left = adapter.graph, {"attn": heads, "mlp": units}
    macs = sum(branch.macs * left.get(branch.name.rpartition(".")[2], 1) for branch in graph.branches)
    return graph.call_macs / (graph.other_macs + macs)


def _units(units: int, ratio: float, multiple: int) -> int:
    """How many stay: the nearest multiple, at least one of it, at most all."""
    return min(units, max(1, round((1 - ratio) * units / multiple)) * multiple)


def _top(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.topk(max(1, count)).indices.tolist())


def _own_parameters(learner: Adapter) -> nn.Module:
    """The network with parameters of its own that take gradients, over the same values."""
    for module in learner.network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach()))
    return learner.network


def _at(adapter: Adapter, step: int, x0: Tensor) -> dict[str, Tensor]:
    return adapter.step_constants(torch.tensor([float(step)], device=x0.device))


@final
class _Call(nn.Module):
    """One call of an adapter as a module of x alone, which is what is traced."""

    def __init__(self, adapter: Adapter, condition: Condition, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.adapter, self.condition, self.constants = adapter, condition, constants

    def forward(self, x: Tensor) -> Tensor:
        """[1, C_out, H, W]."""
        return self.adapter(x, self.condition, self.constants, compute_all)
