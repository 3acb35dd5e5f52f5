"""Does the bundle compute what the reference sampler computes? Chained over all calls, errors included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcompress.adapter import Adapter
from hcompress.sampling import sample, solver_noises, start_noise
from hcompress_runtime.runtime import Runtime

TOLERANCE = 1e-3  # float32 rounding, amplified by guidance and summed over the calls, stays below 1e-4 in practice


def parity(
    adapter: Adapter,
    runtime: Runtime,
    labels: Sequence[int],
    compute: NDArray[np.bool_] | None = None,
    *,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Largest absolute difference of the latents, float64[T + 1]: the input of each call, then the finished sample.

    compute: bool[T, N] that the bundle was frozen from; None is the dense model.
    """
    given: list[NDArray[np.float32]] = []

    def record(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(inputs[0][: len(labels)].cpu().numpy())  # guidance stacks two equal halves

    table, cfg = runtime.bundle.table, runtime.bundle.cfg
    streams = range(len(labels))
    start, noises = start_noise(adapter, seed, streams), solver_noises(adapter, table, seed, streams)
    with adapter.register_forward_pre_hook(record):
        condition = adapter.label_condition([*labels])
        finished = sample(adapter, table, condition, start, cfg=cfg, compute=compute, noises=noises)
    theirs: list[NDArray[np.float32]] = []
    runtime.generate(labels, seed, batch=len(labels), on_step=lambda call, x: theirs.append(x))
    pairs = zip([*given, finished.cpu().numpy()], theirs, strict=True)
    return np.array([np.abs(ours - other).max() for ours, other in pairs])
