"""Does the bundle compute what the reference sampler computes?

Asked twice. Call by call: each graph is given the reference's latents, with the slots that the bundle's own earlier
calls wrote, so that the first tensor to drift names the graph at fault. And chained: a whole generation, errors
included. The two differ: at low noise a network's output answers to a rounding of its input a hundredfold, and the
solver weighs it down again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hcompress.adapter import Adapter
from hcompress.corrections import Corrections
from hcompress.errors import BundleError
from hcompress.sampling import corrected, solver_noises, start_noise, terms_of, trajectory
from hcompress_runtime.bundle import Bundle
from hcompress_runtime.conditions import Given, Rows, complete, example, take
from hcompress_runtime.engine import Value
from hcompress_runtime.files import write_atomically
from hcompress_runtime.images import png
from hcompress_runtime.runtime import Runtime

Walk = Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]]]
"""x_T -> what `trajectory` yields."""
PREVIEW = "preview.png"
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative. Float32 rounding, amplified by guidance and summed over the calls, stays below 3e-5 in practice."""
QUANTIZED, NUDGE = 1e-3, 4
"""Relative, for a bundle in few bits, where ties do not decide; and how many roundings its start is moved by to see."""


@dataclass(frozen=True)
class Drift:
    """How far one tensor of one call is from the reference.

    call:   model call, as executed; T for the finished samples
    tensor: "model_output" and "cache_out.<slot>", call by call; "latent" (what the call is given) and "sample", chained
    error:  largest difference, relative to the largest value of the reference
    """

    call: int
    tensor: str
    error: float


def drifts(
    adapter: Adapter,
    runtime: Runtime,
    labels: Given,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
    *,
    seed: int = 0,
) -> list[Drift]:
    """Every tensor that passes between the calls of a generation, in the order of execution.

    labels:  or arrays, as `Runtime.generate` takes them
    compute: bool[T, N] that the bundle was frozen from; None is the dense model
    corrections: that it was frozen with
    """
    rows, start, noises, walk = _reference(adapter, runtime.bundle, labels, compute, corrections, seed)
    table, chained = runtime.bundle.table, list[NDArray[np.float32]]()
    runtime.generate(rows, seed, batch=len(start), on_step=lambda call, x: chained.append(x))
    outputs = list[torch.Tensor]()
    held: dict[str, Value] = {}
    older: dict[int, torch.Tensor] = {}
    terms = terms_of(corrections, table.num_calls, adapter.device, adapter.dtype)
    given = {name: runtime.put(array) for name, array in rows.items()}
    found = []
    for call, (x, output, slots) in enumerate(walk(start)):
        outputs.append(output)
        noise = table.noise_input(call, [*map(_array, noises)], tuple(x.shape))
        now = given | {name: runtime.put(array) for name, array in noise.items()}
        got, written = runtime.step(call, runtime.put(_array(x)), now, held)
        want = {name: slots[index] for index, name in enumerate(adapter.graph.names) if name in written}
        for name in want.keys() & {*runtime.bundle.plan.steps[call].corrects}:  # finished: what the next call yields
            branch = adapter.graph.names.index(name)
            want[name] = corrected(want[name], older.get(branch), terms[call + 1][branch])
        arrays = {f"cache_out.{name}": (runtime.to_numpy(value), want[name]) for name, value in written.items()}
        arrays |= {"model_output": (runtime.to_numpy(got), output)}
        found.append(Drift(call, "latent", _relative(chained[call], x)))
        found += [Drift(call, name, _relative(array, reference)) for name, (array, reference) in arrays.items()]
        older = dict(slots)
    finished = table.combine(table.num_calls, start, outputs, noises)
    return [*found, Drift(table.num_calls, "sample", _relative(chained[-1], finished))]


def _reference(
    adapter: Adapter,
    bundle: Bundle,
    labels: Given,
    compute: NDArray[np.bool_] | None,
    corrections: Corrections | None,
    seed: int,
) -> tuple[Rows, torch.Tensor, list[torch.Tensor], Walk]:
    """What PyTorch generates a bundle's samples from: conditions, x_T, noises, and the calls from an x_T."""
    rows = complete(bundle.conditions, labels)
    streams = range(len(next(iter(rows.values()))))
    rows = take(rows, streams)
    start, noises = start_noise(adapter, seed, streams), solver_noises(adapter, bundle.table, seed, streams)
    walk = partial(
        trajectory,
        adapter,
        bundle.table,
        adapter.condition(rows),
        cfg=bundle.cfg,
        compute=compute,
        corrections=corrections,
        noises=noises,
    )
    return rows, start, noises, walk


def parity(
    adapter: Adapter,
    runtime: Runtime,
    labels: Given,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
    *,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The drift of the latents, float64[T + 1]: what each call is given, then the finished samples."""
    return _latents(drifts(adapter, runtime, labels, compute, corrections, seed=seed))


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()


def _relative(got: NDArray[np.float32], reference: torch.Tensor) -> float:
    """NaN where either holds one."""
    want = _array(reference)
    scale = max(float(np.abs(want).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(got.reshape(want.shape) - want).max() / scale)


def allowed(
    adapter: Adapter,
    runtime: Runtime,
    labels: Given,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
    *,
    seed: int = 0,
) -> float:
    """The tolerance for `drifts` with the same arguments: TOLERANCE, or in few bits what PyTorch itself allows.

    An input that lies between two steps of its grid goes to either by the last bit of the arithmetic before it. What it
    moves moves others across their ties, so after some layers two correct implementations are as far apart as
    rounding to the grid moves the network at all (2 % of a branch on zoo:fashion-dit). How far that is, PyTorch tells:
    a start that is a few roundings away moves its own trajectory, and a bundle may be twice as far from it.
    """
    bundle, limit = runtime.bundle, TOLERANCE[runtime.bundle.dtype]
    if not bundle.manifest.get("quantized"):
        return limit
    _, start, _, walk = _reference(adapter, bundle, labels, compute, corrections, seed)
    one, other = walk(start), walk((1 + NUDGE * torch.finfo(adapter.dtype).eps) * start)
    own = max(QUANTIZED, limit)
    for (_, output, slots), (_, moved, theirs) in zip(one, other, strict=True):
        pairs = [(output, moved), *((slots[index], theirs[index]) for index in slots)]
        own = max(own, *(2 * _relative(_array(after), before) for before, after in pairs))
    return own


def first_drift(found: Sequence[Drift], tolerance: float) -> Drift | None:
    """The first in the order of execution that exceeds `tolerance`, or is NaN."""
    return next((drift for drift in found if not drift.error <= tolerance), None)


def prove(
    adapter: Adapter,
    folder: Path,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
) -> NDArray[np.float64]:
    """The `parity` of the bundle in `folder` over a sample of each class (ten at most); leaves them as preview.png.

    Where there are no classes it is over two samples of made-up embeddings.
    Raises BundleError where something exceeds TOLERANCE: such a bundle must not be used. Latents without a decoder get
    no picture.
    """
    with Runtime(folder) as runtime:
        inputs = runtime.bundle.conditions
        given = example(inputs, min(10, inputs["labels"].classes or 1) if "labels" in inputs else 2)
        found = drifts(adapter, runtime, given, compute, corrections)
        tolerance = allowed(adapter, runtime, given, compute, corrections)
        if drift := first_drift(found, tolerance):
            raise BundleError(
                f"ONNX Runtime and PyTorch differ by {drift.error:.1e} in {drift.tensor} of call {drift.call} "
                f"({tolerance:.0e} is allowed); nothing was written. This is a bug: please report it with this bundle"
            )
        pictures = runtime.pictures(runtime.generate(given))
        if pictures.shape[1] in (1, 3):
            write_atomically(folder / PREVIEW, png(pictures))
    return _latents(found)


def _latents(found: Sequence[Drift]) -> NDArray[np.float64]:
    return np.array([drift.error for drift in found if drift.tensor in ("latent", "sample")])
