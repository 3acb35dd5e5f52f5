"""U-ViT (Bao et al. 2023): unconditional or class-conditional, with long skip connections.

Two branches a block, attention and MLP, with neither gate nor modulation: their raw output is cached, for all tokens,
those of time and label included. `skip_linear` is no residual branch and is computed at every call, of what the
earlier block gives *now*, reused branches and all (as Learning-to-Cache does it, U-ViT/libs/uvit_router.py). Time is a
token: it is the step constant.

Guidance here is Ho and Salimans' uncond + cfg (cond - uncond), as for every family. U-ViT's own code, and papers that
quote it, write cond + w (cond - uncond): their w = 0.4 is cfg = 1.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from hcompress.adapter import Adapter, Condition, Route
from hcompress.branches import Branch, BranchGraph
from hcompress.errors import ModelError
from hcompress.models.parts import linear_macs, num_params
from hcompress.models.uvit_network import UViT2DModel
from hcompress_runtime.conditions import Given, Input


@final
class UViT(Adapter):
    """Adapter of `UViT2DModel`. L tokens, those of label and time included; D width.

    An unconditional model is one of a single class, 0.
    """

    network: UViT2DModel
    num_classes: int

    def __init__(self, network: UViT2DModel) -> None:
        super().__init__()
        config = network.config
        self.network = network.eval().requires_grad_(False)
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.guided_channels = config.in_channels
        self.num_classes = max(1, config.num_classes)
        self.conditions = {"labels": Input("int64", (), classes=self.num_classes)}
        self.graph = _branch_graph(network)

    def config(self) -> dict[str, Any]:
        """The configuration that is stored with the network."""
        return dict(self.network.config)

    def step_constants(self, timesteps: Tensor) -> dict[str, Tensor]:
        """time_token [len(timesteps), 1, D]."""
        return {"time_token": self.network.time_token(timesteps)}

    def forward(self, x: Tensor, condition: Condition, constants: Mapping[str, Tensor], route: Route) -> Tensor:
        """[R, C, H, W] for x [R, C, H, W], labels int64[R], time_token [1 or R, 1, D]."""
        network = self.network
        h = network.embed(x, condition["labels"], constants["time_token"])  # [R, L, D]
        skips: list[Tensor] = []
        for index, block in enumerate(_blocks(network)):
            if block.skip_linear is not None:
                h = block.mix(h, skips.pop())

            def attention(h: Tensor = h, block: Any = block) -> Tensor:
                return block.attn(block.norm1(h))

            h = h + route(2 * index, attention)

            def mlp(h: Tensor = h, block: Any = block) -> Tensor:
                return block.mlp(block.norm2(h))

            h = h + route(2 * index + 1, mlp)
            if index < len(network.in_blocks):
                skips.append(h)
        return network.decode(h)

    def null_condition(self, condition: Condition) -> Condition:
        """The null class, one past the last. Raises ModelError for a network that has none: it cannot be guided."""
        if not (self.network.config.num_classes and self.network.config.null_class):
            raise ModelError("this U-ViT was trained without a null class, so it cannot be guided; pass --cfg 1.0")
        return {"labels": torch.full_like(condition["labels"], self.num_classes)}

    def random_condition(self, rng: np.random.Generator, count: int) -> Condition:
        """Labels uniform over the classes."""
        return {"labels": torch.from_numpy(rng.integers(self.num_classes, size=count)).to(self.device)}

    def even_conditions(self, count: int, first: int = 0) -> Given:
        """Labels, round robin over the classes."""
        return [index % self.num_classes for index in range(first, first + count)]


def _blocks(network: UViT2DModel) -> list[Any]:
    """All blocks, in execution order."""
    return [*network.in_blocks, network.mid_block, *network.out_blocks]


def _names(network: UViT2DModel) -> list[str]:
    """What all blocks are called, in execution order: by the half they lie in, as caching methods for U-Nets ask."""
    half = range(len(network.in_blocks))
    return [*(f"in.{block}" for block in half), "mid", *(f"out.{block}" for block in half)]


def _branch_graph(network: UViT2DModel) -> BranchGraph:
    """MACs and parameters, counted as in hcompress.models.dit; the long skip connections belong to no branch."""
    config, width = network.config, network.inner_dim
    tokens = network.pos_embed.shape[1]
    pixels = config.sample_size**2
    branches: list[Branch] = []
    for name, block in zip(_names(network), _blocks(network), strict=True):
        macs = tokens * linear_macs(block.attn) + 2 * tokens * tokens * width
        branches.append(Branch(f"{name}.attn", macs, (tokens, width), num_params([block.norm1, block.attn])))
        macs = tokens * linear_macs(block.mlp)
        branches.append(Branch(f"{name}.mlp", macs, (tokens, width), num_params([block.norm2, block.mlp])))
    other_macs = pixels * config.in_channels * width  # patches
    other_macs += tokens * linear_macs(
        nn.ModuleList([block.get_submodule("skip_linear") for block in network.out_blocks])
    )
    other_macs += (tokens - network.extras) * linear_macs(network.decoder_pred)
    if isinstance(network.final_layer, nn.Conv2d):
        other_macs += pixels * network.final_layer.weight.numel()
    other_params = num_params([network]) - sum(branch.params for branch in branches)
    return BranchGraph(tuple(branches), other_macs, other_params)
