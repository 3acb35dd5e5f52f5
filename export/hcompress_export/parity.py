"""Does the bundle compute what the reference sampler computes? Chained over all calls, errors included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcompress.adapter import Adapter
from hcompress.errors import BundleError
from hcompress.files import write_atomically
from hcompress.sampling import sample, solver_noises, start_noise
from hcompress_runtime.images import png
from hcompress_runtime.runtime import Runtime

PREVIEW = "preview.png"
TOLERANCE = 1e-3  # float32 rounding, amplified by guidance and summed over the calls, stays below 1e-4 in practice


def parity(
    adapter: Adapter,
    runtime: Runtime,
    labels: Sequence[int],
    compute: NDArray[np.bool_] | None = None,
    *,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Largest difference of the latents, float64[T + 1]: what each call is given, then the finished samples.

    Absolute, and where latents exceed 1 relative to the largest of them.
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
    return np.array([np.abs(ours - other).max() / max(1.0, np.abs(ours).max()) for ours, other in pairs])


def prove(adapter: Adapter, folder: Path, compute: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """The `parity` of the bundle in `folder` over a sample of each class (ten at most); leaves them as preview.png.

    Raises BundleError where it exceeds TOLERANCE: such a bundle must not be used. Latents get no picture.
    """
    with Runtime(folder) as runtime:
        labels = range(min(10, runtime.bundle.num_classes))
        errors = parity(adapter, runtime, labels, compute)
        if not errors.max() <= TOLERANCE:
            raise BundleError(
                f"ONNX Runtime's samples differ from PyTorch's by {errors.max():.1e} at call {errors.argmax()} "
                f"({TOLERANCE:.0e} is allowed); nothing was written. This is a bug: please report it with this bundle"
            )
        if runtime.bundle.sample_shape[0] in (1, 3):
            write_atomically(folder / PREVIEW, png(runtime.generate(labels)))
    return errors
