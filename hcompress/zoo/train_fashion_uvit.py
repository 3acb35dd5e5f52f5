"""Train `zoo:fashion-uvit`, a class-conditional pixel-space U-ViT on Fashion-MNIST, and store it as a diffusers folder.

    python -m hcompress.zoo.train_fashion_uvit --run runs/fashion-uvit            # train or resume
    python -m hcompress.zoo.train_fashion_uvit --run runs/fashion-uvit --store    # write hcompress/zoo/fashion-uvit

Cost: about 0.8 s a step on one CPU core. What is learned and how is told in hcompress/zoo/fashion_training.py.
"""

from __future__ import annotations

import torch

from hcompress.models.uvit_network import UViT2DModel
from hcompress.zoo.fashion_training import NULL_CLASS, main

CYCLES = ((3000, 1000), (6000, 1500), (9000, 2000))  # (last step, length of the cool-down before it)


def build() -> UViT2DModel:
    """The network, Xavier-initialised: the authors' deviation of 0.02 is that of a width of 1024, not of 128."""
    model = UViT2DModel(
        num_layers=9,
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        sample_size=28,
        patch_size=4,
        num_classes=NULL_CLASS,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for weight in (model.pos_embed, model.label_emb.weight):
        torch.nn.init.trunc_normal_(weight, std=0.02)
    torch.nn.init.zeros_(model.decoder_pred.weight)
    return model.eval()


if __name__ == "__main__":
    main(__doc__, "fashion-uvit", build, CYCLES)
