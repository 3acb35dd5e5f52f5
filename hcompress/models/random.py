"""Published architectures with random weights: full size for exports, engines and timings, and no quality whatsoever.

`random:DiT-XL-2-256` costs, caches and exports like facebook/DiT-XL-2-256, but gives noise. What is drawn differs from
a fresh initialisation in that nothing is zero: every gate is open, so a reused branch changes the samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from hcompress.adapter import Adapter
from hcompress.errors import ModelError

PREFIX = "random:"

DIT = {  # facebook/DiT-XL-2-256, transformer/config.json
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
}
CONFIGS: dict[str, dict[str, Any]] = {  # Peebles and Xie 2023, table 1
    "DiT-XL-2-256": DIT,
    "DiT-XL-2-512": DIT | {"sample_size": 64},
    "DiT-L-2-256": DIT | {"num_layers": 24, "attention_head_dim": 64},
    "DiT-B-2-256": DIT | {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64},
    "DiT-S-2-256": DIT | {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
}
SCHEDULER: dict[str, Any] = {  # facebook/DiT-XL-2-256, scheduler/scheduler_config.json
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
}


def random_names() -> list[str]:
    """The architectures there are, as MODEL on the command line."""
    return [PREFIX + name for name in CONFIGS]


def make_random(name: str) -> Adapter:
    """The adapter of `random:NAME`, float32, the same weights each time. Raises ModelError for an unknown NAME."""
    config = CONFIGS.get(name.removeprefix(PREFIX))
    if config is None:
        raise ModelError(f"no random model {name!r}; there are: {', '.join(random_names())}")
    return random_dit(config)


def random_dit(config: dict[str, Any], seed: int = 0) -> Adapter:
    """A DiT of `config`: normal weights, of deviation 1 / sqrt(inputs) in matrices and 0.02 in vectors.

    Drawn by NumPy, so that a schedule made on one machine fits the model of another. The blocks share one embedder, as
    all trained ones are equal; a copy for each, as diffusers loads them, would be a tenth of the memory.
    """
    from diffusers import DiTTransformer2DModel

    from hcompress.models.dit import DiT

    with torch.device("meta"):  # diffusers would draw every weight first
        network = DiTTransformer2DModel(**config)
    network.to_empty(device="cpu")
    network.pos_embed = DiTTransformer2DModel(**config | {"num_layers": 1}).pos_embed  # holds what is no weight
    first, *others = network.transformer_blocks
    for block in others:
        block.norm1.emb = first.norm1.emb
    rng = np.random.Generator(np.random.SFC64(seed))
    for weight in network.parameters():
        values = weight.detach().numpy()
        rng.standard_normal(dtype=np.float32, out=values)
        values *= 0.02 if values.ndim == 1 else math.prod(values.shape[1:]) ** -0.5
    return DiT(network)
