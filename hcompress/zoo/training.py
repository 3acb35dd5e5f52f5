"""The loop that trained the zoo's diffusion models: AdamW in bfloat16, with averaged weights and cycles.

The learning rate is constant and falls linearly to zero at the end of each of a model's cycles (last step, length of
the cool-down before it); to prolong the training, add a cycle. A run is a folder: `checkpoint.pt` to resume from,
`finished.pt` with the averaged weights of the last cycle that ended, and `metrics.jsonl`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcompress.errors import DataError
from hcompress_runtime.files import write_atomically

WARMUP_STEPS, EMA_DECAY = 200, 0.999
CHECKPOINT, FINISHED = "checkpoint.pt", "finished.pt"  # files of a run

Cycles = Sequence[tuple[int, int]]
Network = Any  # a diffusers model; diffusers ships no types
Loss = Callable[[Network, torch.Generator], Tensor]
"""(the compiled network, where all chance comes from) -> the loss of one step."""


def learning_rate(step: int, cycles: Cycles, most: float) -> float:
    """Linear warm-up to `most`, constant, linear to zero over the cool-down of each cycle."""
    end, cooldown = next(cycle for cycle in cycles if step < cycle[0])
    return most * min(1.0, (step + 1) / WARMUP_STEPS, (end - step) / cooldown)


def train(build: Callable[[], Network], loss_of: Loss, cycles: Cycles, most: float, run: Path, seed: int) -> None:
    """Train to the end of the last cycle, from the last checkpoint in `run` where there is one.

    most: the highest learning rate
    """
    steps = cycles[-1][0]
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = build()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=most, weight_decay=0.0, fused=True)
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
            group["lr"] = learning_rate(step, cycles, most)
        loss = loss_of(forward, rng)
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
    """Averaged weights of `run` and their step: those of the last finished cycle, or else of the last checkpoint.

    Raises DataError where there is neither.
    """
    trained = run / (FINISHED if (run / FINISHED).exists() else CHECKPOINT)
    if not trained.exists():
        raise DataError(f"no {trained}; train first, checkpoints come every 250 steps")
    state = torch.load(trained, weights_only=True)
    return state["ema"], state["step"]
