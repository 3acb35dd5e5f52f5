"""Train `zoo:fashion-dit`, a class-conditional pixel-space DiT on Fashion-MNIST, and store it as a diffusers folder.

    python -m hcompress.zoo.train_fashion_dit --run runs/fashion-dit            # train or resume
    python -m hcompress.zoo.train_fashion_dit --run runs/fashion-dit --store    # write hcompress/zoo/fashion-dit

Cost: about 0.9 s a step on one CPU core, 0.5 s on two. What is learned, and how: hcompress/zoo/fashion_training.py. One
embedder serves all blocks (as in the original DiT); storing copies it into each, which is diffusers' layout.
"""

from __future__ import annotations

import copy

import torch
from diffusers import DiTTransformer2DModel

from hcompress.zoo.fashion_training import NULL_CLASS, main

CYCLES = ((4300, 1500), (8500, 2000))  # (last step, length of the cool-down before it)


def build() -> DiTTransformer2DModel:
    """The network with DiT's initialisation (Peebles and Xie 2023, section 3.2: adaLN-Zero), embedders tied."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=10,
        sample_size=28,
        patch_size=4,
        num_embeds_ada_norm=NULL_CLASS,
        norm_type="ada_norm_zero",
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    embedder = model.transformer_blocks[0].norm1.emb
    torch.nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    for linear in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
        torch.nn.init.normal_(linear.weight, std=0.02)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        block.norm1.emb = embedder
    for linear in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(linear.weight)
    return model.eval()  # no dropout of diffusers' own: labels are dropped here, once for all blocks


def untie(model: DiTTransformer2DModel) -> None:
    """Give each block an embedder of its own; safetensors refuses tensors that share memory."""
    for block in model.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)


if __name__ == "__main__":
    main(__doc__, "fashion-dit", build, CYCLES, untie)
