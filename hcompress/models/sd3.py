"""Stable Diffusion 3 and 3.5 (Esser et al. 2024) as diffusers' `SD3Transformer2DModel`: text-conditional flow matching.

Three branches a block, see hcompress.models.joint, and a fourth where a block has a second attention. The forward below
calls diffusers' own modules and is bit-identical to `SD3Transformer2DModel.forward` when every branch is computed.

A prompt is two things: the hidden states of the text encoders, 77 tokens of CLIP's and then 256 of T5's, and one pooled
vector. The timestep, 1000 sigma, is embedded on its own and added to the pooled vector: the first is a step constant,
the second stays in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional

from hcompress.adapter import Condition, Route
from hcompress.branches import Branch, BranchGraph
from hcompress.models.joint import double_block, double_block_branches, in_order
from hcompress.models.parts import linear_macs, num_params, unpatchify
from hcompress.models.prompts import PromptAdapter, PromptInputs, Prompts, tokens_of, with_prompts, zeros
from hcompress_runtime.conditions import Input

TOKENS = 77 + 256  # of diffusers' pipeline, by default


@final
class SD3(PromptAdapter):
    """Adapter of `SD3Transformer2DModel`. L image tokens, D width, S text tokens, W width of their embeddings.

    prompts: the model's own, of which S is taken; the null prompt is zeros where they hold none
    tokens:  S, where there are no prompts

    Raises InputError for prompts that do not fit the network.
    """

    network: SD3Transformer2DModel

    def __init__(self, network: SD3Transformer2DModel, prompts: Prompts | None = None, *, tokens: int = TOKENS) -> None:
        super().__init__()
        config = network.config
        tokens = tokens_of(prompts, tokens)
        prompt = {
            "prompt_embeds": Input("float32", (tokens, config.joint_attention_dim)),
            "pooled_prompt_embeds": Input("float32", (config.pooled_projection_dim,)),
        }
        self.network = network.eval().requires_grad_(False)
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.guided_channels = config.in_channels
        self.prompts = PromptInputs(prompt, prompts, null=zeros(prompt))
        self.conditions = self.prompts.conditions
        self.graph = _branch_graph(network, tokens)

    def config(self) -> dict[str, Any]:
        """The configuration that diffusers stores with the network."""
        return dict(self.network.config)

    def step_constants(self, timesteps: Tensor) -> dict[str, Tensor]:
        """time_embedding [len(timesteps), D]: the sinusoid of 1000 sigma through the timestep MLP."""
        embedder = self.network.time_text_embed
        return {"time_embedding": embedder.timestep_embedder(embedder.time_proj(timesteps).to(self.dtype))}

    def forward(self, x: Tensor, condition: Condition, constants: Mapping[str, Tensor], route: Route) -> Tensor:
        """[R, C_out, H, W] for x [R, C, H, W], prompt_embeds [R, S, W], pooled_prompt_embeds [R, P].

        The time_embedding has 1 or R rows.
        """
        network, branches = self.network, in_order(route)
        pooled = network.time_text_embed.text_embedder(condition["pooled_prompt_embeds"].to(x.dtype))
        embedding = constants["time_embedding"] + pooled  # [R, D]
        text = network.context_embedder(condition["prompt_embeds"].to(x.dtype))  # [R, S, D]
        h = network.pos_embed(x).contiguous()  # [R, L, D]
        for block in network.transformer_blocks:
            h, text = double_block(block, h, text, functional.silu(embedding), branches)
        h = network.proj_out(network.norm_out(h, embedding))
        return unpatchify(h, network.config.patch_size, network.out_channels)


def load_sd3(folder: Path, **source: Any) -> SD3:
    """The adapter of the network in `folder`, a pipeline's transformer, with the prompts that lie beside it."""
    network = SD3Transformer2DModel.from_pretrained(str(folder), **source)
    return with_prompts(folder, lambda prompts: SD3(network, prompts))


def _branch_graph(network: SD3Transformer2DModel, text: int) -> BranchGraph:
    """MACs and parameters, counted as in hcompress.models.dit, for `text` tokens of text."""
    config = network.config
    width, patch = network.inner_dim, config.patch_size
    image = (config.sample_size // patch) ** 2
    branches: list[Branch] = []
    for index, block in enumerate(network.transformer_blocks):
        branches += double_block_branches(index, block, image, text)
    macs = image * (config.in_channels * patch * patch * width + linear_macs(network.proj_out))
    macs += text * linear_macs(network.context_embedder) + linear_macs(network.time_text_embed.text_embedder)
    norms = [norm for block in network.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    macs += sum(linear_macs(norm) for norm in [*norms, network.norm_out])
    params = num_params([network]) - sum(branch.params for branch in branches)
    return BranchGraph(tuple(branches), macs, params)
