"""Checkpoints as the authors of DiT and U-ViT published them, as folders that `load_model` takes.

    DiT    facebookresearch/DiT  DiT-XL-2-256x256.pt, or a checkpoint of its train.py, whose `ema` is taken
    U-ViT  baofff/U-ViT          imagenet256_uvit_huge.pth and so on; its text-to-image models are another family

Such a file holds tensors by name and no configuration: all of that is read off the shapes, but for the number of heads,
which is 16 at a width of 1152 and else a head for each 64, as in every published model. No VAE is in it either.

A U-ViT does not say what noise it was trained on. As published, those without the final convolution (U-ViT-H) have
Stable Diffusion's betas and times 1 .. 1000; all others have the continuous VP-SDE and are told 999 t, t in (0, 1]
(train_ldm_discrete.py, and sde.py, there). Its discretisation, beta = 0.1 .. 20 over 1000 steps, is DDPM's schedule.

diffusers' DiT computes its 128 sinusoids of the timestep at slightly other frequencies, 10000^(-i/127) instead of
10000^(-i/128). So converted, as in diffusers' own conversion, a DiT is what facebook/DiT-XL-2-256 is, and differs that
much from the authors' code.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from hcompress.errors import ModelError
from hcompress.models.uvit_network import UViT2DModel

State = Mapping[str, Tensor]

DIT_MARK, UVIT_MARK, UVIT_TEXT_MARK = "x_embedder.proj.weight", "in_blocks.0.norm1.weight", "context_embed.weight"
IMAGENET = 1000  # so many labels, and no null class, have U-ViT's 64-pixel models; all others have one label more
POSITIONS = 1e-3  # the sinusoids of the positions, of the order of 1, may be float16


def convert(path: Path, out: Path, heads: int | None = None) -> str:
    """Write the network in `path` to `out`/transformer and its scheduler to `out`/scheduler; returns what it is.

    heads: of its attention, where it is not as published

    The file is read without running any code in it. Raises ModelError where it is absent, damaged or something else.
    """
    state = _read(path)
    try:
        if DIT_MARK in state:
            network, scheduler = _dit(state, heads)
        elif UVIT_MARK in state and UVIT_TEXT_MARK not in state:
            network, scheduler = _uvit(state, heads)
        else:
            first = ", ".join(list(state)[:2]) or "nothing"
            raise ModelError(f"{path} is neither a DiT nor a U-ViT checkpoint of their authors; it holds {first}, ...")
    except KeyError as error:
        raise ModelError(f"{path} lacks {error.args[0]}; download it again") from error
    except (RuntimeError, ValueError) as error:  # load_state_dict: names or shapes
        raise ModelError(f"{path} does not fit together: {' '.join(str(error).split())[:300]}") from error
    try:
        network.save_pretrained(out / "transformer", safe_serialization=True)
        scheduler.save_pretrained(out / "scheduler")
    except OSError as error:
        raise ModelError(f"cannot write to {out}: {error.strerror or error}") from error
    config = network.config
    parameters = sum(tensor.numel() for tensor in state.values())
    return (
        f"{type(network).__name__}, {config.num_layers} blocks of width {network.inner_dim}, "
        f"{config.num_attention_heads} heads, {parameters / 1e6:.0f} M parameters, "
        f"{scheduler.config.beta_schedule} betas"
    )


def _read(path: Path) -> State:
    """The tensors of a checkpoint, averaged ones where it has them, in float32."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # what DiT's train.py keeps of its flags
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # not there, no zip, no pickle, or a pickle of something else: no common base
        reason = (
            "it is not there"
            if not path.is_file()
            else f"damaged, or holds code and was not run; {type(error).__name__}"
        )
        raise ModelError(
            f"cannot read {path} as a PyTorch checkpoint ({reason}); pass the authors' .pt or .pth"
        ) from error
    content = content.get("ema", content) if isinstance(content, dict) else {}
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path} holds no network's tensors by name; pass the file with the weights")
    return {name: value.float() for name, value in content.items()}


def _heads(width: int, heads: int | None) -> dict[str, int]:
    """Heads and their width."""
    heads = heads or (16 if width == 1152 else max(1, width // 64))
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}; pass --heads")
    return {"num_attention_heads": heads, "attention_head_dim": width // heads}


def _depth(state: State, blocks: str) -> int:
    """How many blocks `blocks`.0, `blocks`.1, ... there are."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


def _dit(state: State, heads: int | None) -> tuple[DiTTransformer2DModel, DDIMScheduler]:
    """Diffusers' names for the authors'. Each block gets the embedders, and the fused queries, keys and values part."""
    width, channels, patch, _ = state[DIT_MARK].shape
    layers = _depth(state, "blocks")
    network = DiTTransformer2DModel(
        **_heads(width, heads),
        num_layers=layers,
        in_channels=channels,
        out_channels=len(state["final_layer.linear.bias"]) // patch**2,
        patch_size=patch,
        sample_size=patch * math.isqrt(state["pos_embed"].shape[1]),
        num_embeds_ada_norm=len(state["y_embedder.embedding_table.weight"]) - 1,
        norm_eps=1e-6,
    )
    renamed = {"x_embedder.proj": "pos_embed.proj"}
    renamed |= {"final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
    emb = "norm1.emb"
    embedders = {"t_embedder.mlp.0": f"{emb}.timestep_embedder.linear_1"}
    embedders |= {"t_embedder.mlp.2": f"{emb}.timestep_embedder.linear_2"}
    embedders |= {"y_embedder.embedding_table": f"{emb}.class_embedder.embedding_table"}
    inside = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
    inside |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    weights: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        _, number, part = (*module.split(".", 2), "", "")[:3]
        if module in renamed:
            weights[f"{renamed[module]}.{kind}"] = value
        elif module in embedders:
            weights |= {f"transformer_blocks.{i}.{embedders[module]}.{kind}": value for i in range(layers)}
        elif part in inside:
            weights[f"transformer_blocks.{number}.{inside[part]}.{kind}"] = value
        elif part == "attn.qkv":
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                weights[f"transformer_blocks.{number}.attn1.to_{letter}.{kind}"] = third
        elif name != "pos_embed":
            raise ValueError(f"a DiT has no {name}")
    network.load_state_dict(weights)
    if (network.pos_embed.pos_embed - state["pos_embed"]).abs().max() > POSITIONS:
        raise ValueError("its pos_embed is not DiT's sinusoids, which diffusers computes")
    return network, DDIMScheduler(beta_schedule="linear", clip_sample=False)


def _uvit(state: State, heads: int | None) -> tuple[UViT2DModel, DDIMScheduler]:
    """The names are ours; the shapes are the configuration."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    labels = len(state["label_emb.weight"]) if "label_emb.weight" in state else 0
    null_class = labels not in (0, IMAGENET)
    tokens = state["pos_embed"].shape[1] - (2 if labels else 1)
    final_conv = "final_layer.weight" in state
    network = UViT2DModel(
        **_heads(width, heads),
        num_layers=2 * _depth(state, "in_blocks") + 1,
        in_channels=channels,
        sample_size=patch * math.isqrt(tokens),
        patch_size=patch,
        num_classes=labels - null_class,
        null_class=null_class,
        mlp_ratio=len(state["mid_block.mlp.fc1.bias"]) / width,
        attention_bias="mid_block.attn.qkv.bias" in state,
        time_mlp="time_embed.0.weight" in state,
        final_conv=final_conv,
        time_scale=0.999 if final_conv else 1.0,
        time_shift=0.999 if final_conv else 1.0,
    )
    network.load_state_dict(state)
    if final_conv:
        return network, DDIMScheduler(beta_schedule="linear", clip_sample=False)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return network, DDIMScheduler(**betas, clip_sample=False)
