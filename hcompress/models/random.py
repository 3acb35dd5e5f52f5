"""Published architectures with random weights: full size for exports, engines and timings, and no quality whatsoever.

`random:DiT-XL-2-256` costs, caches and exports like facebook/DiT-XL-2-256, but gives noise. What is drawn differs from
a fresh initialisation in that nothing is zero: every gate is open, so a reused branch changes the samples. Text models
get a few random prompts to train on.
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
PIXART = {  # PixArt-alpha/PixArt-XL-2-512x512, transformer/config.json
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 64,
    "patch_size": 2,
    "use_additional_conditions": False,
    "activation_fn": "gelu-approximate",
}
PIXART_CONFIGS: dict[str, dict[str, Any]] = {  # Chen et al. 2023 and 2024; Sigma's text is longer
    "PixArt-XL-2-256": PIXART | {"sample_size": 32},
    "PixArt-XL-2-512": PIXART,
    "PixArt-XL-2-1024": PIXART | {"sample_size": 128, "use_additional_conditions": True},
    "PixArt-Sigma-XL-2-1024": PIXART | {"sample_size": 128},
}
MEDIUM = {  # stabilityai/stable-diffusion-3-medium, transformer/config.json
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "in_channels": 16,
    "out_channels": 16,
    "sample_size": 128,
    "patch_size": 2,
    "pos_embed_max_size": 192,
}
SD3_CONFIGS: dict[str, dict[str, Any]] = {"SD3-Medium-512": MEDIUM | {"sample_size": 64}, "SD3-Medium-1024": MEDIUM}
PROMPTS = 8  # of a text model
SCHEDULER: dict[str, Any] = {  # facebook/DiT-XL-2-256, scheduler/scheduler_config.json; PixArt's noise is the same
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
FLOW: dict[str, Any] = {  # stabilityai/stable-diffusion-3-medium, scheduler/scheduler_config.json
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def random_names() -> list[str]:
    """The architectures there are, as MODEL on the command line."""
    return [PREFIX + name for name in (*CONFIGS, *PIXART_CONFIGS, *SD3_CONFIGS)]


def make_random(name: str) -> Adapter:
    """The adapter of `random:NAME`, float32, the same weights each time. Raises ModelError for an unknown NAME."""
    plain = name.removeprefix(PREFIX)
    if plain in CONFIGS:
        return random_dit(CONFIGS[plain])
    if plain in PIXART_CONFIGS:
        return random_pixart(PIXART_CONFIGS[plain], tokens=300 if "Sigma" in plain else 120)
    if plain in SD3_CONFIGS:
        return random_sd3(SD3_CONFIGS[plain])
    raise ModelError(f"no random model {name!r}; there are: {', '.join(random_names())}")


def random_scheduler(name: str) -> dict[str, Any]:
    """The scheduler's configuration of `random:NAME`."""
    return dict(FLOW if name.removeprefix(PREFIX) in SD3_CONFIGS else SCHEDULER)


def random_dit(config: dict[str, Any], seed: int = 0) -> Adapter:
    """A DiT of `config`: normal weights, of deviation 1 / sqrt(inputs) in matrices and 0.02 in vectors.

    Drawn by NumPy, so that a schedule made on one machine fits the model of another. The blocks share one embedder, as
    all trained ones are equal; a copy for each, as diffusers loads them, would be a tenth of the memory.
    """
    from diffusers import DiTTransformer2DModel

    from hcompress.models.dit import DiT

    network = _without_weights(DiTTransformer2DModel, config)
    first, *others = network.transformer_blocks
    for block in others:
        block.norm1.emb = first.norm1.emb
    _draw(network, np.random.Generator(np.random.SFC64(seed)))
    return DiT(network)


def random_pixart(config: dict[str, Any], seed: int = 0, *, tokens: int = 120) -> Adapter:
    """A PixArt of `config`, drawn like a DiT, with PROMPTS random prompts of `tokens` tokens and a null prompt."""
    from diffusers import PixArtTransformer2DModel

    from hcompress.models.pixart import PixArt

    network = _without_weights(PixArtTransformer2DModel, config)
    rng = np.random.Generator(np.random.SFC64(seed))
    _draw(network, rng)
    width = config.get("caption_channels") or config["cross_attention_dim"]
    lengths = rng.integers(2, tokens + 1, size=(PROMPTS, 1))
    prompts = {
        "prompt_embeds": rng.standard_normal((PROMPTS, tokens, width), dtype=np.float32),
        "prompt_mask": np.arange(tokens) < lengths,
        "null_embeds": rng.standard_normal((1, tokens, width), dtype=np.float32),
        "null_mask": np.arange(tokens)[None] < 1,
    }
    return PixArt(network, prompts)


def random_sd3(config: dict[str, Any], seed: int = 0, *, tokens: int = 333) -> Adapter:
    """A Stable Diffusion 3 of `config`, drawn like a DiT, with PROMPTS random prompts and a null prompt."""
    from diffusers import SD3Transformer2DModel

    from hcompress.models.sd3 import SD3

    network = _without_weights(SD3Transformer2DModel, config)
    rng = np.random.Generator(np.random.SFC64(seed))
    _draw(network, rng)
    embeds, pooled = (tokens, config["joint_attention_dim"]), (config["pooled_projection_dim"],)
    shapes = {"prompt_embeds": (PROMPTS, *embeds), "pooled_prompt_embeds": (PROMPTS, *pooled)}
    shapes |= {"null_embeds": (1, *embeds), "pooled_null_embeds": (1, *pooled)}
    prompts = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return SD3(network, prompts)


def _without_weights(family: Any, config: dict[str, Any]) -> Any:
    """The network with memory for its weights and nothing in it; diffusers would draw every weight first."""
    with torch.device("meta"):
        network = family(**config)
    network.to_empty(device="cpu")
    network.pos_embed = family(**config | {"num_layers": 1}).pos_embed  # holds what is no weight
    return network


def _draw(network: torch.nn.Module, rng: np.random.Generator) -> None:
    """Give every weight its values."""
    for weight in network.parameters():
        values = weight.detach().numpy()
        rng.standard_normal(dtype=np.float32, out=values)
        values *= 0.02 if values.ndim == 1 else math.prod(values.shape[1:]) ** -0.5
