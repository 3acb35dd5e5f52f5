"""PixArt-alpha and -Sigma (Chen et al. 2023, 2024) as diffusers' `PixArtTransformer2DModel`: text-conditional.

Three branches a block: self-attention and MLP, cached before their gate, and cross-attention, which has neither gate
nor modulation: its raw output is cached. The forward below calls diffusers' own modules and is bit-identical to
`PixArtTransformer2DModel.forward` when every branch is computed. It leaves out that one's `squeeze(1)` of [R, L, ...],
which PyTorch ignores and ONNX refuses.

adaLN-single modulates by time alone: one vector for all blocks, to which each adds a table of its own. So the vector is
a step constant. Resolution and aspect ratio, which the 1024-pixel models are told too, are fixed by the latent's size
and enter with it.

Diffusers' pipeline orders the guided batch [uncond ; cond], `Adapter.guided` the other way round: rows are independent,
so the outputs are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from hcompress.adapter import Condition, Route
from hcompress.branches import Branch, BranchGraph
from hcompress.errors import ModelError
from hcompress.models.parts import linear_macs, num_params, unpatchify
from hcompress.models.prompts import PromptAdapter, PromptInputs, Prompts, tokens_of, with_prompts, zeros
from hcompress_runtime.conditions import Input

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # `max_sequence_length` of diffusers' pipelines
PIXELS = 8  # on a side, that the VAE makes of each of the latent


@final
class PixArt(PromptAdapter):
    """Adapter of `PixArtTransformer2DModel`. L image tokens, D width, S text tokens, W width of their embeddings.

    prompts: the model's own, of which S is taken; the null prompt is zeros where they hold none
    tokens:  S, where there are no prompts

    Raises InputError for prompts that do not fit the network, ModelError for a network of another kind.
    """

    network: PixArtTransformer2DModel

    def __init__(self, network: PixArtTransformer2DModel, prompts: Prompts | None = None, *, tokens: int = 120) -> None:
        super().__init__()
        config = network.config
        if config.cross_attention_dim is None or config.attention_type != "default":
            raise ModelError(
                "PixArt without cross-attention, or with attention_type other than 'default', has no adapter"
            )
        self.network = network.eval().requires_grad_(False)
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.guided_channels = config.in_channels
        self.prompts = _prompt_inputs(network, prompts, tokens_of(prompts, tokens))
        self.conditions = self.prompts.conditions
        self.tokens = tokens_of(prompts, tokens)
        self.recount()

    def recount(self) -> None:
        """Set `graph` anew."""
        self.graph = _branch_graph(self.network, self.tokens)

    def config(self) -> dict[str, Any]:
        """The configuration that diffusers stores with the network."""
        return dict(self.network.config)

    def step_constants(self, timesteps: Tensor) -> dict[str, Tensor]:
        """modulation [len(timesteps), 6, D], what all blocks share of it; time_embedding [len(timesteps), D]."""
        count, told = len(timesteps), None
        if self.network.use_additional_conditions:
            size = torch.full((count, 2), float(PIXELS * self.sample_shape[1]), device=timesteps.device)
            told = {"resolution": size, "aspect_ratio": torch.ones_like(size[:, :1])}
        modulation, embedding = self.network.adaln_single(timesteps, told, batch_size=count, hidden_dtype=self.dtype)
        return {"modulation": modulation.reshape(count, 6, -1), "time_embedding": embedding}

    def forward(self, x: Tensor, condition: Condition, constants: Mapping[str, Tensor], route: Route) -> Tensor:
        """[R, C_out, H, W] for x [R, C, H, W], prompt_embeds [R, S, W], prompt_mask [R, S]; constants have 1 or R rows.

        Without a prompt_mask all tokens count.
        """
        network = self.network
        text = condition["prompt_embeds"].to(x.dtype)  # [R, S, W]
        if network.caption_projection is not None:
            text = network.caption_projection(text)  # [R, S, D]
        bias = _bias(condition.get("prompt_mask"), network.config.num_attention_heads, x.dtype)
        h = network.pos_embed(x)  # [R, L, D]
        for index, block in enumerate(network.transformer_blocks):
            modulation = block.scale_shift_table[None] + constants["modulation"]
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)  # [1 or R, 1, D]

            def attention(h: Tensor = h, block: Any = block, s: Tensor = scale_a, b: Tensor = shift_a) -> Tensor:
                return block.attn1(block.norm1(h) * (1 + s) + b)

            h = h + gate_a * route(3 * index, attention)

            def cross(h: Tensor = h, block: Any = block) -> Tensor:
                return block.attn2(h, encoder_hidden_states=text, attention_mask=bias)

            h = h + route(3 * index + 1, cross)

            def mlp(h: Tensor = h, block: Any = block, s: Tensor = scale_m, b: Tensor = shift_m) -> Tensor:
                return block.ff(block.norm2(h) * (1 + s) + b)

            h = h + gate_m * route(3 * index + 2, mlp)
        shift, scale = (network.scale_shift_table[None] + constants["time_embedding"][:, None]).chunk(2, dim=1)
        h = network.proj_out(network.norm_out(h) * (1 + scale) + shift)
        return unpatchify(h, network.config.patch_size, network.out_channels)


def load_pixart(folder: Path, **source: Any) -> PixArt:
    """The adapter of the network in `folder`, a pipeline's transformer, with the prompts that lie beside it."""
    network = PixArtTransformer2DModel.from_pretrained(str(folder), **source)
    index = folder.parent / "model_index.json"
    pipeline = str(json.loads(index.read_text())["_class_name"]) if index.is_file() else "PixArtAlphaPipeline"
    return with_prompts(folder, lambda prompts: PixArt(network, prompts, tokens=TOKENS.get(pipeline, 120)))


def _prompt_inputs(network: PixArtTransformer2DModel, prompts: Prompts | None, tokens: int) -> PromptInputs:
    config = network.config
    width = config.cross_attention_dim if network.caption_projection is None else config.caption_channels
    prompt = {"prompt_embeds": Input("float32", (tokens, width)), "prompt_mask": Input("bool", (tokens,))}
    one_token = {"null_mask": np.arange(tokens) == 0}  # an empty prompt is its end
    return PromptInputs(prompt, prompts, null={**zeros(prompt), **one_token})


def _bias(mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores, [R heads, 1, S] for mask [R, S]: 0 for text, -10000 for padding.

    For all heads at once, since diffusers' attention would do it in every block.
    """
    if mask is None:
        return None
    bias = (1 - mask.to(dtype)) * -10000.0
    return bias[:, None].repeat_interleave(heads, dim=0)


def _branch_graph(network: PixArtTransformer2DModel, text: int) -> BranchGraph:
    """MACs and parameters, counted as in hcompress.models.dit, for `text` tokens of text.

    Of the six rows of a block's table, shift and scale belong to their branch. adaLN-single gives step constants, so it
    has no MACs; the embeddings of the text are projected anew at each call, which belongs to no branch.
    """
    config = network.config
    width, patch = network.inner_dim, config.patch_size
    tokens = (config.sample_size // patch) ** 2
    branches: list[Branch] = []
    for index, block in enumerate(network.transformer_blocks):
        macs = tokens * linear_macs(block.attn1) + 2 * tokens * tokens * block.attn1.to_q.out_features
        params = 2 * width + num_params([block.norm1, block.attn1])
        branches.append(Branch(f"{index}.attn", macs, (tokens, width), params))
        cross = block.attn2
        macs = tokens * (linear_macs(cross.to_q) + linear_macs(cross.to_out)) + 2 * tokens * text * width
        macs += text * (linear_macs(cross.to_k) + linear_macs(cross.to_v))
        branches.append(Branch(f"{index}.cross", macs, (tokens, width), num_params([cross])))
        params = 2 * width + num_params([block.norm2, block.ff])
        branches.append(Branch(f"{index}.mlp", tokens * linear_macs(block.ff), (tokens, width), params))
    patchify = tokens * config.in_channels * patch * patch * width
    projection = text * linear_macs(network.caption_projection) if network.caption_projection is not None else 0
    other_params = num_params([network]) - sum(branch.params for branch in branches)
    return BranchGraph(tuple(branches), patchify + projection + tokens * linear_macs(network.proj_out), other_params)
