"""Train `zoo:fashion-dit`, a class-conditional pixel-space DiT on Fashion-MNIST, and store it as a diffusers folder.

    python -m hcompress.zoo.train_fashion_dit --run runs/fashion-dit            # train or resume
    python -m hcompress.zoo.train_fashion_dit --run runs/fashion-dit --store    # and write hcompress/zoo/fashion-dit

Cost: about 0.9 s a step on one CPU core, 0.5 s on two. Predicts the noise (DDPM, Ho et al. 2020, eq. 14) under DiT's
linear beta schedule; labels are replaced by the null class 10 % of the time (Ho and Salimans 2022). The learning rate
is constant and falls linearly to zero at the end of each of CYCLES; to prolong the training, add a cycle. One embedder
serves all blocks (as in the original DiT); storing copies it into each, which is diffusers' layout.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor
from torch.nn import functional

from hcompress.zoo.fashion import load_fashion
from hcompress_runtime.files import write_atomically

NULL_CLASS, NUM_TRAIN_TIMESTEPS = 10, 1000
CYCLES = ((4300, 1500), (8500, 2000))  # (last step, length of the cool-down before it)
BATCH, LEARNING_RATE, WARMUP_STEPS, EMA_DECAY, LABEL_DROPOUT = 128, 8e-4, 200, 0.999, 0.1


def scheduler() -> DDIMScheduler:
    """The scheduler stored with the model: linear betas, `leading` spacing, as diffusers' DiT-XL/2 checkpoints have."""
    return DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="leading")


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


def learning_rate(step: int) -> float:
    """Linear warm-up, constant, linear to zero over the cool-down of each cycle."""
    end, cooldown = next(cycle for cycle in CYCLES if step < cycle[0])
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (end - step) / cooldown)


def train(run: Path, seed: int) -> None:
    """Train to the end of the last cycle, from the last checkpoint in `run` where there is one."""
    steps = CYCLES[-1][0]
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    pixels, classes = load_fashion("train")
    images, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
    alpha_bar = scheduler().alphas_cumprod
    model = build()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rng = torch.Generator().manual_seed(seed)
    start, checkpoint = 0, run / "checkpoint.pt"
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
            group["lr"] = learning_rate(step)
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
        if done % 250 == 0 or done == steps:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"rng": rng.get_state(), "step": done}
            write_atomically(checkpoint, partial(torch.save, state))


def store(run: Path, folder: Path) -> None:
    """Write the averaged weights of `run` to `folder` as fp16 safetensors in diffusers' layout."""
    model = build()
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["ema"])
    for block in model.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)  # safetensors refuses tensors that share memory
    model.half().save_pretrained(folder / "transformer", safe_serialization=True)
    scheduler().save_pretrained(folder / "scheduler")


def main() -> None:
    """Parse, train, and store when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", action="store_true", help="also write hcompress/zoo/fashion-dit")
    args = parser.parse_args()
    train(args.run, args.seed)
    if args.store:
        store(args.run, Path(__file__).parent / "fashion-dit")


if __name__ == "__main__":
    main()
