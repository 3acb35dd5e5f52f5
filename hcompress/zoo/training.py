"""The loop that trained the zoo's diffusion models on Fashion-MNIST, in pixel space, class-conditionally.

Predicts the noise (DDPM, Ho et al. 2020, eq. 14) under DiT's linear beta schedule; labels are replaced by the null
class 10 % of the time (Ho and Salimans 2022). The learning rate is constant and falls linearly to zero at the end of
each of a model's cycles (last step, length of the cool-down before it); to prolong the training, add a cycle. A run is
a folder: `checkpoint.pt` to resume from, `finished.pt` with the averaged weights of the last cycle that ended, and
`metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional

from hcompress.zoo.fashion import load_fashion
from hcompress_runtime.files import write_atomically

NULL_CLASS, NUM_TRAIN_TIMESTEPS = 10, 1000
BATCH, LEARNING_RATE, WARMUP_STEPS, EMA_DECAY, LABEL_DROPOUT = 128, 8e-4, 200, 0.999, 0.1
CHECKPOINT, FINISHED = "checkpoint.pt", "finished.pt"

Cycles = Sequence[tuple[int, int]]
Network = Any  # a diffusers model that takes (x, timestep, class_labels); diffusers ships no types


def scheduler() -> DDIMScheduler:
    """The scheduler stored with a model: linear betas, `leading` spacing, as diffusers' DiT-XL/2 checkpoints have."""
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="leading")


def learning_rate(step: int, cycles: Cycles) -> float:
    """Linear warm-up, constant, linear to zero over the cool-down of each cycle."""
    end, cooldown = next(cycle for cycle in cycles if step < cycle[0])
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (end - step) / cooldown)


def train(build: Callable[[], Network], cycles: Cycles, run: Path, seed: int) -> None:
    """Train to the end of the last cycle, from the last checkpoint in `run` where there is one."""
    steps = cycles[-1][0]
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    pixels, classes = load_fashion("train")
    images, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
    alpha_bar = scheduler().alphas_cumprod
    model = build()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rng = torch.Generator().manual_seed(seed)
    start, checkpoint = 0, run / CHECKPOINT
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        start = state["step"]
    forward = torch.compile(model)
    started, losses = time.monotonic(), []
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cycles)
        index = torch.randint(len(images), (BATCH,), generator=rng)
        x0, y = images[index], labels[index]
        y = torch.where(torch.rand(BATCH, generator=rng) < LABEL_DROPOUT, NULL_CLASS, y)
        t = torch.randint(NUM_TRAIN_TIMESTEPS, (BATCH,), generator=rng)
        eps = torch.randn(x0.shape, generator=rng)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted: Tensor = forward(a.sqrt() * x0 + (1 - a).sqrt() * eps, timestep=t, class_labels=y).sample
        loss = functional.mse_loss(predicted.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for average, live in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(live, 1 - decay)
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0 or done == steps:
            seconds = (time.monotonic() - started) / (done - start)
            record = {"step": done, "loss": sum(losses) / len(losses), "seconds_per_step": round(seconds, 3)}
            losses.clear()
            with (run / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(f"step {done}/{steps}  loss {record['loss']:.4f}  {seconds:.2f} s a step", flush=True)
        ended = any(done == end for end, _ in cycles)
        if done % 250 == 0 or ended:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"rng": rng.get_state(), "step": done}
            write_atomically(checkpoint, partial(torch.save, state))
        if ended:
            write_atomically(run / FINISHED, partial(torch.save, {"ema": ema.state_dict(), "step": done}))


def averaged(run: Path) -> tuple[dict[str, Tensor], int]:
    """Averaged weights of `run` and their step: those of the last finished cycle, or else of the last checkpoint."""
    finished = run / FINISHED
    state = torch.load(finished if finished.exists() else run / CHECKPOINT, weights_only=True)
    return state["ema"], state["step"]


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
        train(build, cycles, args.run, args.seed)
        return
    model = build()
    weights, step = averaged(args.run)
    model.load_state_dict(weights)
    finish(model)
    store(model, Path(__file__).parent / name)
    print(f"stored step {step}")
