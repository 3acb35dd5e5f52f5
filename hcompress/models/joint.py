"""The double-stream block of the joint-attention families (MMDiT, Esser et al. 2024): what runs it, and its branches.

Image and text are two streams, each with weights of its own, which meet in one attention over all tokens. That is one
branch: its output is what both streams get of it, before their gates, as [text ; image] along the tokens. Each stream's
MLP is a branch, and so is the second attention that some blocks of Stable Diffusion 3.5 have, over the image alone.

Legend: R rows, S text tokens, L image tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from hcompress.adapter import Route
from hcompress.branches import Branch
from hcompress.models.parts import linear_macs, modulation, num_params

Branches = Callable[[Callable[[], Tensor]], Tensor]
"""A route that knows which branch is next."""


def in_order(route: Route) -> Branches:
    """`route`, asked for branch 0 first, then for branch 1, ..."""
    number = count()
    return lambda compute: route(next(number), compute)


def double_block(
    block: Any, image: Tensor, text: Tensor, conditioning: Tensor, branches: Branches, **attention: Any
) -> tuple[Tensor, Tensor]:
    """What `JointTransformerBlock` and `FluxTransformerBlock` of diffusers make of both streams, to the bit.

    image [R, L, D], text [R, S, D], silu(conditioning) [R, D]; `attention` is for the joint attention alone. A block
    that is `context_pre_only`, the last of Stable Diffusion 3, returns its text as it was: nobody reads it any more.
    """
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m, *second = modulation(block.norm1.linear, conditioning)
    text_parts = modulation(block.norm1_context.linear, conditioning)
    last = len(text_parts) == 2
    text_shift, text_scale = reversed(text_parts) if last else text_parts[:2]  # which that block has the other way

    def joint() -> Tensor:
        normed = _modulated(block.norm1.norm, image, shift_a, scale_a)
        normed_text = _modulated(block.norm1_context.norm, text, text_shift, text_scale)
        of_image, of_text = block.attn(hidden_states=normed, encoder_hidden_states=normed_text, **attention)
        return of_image if last else torch.cat([of_text, of_image], dim=1)

    attended = branches(joint)
    after = image + gate_a * (attended if last else attended[:, text.shape[1] :])
    if second:
        shift, scale, gate = second
        after = after + gate * branches(lambda: block.attn2(_modulated(block.norm1.norm, image, shift, scale)))
    after = after + gate_m * branches(partial(_mlp, block.ff, block.norm2, after, shift_m, scale_m))
    if last:
        return after, text
    _, _, gate_a, shift_m, scale_m, gate_m = text_parts
    text = text + gate_a * attended[:, : text.shape[1]]
    return after, text + gate_m * branches(partial(_mlp, block.ff_context, block.norm2_context, text, shift_m, scale_m))


def double_block_branches(index: int, block: Any, image: int, text: int) -> Iterator[Branch]:
    """The branches of `double_block` in its order, for `image` and `text` tokens; counted as in hcompress.models.dit.

    The last block of Stable Diffusion 3 needs the text only for its keys and values, yet diffusers makes queries of it;
    nothing but its attention needs the gate of the text's MLP in the block before.
    """
    width = block.norm1.linear.in_features
    part = num_params([block.norm1.linear]) * width // block.norm1.linear.out_features  # of adaLN: a shift, or a scale
    last = block.norm1_context.linear.out_features == 2 * width
    tokens = image + text
    of_text = [module for name, module in block.attn.named_children() if name.startswith(("add", "to_add"))]
    text_macs = sum(map(linear_macs, of_text))
    macs = image * (linear_macs(block.attn) - text_macs) + text * text_macs + 2 * tokens * tokens * block.attn.inner_dim
    shape = (image if last else tokens, width)
    parts = 4 + int(last and index > 0)
    yield Branch(f"{index}.attn", macs, shape, parts * part + num_params([block.attn]))
    if getattr(block, "attn2", None) is not None:
        macs = image * linear_macs(block.attn2) + 2 * image * image * block.attn2.inner_dim
        yield Branch(f"{index}.attn2", macs, (image, width), 2 * part + num_params([block.attn2]))
    yield Branch(f"{index}.mlp", image * linear_macs(block.ff), (image, width), 2 * part + num_params([block.ff]))
    if not last:
        params = 2 * part + num_params([block.ff_context])
        yield Branch(f"{index}.context_mlp", text * linear_macs(block.ff_context), (text, width), params)


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed: Tensor = norm(x)
    return normed * (1 + scale) + shift


def _mlp(mlp: nn.Module, norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    output: Tensor = mlp(_modulated(norm, x, shift, scale))
    return output
