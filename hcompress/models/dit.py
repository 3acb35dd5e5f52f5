"""DiT (Peebles and Xie 2023) as diffusers' `DiTTransformer2DModel`: class-conditional, adaLN-Zero.

Two branches a block, both cached before their gate: attention, then MLP. The forward below calls diffusers' own
modules and is bit-identical to `DiTTransformer2DModel.forward` when every branch is computed.

diffusers holds one copy of the time and label embedder in each block. Copies with equal weights are computed once;
what derives from the timestep alone enters as a step constant, the label part stays in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from hcompress.adapter import Adapter, Condition, Route
from hcompress.branches import Branch, BranchGraph
from hcompress.errors import ModelError
from hcompress.models.parts import linear_macs, num_params, unpatchify
from hcompress_runtime.conditions import Given, Input


@final
class DiT(Adapter):
    """Adapter of `DiTTransformer2DModel`. L tokens, D width, E distinct embedders (1 unless the copies differ)."""

    network: DiTTransformer2DModel
    num_classes: int
    embedders: list[Any]

    def __init__(self, network: DiTTransformer2DModel) -> None:
        super().__init__()
        config = network.config
        if config.norm_type != "ada_norm_zero":
            raise ModelError(f"DiT with norm_type={config.norm_type!r} has no adapter; only 'ada_norm_zero' has one")
        self.network = network.eval().requires_grad_(False)
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.guided_channels = config.in_channels
        self.num_classes = config.num_embeds_ada_norm
        self.conditions = {"labels": Input("int64", (), classes=self.num_classes)}
        self.embedders, self.embedder_of_block = _distinct([b.norm1.emb for b in network.transformer_blocks])
        self.graph = _branch_graph(network, self.embedders)

    def recount(self) -> None:
        """Set `graph` anew."""
        self.graph = _branch_graph(self.network, self.embedders)

    def config(self) -> dict[str, Any]:
        """The configuration that diffusers stores with the network."""
        return dict(self.network.config)

    def step_constants(self, timesteps: Tensor) -> dict[str, Tensor]:
        """time_embedding [len(timesteps), E, D]: the sinusoid through each distinct timestep MLP."""
        dtype = self.network.pos_embed.proj.weight.dtype
        rows = [e.timestep_embedder(e.time_proj(timesteps).to(dtype)) for e in self.embedders]
        return {"time_embedding": torch.stack(rows, dim=1)}

    def forward(self, x: Tensor, condition: Condition, constants: Mapping[str, Tensor], route: Route) -> Tensor:
        """[R, C_out, H, W] for x [R, C, H, W], labels int64[R], time_embedding [1 or R, E, D]."""
        labels, time = condition["labels"], constants["time_embedding"]
        conditioning = [
            functional.silu(time[:, e] + embedder.class_embedder.embedding_table(labels))
            for e, embedder in enumerate(self.embedders)
        ]
        h = self.network.pos_embed(x)  # [R, L, D]
        for index, block in enumerate(self.network.transformer_blocks):
            modulation = block.norm1.linear(conditioning[self.embedder_of_block[index]])
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, None].chunk(6, dim=2)  # [R, 1, D]

            def attention(h: Tensor = h, block: Any = block, s: Tensor = scale_a, b: Tensor = shift_a) -> Tensor:
                return block.attn1(block.norm1.norm(h) * (1 + s) + b)

            h = h + gate_a * route(2 * index, attention)

            def mlp(h: Tensor = h, block: Any = block, s: Tensor = scale_m, b: Tensor = shift_m) -> Tensor:
                return block.ff(block.norm3(h) * (1 + s) + b)

            h = h + gate_m * route(2 * index + 1, mlp)
        shift, scale = self.network.proj_out_1(conditioning[self.embedder_of_block[0]])[:, None].chunk(2, dim=2)
        h = self.network.proj_out_2(self.network.norm_out(h) * (1 + scale) + shift)
        return unpatchify(h, self.network.patch_size, self.network.out_channels)

    def null_condition(self, condition: Condition) -> Condition:
        """The null class, one past the last label."""
        return {"labels": torch.full_like(condition["labels"], self.num_classes)}

    def random_condition(self, rng: np.random.Generator, count: int) -> Condition:
        """Labels uniform over the classes (HarmoniCa, algorithm of SDT)."""
        return {"labels": torch.from_numpy(rng.integers(self.num_classes, size=count)).to(self.device)}

    def even_conditions(self, count: int, first: int = 0) -> Given:
        """Labels, round robin over the classes."""
        return [index % self.num_classes for index in range(first, first + count)]


def _distinct(modules: list[nn.Module]) -> tuple[list[nn.Module], list[int]]:
    """The modules with different weights, and for each module the index of its equal."""
    distinct: list[nn.Module] = []
    index_of: list[int] = []
    for module in modules:
        state = module.state_dict()
        for at, known in enumerate(distinct):
            if all(torch.equal(tensor, state[name]) for name, tensor in known.state_dict().items()):
                index_of.append(at)
                break
        else:
            index_of.append(len(distinct))
            distinct.append(module)
    return distinct, index_of


def _branch_graph(network: DiTTransformer2DModel, embedders: Sequence[nn.Module]) -> BranchGraph:
    """MACs and parameters.

    MACs are those of one row, in linears and the two attention products; norms, gates and additions are not counted.
    Of the six parts of a block's adaLN, shift and scale of a branch are parameters of it alone; its gate is not, as a
    reused branch has one too. All six count among the other MACs: a dense call gives them in one product.
    """
    config = network.config
    width, patch = network.inner_dim, config.patch_size
    tokens = (config.sample_size // patch) ** 2
    branches: list[Branch] = []
    for index, block in enumerate(network.transformer_blocks):
        modulation = num_params([block.norm1.linear]) // 6 * 2
        macs = tokens * linear_macs(block.attn1) + 2 * tokens * tokens * block.attn1.to_q.out_features
        params = modulation + num_params([block.norm1.norm, block.attn1])
        branches.append(Branch(f"{index}.attn", macs, (tokens, width), params))
        params = modulation + num_params([block.norm3, block.ff])
        branches.append(Branch(f"{index}.mlp", tokens * linear_macs(block.ff), (tokens, width), params))
    patchify = tokens * config.in_channels * patch * patch * width
    modulations = sum(linear_macs(block.norm1.linear) for block in network.transformer_blocks)
    final = linear_macs(network.proj_out_1) + tokens * linear_macs(network.proj_out_2)
    copies = num_params(block.norm1.emb for block in network.transformer_blocks)
    params = num_params([network]) - copies + num_params(embedders)
    other_params = params - sum(branch.params for branch in branches)
    return BranchGraph(tuple(branches), patchify + modulations + final, other_params)
