"""FLUX.1 (Black Forest Labs 2024) as diffusers' `FluxTransformer2DModel`: text-conditional flow matching.

First double-stream blocks of three branches, see hcompress.models.joint; then single-stream blocks over [text ; image],
whose attention and MLP lie side by side under one output projection and one gate: one branch each. FLUX.1 has 19 and 38
of them, N = 95. The forward below calls diffusers' own modules and is bit-identical to `FluxTransformer2DModel.forward`
when every branch is computed.

What diffusers' pipeline does around the transformer is done here, so that a sample is a latent [C, H, W] as elsewhere:

- it packs 2 x 2 positions of the latent into one token, and back;
- it divides the timestep by 1000, which the transformer multiplies again: in a half, both round;
- it says where tokens are, by ids that fix the rotary tables: constants of the resolution, float32 in any precision;
- it asks its scheduler for sigmas of its own, and for a shift by the number of tokens, see `scheduler_config`.

A guidance-distilled model (dev) is told a `guidance` scale, which is a condition of the sample: it runs once a sample,
at a cfg of 1. Another cfg is true guidance, away from a null prompt, which then has to be among the model's prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

from hcompress.adapter import Condition, Route
from hcompress.branches import Branch, BranchGraph
from hcompress.errors import ModelError
from hcompress.models.joint import double_block, double_block_branches, in_order
from hcompress.models.parts import linear_macs, modulation, num_params
from hcompress.models.prompts import PromptAdapter, PromptInputs, Prompts, tokens_of, with_prompts
from hcompress_runtime.conditions import Input

TOKENS, GUIDANCE, SIDE = 512, 3.5, 128  # defaults of diffusers' pipeline: 1024 pixels, an eighth in the latent


@final
class Flux(PromptAdapter):
    """Adapter of `FluxTransformer2DModel`. L image tokens, D width, S text tokens, W width of their embeddings.

    prompts: the model's own, of which S is taken
    tokens:  S, where there are no prompts
    side:    H and W of the latent, which the network does not say

    Raises InputError for prompts that do not fit the network, ModelError for a network of another kind.
    """

    network: FluxTransformer2DModel

    def __init__(
        self,
        network: FluxTransformer2DModel,
        prompts: Prompts | None = None,
        *,
        tokens: int = TOKENS,
        side: int = SIDE,
    ) -> None:
        super().__init__()
        config = network.config
        if network.out_channels != config.in_channels or config.patch_size != 1:
            raise ModelError(
                f"FLUX with {config.in_channels} channels in and {network.out_channels} out, as those have that are "
                "told of another picture, has no adapter"
            )
        tokens = tokens_of(prompts, tokens)
        prompt = {
            "prompt_embeds": Input("float32", (tokens, config.joint_attention_dim)),
            "pooled_prompt_embeds": Input("float32", (config.pooled_projection_dim,)),
        }
        guidance = {"guidance": Input("float32", (), default=np.array(GUIDANCE, np.float32))}
        self.network = network.eval().requires_grad_(False)
        self.sample_shape = (config.in_channels // 4, side, side)
        self.guided_channels = config.in_channels // 4
        self.prompts = PromptInputs(prompt, prompts, other=guidance if config.guidance_embeds else None)
        self.conditions = self.prompts.conditions
        self.graph = _branch_graph(network, (side // 2) ** 2, tokens)
        self.rotary = _rotary(network, side // 2, tokens)

    def config(self) -> dict[str, Any]:
        """The configuration that diffusers stores with the network, and the resolution, which it does not."""
        return {**self.network.config, "sample_size": self.sample_shape[1]}

    def scheduler_config(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """`stored` with what `FluxPipeline` asks of its scheduler: even sigmas, and a shift by the number of tokens."""
        config = dict(stored) | {"even_sigmas": True}
        if config.get("use_dynamic_shifting"):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            mu = low + (high - low) * ((self.sample_shape[1] // 2) ** 2 - few) / (many - few)
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
            config |= {"use_dynamic_shifting": False, "shift": shift}
        return config

    def step_constants(self, timesteps: Tensor) -> dict[str, Tensor]:
        """time_embedding [len(timesteps), D]: the sinusoid of 1000 sigma through the timestep MLP."""
        embedder, thousand_sigma = self.network.time_text_embed, timesteps.to(self.dtype) / 1000 * 1000
        return {"time_embedding": embedder.timestep_embedder(embedder.time_proj(thousand_sigma).to(self.dtype))}

    def forward(self, x: Tensor, condition: Condition, constants: Mapping[str, Tensor], route: Route) -> Tensor:
        """[R, C, H, W] for x [R, C, H, W], prompt_embeds [R, S, W], pooled_prompt_embeds [R, P], guidance [R].

        The time_embedding has 1 or R rows; there is a guidance where the model is told one.
        """
        network, branches, rotary = self.network, in_order(route), self._rotary_on(x.device)
        embedder, embedding = network.time_text_embed, constants["time_embedding"]
        if network.config.guidance_embeds:
            sinusoid = embedder.time_proj(condition["guidance"].to(x.dtype) * 1000)
            embedding = embedding + embedder.guidance_embedder(sinusoid.to(x.dtype))
        embedding = embedding + embedder.text_embedder(condition["pooled_prompt_embeds"].to(x.dtype))  # [R, D]
        conditioning = functional.silu(embedding)
        text = network.context_embedder(condition["prompt_embeds"].to(x.dtype))  # [R, S, D]
        h = network.x_embedder(_pack(x))  # [R, L, D]
        for block in network.transformer_blocks:
            h, text = double_block(block, h, text, conditioning, branches, image_rotary_emb=rotary)
            text = _clip(text)
        h = torch.cat([text, h], dim=1)
        for block in network.single_transformer_blocks:
            shift, scale, gate = modulation(block.norm.linear, conditioning)  # [R, 1, D]

            def single(h: Tensor = h, block: Any = block, s: Tensor = scale, b: Tensor = shift) -> Tensor:
                normed = block.norm.norm(h) * (1 + s) + b
                attended = block.attn(hidden_states=normed, image_rotary_emb=rotary)
                return block.proj_out(torch.cat([attended, block.act_mlp(block.proj_mlp(normed))], dim=2))

            h = _clip(h + gate * branches(single))
        h = network.norm_out(h[:, text.shape[1] :], embedding)
        return _unpack(network.proj_out(h), self.sample_shape)

    def _rotary_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary tables; no buffers, which would be rounded with a network that is made a half."""
        if self.rotary[0].device != device:
            self.rotary = self.rotary[0].to(device), self.rotary[1].to(device)
        return self.rotary


def load_flux(folder: Path, **source: Any) -> Flux:
    """The adapter of the network in `folder`, a pipeline's transformer, with the prompts that lie beside it.

    Pictures of another size than 1024 pixels want a `sample_size` in config.json, an eighth of it, as other families
    have one; diffusers ignores it, and says so.
    """
    network = FluxTransformer2DModel.from_pretrained(str(folder), **source)
    side = int(json.loads((folder / "config.json").read_text()).get("sample_size", SIDE))
    return with_prompts(folder, lambda prompts: Flux(network, prompts, side=side))


def _pack(x: Tensor) -> Tensor:
    """[R, C, H, W] to tokens [R, H/2 W/2, 4 C], as `FluxPipeline._pack_latents`."""
    _, channels, height, width = x.shape
    x = x.reshape(-1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, height // 2 * (width // 2), 4 * channels)


def _unpack(h: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """What `_pack` makes of [R, *shape], back."""
    channels, height, width = shape
    h = h.reshape(-1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return h.reshape(-1, channels, height, width)


def _clip(x: Tensor) -> Tensor:
    """x, in float16 without infinities, as diffusers has it."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _rotary(network: FluxTransformer2DModel, side: int, text: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32[S + L, head] each: all text at the origin, then `side` rows of `side` image tokens."""
    ids = torch.zeros(text + side * side, 3)
    ids[text:, 1:] = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    cos, sin = network.pos_embed(ids)
    return cos, sin


def _branch_graph(network: FluxTransformer2DModel, image: int, text: int) -> BranchGraph:
    """MACs and parameters, counted as in hcompress.models.dit, for `image` and `text` tokens."""
    width, tokens = network.inner_dim, image + text
    branches: list[Branch] = []
    for index, block in enumerate(network.transformer_blocks):
        branches += double_block_branches(index, block, image, text)
    for index, block in enumerate(network.single_transformer_blocks, len(network.transformer_blocks)):
        inside = [block.attn, block.proj_mlp, block.proj_out]
        macs = tokens * sum(map(linear_macs, inside)) + 2 * tokens * tokens * width
        params = num_params([block.norm.linear]) // 3 * 2 + num_params(inside)
        branches.append(Branch(f"{index}.single", macs, (tokens, width), params))
    norms = [norm for block in network.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    norms += [block.norm for block in network.single_transformer_blocks]
    once = [network.time_text_embed.text_embedder, network.norm_out, *norms]
    once += [network.time_text_embed.guidance_embedder] if network.config.guidance_embeds else []
    macs = sum(map(linear_macs, once)) + text * linear_macs(network.context_embedder)
    macs += image * (linear_macs(network.x_embedder) + linear_macs(network.proj_out))
    params = num_params([network]) - sum(branch.params for branch in branches)
    return BranchGraph(tuple(branches), macs, params)
