"""Train `zoo:emoji-pixart`, a pixel-space text-to-image PixArt on captioned emoji, and store it as a diffusers folder.

    hcompress zoo fetch-data
    python -m hcompress.zoo.train_emoji_pixart --run runs/emoji-pixart            # train or resume
    python -m hcompress.zoo.train_emoji_pixart --run runs/emoji-pixart --store    # write hcompress/zoo/emoji-pixart

Predicts the velocity (Salimans and Ho 2022, appendix D) under the cosine schedule (Nichol and Dhariwal 2021, eq. 17),
which leaves small pictures legible for longer than the linear one. One caption in ten is replaced by the empty one
(Ho and Salimans 2022). MiniLM reads the captions once, into the run folder. One concept in ten is never shown.
The loop is that of hcompress/zoo/training.py. `--store` takes the averaged weights of the last cycle that ended, or
else of the last checkpoint, also while another process is training. Cost: 0.5 s a step on one CPU core that is free.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor
from torch.nn import functional

from hcompress.errors import DataError
from hcompress.prompts_file import Encoded
from hcompress.text_encoder import TextEncoder
from hcompress.zoo import data_folder
from hcompress.zoo.emoji import SIZE, Emoji, load_emoji
from hcompress.zoo.training import Loss, Network, averaged, train
from hcompress_runtime.files import write_atomically

TOKENS, NUM_TRAIN_TIMESTEPS = 20, 1000  # the longest caption has 17
CYCLES = ((2500, 700), (5500, 2000), (12000, 3000))  # (last step, length of the cool-down before it)
BATCH, LEARNING_RATE, CAPTION_DROPOUT = 64, 6e-4, 0.1
PROMPTS = 128  # of the model's own; every fourth is of a held-out concept
FOLDER = Path(__file__).parent / "emoji-pixart"
STORED = "stored.json"  # a file of a run


def scheduler() -> DPMSolverMultistepScheduler:
    """The scheduler stored with the model: DPM-Solver++(2M) on cosine betas, for a network that gives velocities."""
    return DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def build() -> PixArtTransformer2DModel:
    """The network with PixArt's initialisation (Chen et al. 2023: cross-attention and the last layer start at zero)."""
    model = PixArtTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=10,
        cross_attention_dim=160,
        caption_channels=384,
        sample_size=SIZE,
        patch_size=4,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    patchify = model.pos_embed.proj.weight
    torch.nn.init.xavier_uniform_(patchify.view(len(patchify), -1))
    clock, text = model.adaln_single.emb.timestep_embedder, model.caption_projection
    for linear in (clock.linear_1, clock.linear_2, model.adaln_single.linear, text.linear_1, text.linear_2):
        torch.nn.init.normal_(linear.weight, std=0.02)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model.eval()  # no dropout of diffusers' own: captions are dropped here


def caption_states(run: Path, captions: list[str]) -> dict[str, Tensor]:
    """The tensors of a prompts file for `captions`; embeddings as fp16. Kept in `run`."""
    path = run / "captions.safetensors"
    if not path.exists():
        tensors = Encoded(TextEncoder(data_folder() / "minilm"), captions, TOKENS).tensors()
        write_atomically(path, save({name: _half(array) for name, array in tensors.items()}))
    states = {name: torch.from_numpy(array) for name, array in load_file(path).items()}
    if len(states["prompt_embeds"]) != len(captions):
        raise DataError(f"{path} belongs to other data; delete it to have the captions encoded again")
    return states


def loss_of_velocity(run: Path) -> Loss:
    """Mean squared error of the predicted velocity on random captioned emoji; what MiniLM made of them is in `run`."""
    emoji = load_emoji()
    text = caption_states(run, emoji.captions)
    shown = torch.from_numpy(np.flatnonzero(~emoji.held_out))
    images = torch.from_numpy(emoji.images).permute(0, 3, 1, 2).contiguous()
    alpha_bar = scheduler().alphas_cumprod

    def loss(forward: Network, rng: torch.Generator) -> Tensor:
        index = shown[torch.randint(len(shown), (BATCH,), generator=rng)]
        x0 = images[index].float() / 127.5 - 1
        dropped = torch.rand(BATCH, generator=rng) < CAPTION_DROPOUT
        states = torch.where(dropped[:, None, None], text["null_embeds"], text["prompt_embeds"][index]).float()
        mask = torch.where(dropped[:, None], text["null_mask"], text["prompt_mask"][index])
        t = torch.randint(NUM_TRAIN_TIMESTEPS, (BATCH,), generator=rng)
        eps = torch.randn(x0.shape, generator=rng)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted: Tensor = forward(
                a.sqrt() * x0 + (1 - a).sqrt() * eps,
                timestep=t,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        return functional.mse_loss(predicted.float(), a.sqrt() * eps - (1 - a).sqrt() * x0)

    return loss


def trainable() -> PixArtTransformer2DModel:
    """`build`, with plain products for attention: the CPU's fused attention is 8 times slower backwards."""
    model = build()
    model.set_attn_processor(AttnProcessor())
    return model


def own_prompts(emoji: Emoji) -> list[int]:
    """Indices of PROMPTS images whose captions are stored with the model, of as many concepts, in styles by turns."""
    rng = np.random.default_rng(0)
    seen, held_out = (rng.permutation(np.unique(emoji.concepts[emoji.held_out == kept])) for kept in (False, True))
    chosen = []
    for number in range(PROMPTS):
        concept = held_out[number // 4] if number % 4 == 3 else seen[number]
        drawn = np.flatnonzero(emoji.concepts == concept)
        chosen.append(int(drawn[number % len(drawn)]))
    return chosen


def store(run: Path, folder: Path) -> None:
    """Write the averaged weights of `run` to `folder` as fp16 safetensors in diffusers' layout, and prompts to try."""
    emoji = load_emoji()
    text = load_file(run / "captions.safetensors")
    chosen = own_prompts(emoji)
    weights, step = averaged(run)
    model = build()
    model.load_state_dict(weights)
    model.half().save_pretrained(folder / "transformer", safe_serialization=True)
    scheduler().save_pretrained(folder / "scheduler")
    prompts = {name: array[chosen] if name.startswith("prompt") else array for name, array in text.items()}
    write_atomically(folder / "prompts.safetensors", save(prompts))
    lines = [emoji.captions[i] + (" (held out)" if emoji.held_out[i] else "") for i in chosen]
    write_atomically(folder / "prompts.txt", "".join(f"{line}\n" for line in lines).encode())
    write_atomically(run / STORED, json.dumps({"step": step}).encode())
    print(f"stored step {step}")


def _half(array: NDArray[Any]) -> NDArray[Any]:
    """fp16 where float: what the states lose is less than bf16 loses in the first product."""
    return array.astype(np.float16) if array.dtype == np.float32 else array


def main() -> None:
    """Parse, then train or store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help="train no further; write hcompress/zoo/emoji-pixart")
    args = parser.parse_args()
    if args.store:
        store(args.run, FOLDER)
    else:
        train(trainable, loss_of_velocity(args.run), CYCLES, LEARNING_RATE, args.run, args.seed)


if __name__ == "__main__":
    main()
