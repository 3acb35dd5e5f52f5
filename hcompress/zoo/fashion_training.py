"""How the zoo's models of Fashion-MNIST were trained, in pixel space, class-conditionally.

They predict the noise (DDPM, Ho et al. 2020, eq. 14) under DiT's linear beta schedule; labels are replaced by the null
class 10 % of the time (Ho and Salimans 2022). The loop is that of hcompress/zoo/training.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional

from hcompress.zoo.fashion import load_fashion
from hcompress.zoo.training import Cycles, Loss, Network, averaged, train

NULL_CLASS, NUM_TRAIN_TIMESTEPS = 10, 1000
BATCH, LEARNING_RATE, LABEL_DROPOUT = 128, 8e-4, 0.1


def scheduler() -> DDIMScheduler:
    """The scheduler stored with a model: linear betas, `leading` spacing, as diffusers' DiT-XL/2 checkpoints have."""
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="leading")


def loss_of_noise() -> Loss:
    """Mean squared error of the predicted noise on random training images."""
    pixels, classes = load_fashion("train")
    images, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
    alpha_bar = scheduler().alphas_cumprod

    def loss(forward: Network, rng: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (BATCH,), generator=rng)
        x0, y = images[index], labels[index]
        y = torch.where(torch.rand(BATCH, generator=rng) < LABEL_DROPOUT, NULL_CLASS, y)
        t = torch.randint(NUM_TRAIN_TIMESTEPS, (BATCH,), generator=rng)
        eps = torch.randn(x0.shape, generator=rng)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted: Tensor = forward(a.sqrt() * x0 + (1 - a).sqrt() * eps, timestep=t, class_labels=y).sample
        return functional.mse_loss(predicted.float(), eps)

    return loss


def store(model: Network, folder: Path) -> None:
    """Write `model` to `folder` as fp16 safetensors in diffusers' layout, with its scheduler."""
    model.half().save_pretrained(folder / "transformer", safe_serialization=True)
    scheduler().save_pretrained(folder / "scheduler")


def main(
    doc: str | None,
    name: str,
    build: Callable[[], Network],
    cycles: Cycles,
    finish: Callable[[Network], None] = lambda model: None,
) -> None:
    """The command of one model: train, or with --store write hcompress/zoo/NAME, `finish` applied to it before."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help=f"train no further, write hcompress/zoo/{name}")
    args = parser.parse_args()
    if not args.store:
        train(build, loss_of_noise(), cycles, LEARNING_RATE, args.run, args.seed)
        return
    model = build()
    weights, step = averaged(args.run)
    model.load_state_dict(weights)
    finish(model)
    store(model, Path(__file__).parent / name)
    print(f"stored step {step}")
