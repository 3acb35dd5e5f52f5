"""Does the bundle compute what the reference sampler computes?

Asked twice. Call by call: each graph is given the reference's latents, with the slots that the bundle's own earlier
calls wrote, so that the first tensor to drift names the graph at fault. And chained: a whole generation, errors
included. The two differ: at low noise a network's output answers to a rounding of its input a hundredfold, and the
solver weighs it down again.

What is allowed is TOLERANCE, except where layers in few bits round their inputs. Then the last bit decides ties, and

- call by call, PyTorch rounds the values that the bundle rounds, and each of them is compared (rounded.py): TOLERANCE
  again. W8A8 of zoo:fashion-dit is within 2e-6; a thousandth on its step sizes makes 2e-2, those of the next call 2.
- chained, a start that is a few roundings away moves PyTorch's own latents, and a bundle may be SPREAD times as far.
- in a half, or on engines of TensorRT, graphs do not show what they round. One limit is for all then, the chained one
  or twice as far as outputs and slots are moved: only a blunder exceeds it, and step sizes that are not the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hcompress.adapter import Adapter
from hcompress.corrections import Corrections
from hcompress.errors import BundleError
from hcompress.sampling import (
    Older,
    Slots,
    constants_of,
    corrected,
    solver_noises,
    start_noise,
    store,
    terms_of,
    trajectory,
)
from hcompress_export.rounded import given_by, readers, rounding, shown
from hcompress_runtime.bundle import SCALES, UPDATE, Bundle
from hcompress_runtime.conditions import Given, Rows, complete, example, take
from hcompress_runtime.engine import Value
from hcompress_runtime.files import write_atomically
from hcompress_runtime.images import png
from hcompress_runtime.ort import OnnxRuntime
from hcompress_runtime.runtime import Runtime
from hcompress_runtime.table import SolverTable

Walk = Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]]]
"""x_T -> what `trajectory` yields."""
PREVIEW = "preview.png"
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative. Float32 rounding, amplified by guidance and summed over the calls, stays below 3e-5 in practice."""
QUANTIZED, NUDGE, SPREAD = 1e-3, 4, 10
"""Relative, chained, in few bits, where ties do not decide; how many roundings a start is moved by to see whether they
do; and how often as far a bundle may be: 135 of zoo models, in three formats, were 0 to 4 times as far."""
CHAINED, INPUT, STEP = ("latent", "sample"), "input.", f"step.{SCALES}"
"""Tensors of a whole generation, inputs that are rounded, and what they are rounded by, as `Drift` calls them."""


@dataclass(frozen=True)
class Drift:
    """How far one tensor of one call is from the reference.

    call:    model call, as executed; T for the finished samples
    tensor:  call by call "input.<layer>" (what a layer in few bits rounds; by its first reader), "cache_out.<slot>" and
             "model_output"; chained "latent" (what the call is given) and "sample"; "step.activation_scales", step by
             step size
    error:   largest difference, relative to the largest value of the reference
    allowed: how large that may be
    """

    call: int
    tensor: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether it is within what is allowed; NaN is not."""
        return self.error <= self.allowed


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
    reference, bundle = _reference(adapter, runtime.bundle, labels, compute, corrections, seed), runtime.bundle
    ties = bool(readers(adapter.network))
    show = ties and bundle.dtype == "float32" and isinstance(runtime.engines[UPDATE], OnnxRuntime)
    got = list[NDArray[np.float32]]()
    runtime.generate(reference.rows, seed, batch=len(reference.start), on_step=lambda call, x: got.append(x))
    each = chained = TOLERANCE[bundle.dtype]
    found = list[Drift]()
    if ties:
        found += _step_sizes(adapter, bundle)
        latents, moved, outputs = _moved(reference, adapter.dtype)
        chained = max(QUANTIZED, chained, SPREAD * moved, 0.0 if show else 2 * outputs)
        each = each if show else chained
    with shown(runtime) if show else nullcontext(runtime) as stepping:
        by_call, given = _by_call(adapter, stepping, reference, corrections, each)
    want = latents if ties else given
    names = [*["latent"] * (len(want) - 1), "sample"]
    for call, (name, array, x) in enumerate(zip(names, got, want, strict=True)):
        found.append(Drift(call, name, _relative(array, x), chained))
    return sorted([*found, *by_call], key=lambda drift: drift.call)


def _step_sizes(adapter: Adapter, bundle: Bundle) -> list[Drift]:
    """The step sizes of each call, float32 in every bundle; what a call is fed is another question."""
    want = [row[SCALES].detach().cpu().numpy() for row in constants_of(adapter, bundle.table)]
    rows = bundle.constants[SCALES]
    errors = [float(np.abs(rows[call] / sizes - 1).max()) for call, sizes in enumerate(want)]
    return [Drift(call, STEP, error, TOLERANCE["float32"]) for call, error in enumerate(errors)]


def _by_call(
    adapter: Adapter, runtime: Runtime, reference: _Reference, corrections: Corrections | None, allowed: float
) -> tuple[list[Drift], list[torch.Tensor]]:
    """What each call writes, given the reference's latents, and those; what graphs show that they round, it rounds."""
    _, rows, start, noises, walk = reference
    table, inputs = runtime.bundle.table, readers(adapter.network)
    held: dict[str, Value] = {}
    computed: Slots = {}
    older: Older = {}
    terms = terms_of(corrections, table.num_calls, adapter.device, adapter.dtype)
    given = {name: runtime.put(array) for name, array in rows.items()}
    calls, latents, outputs, found = walk(start), list[torch.Tensor](), list[torch.Tensor](), list[Drift]()
    for call in range(table.num_calls):
        latents.append(table.combine(call, start, outputs, noises))
        noise = table.noise_input(call, [*map(_array, noises)], tuple(start.shape))
        now = given | {name: runtime.put(array) for name, array in noise.items()}
        results, seen = dict[str, Value](), dict[int, torch.Tensor]()
        got, written = runtime.step(call, runtime.put(_array(latents[-1])), now, held, results)
        rounded = given_by(runtime, results)
        with rounding(adapter.network, rounded, seen):
            _, output, slots = next(calls)
        outputs.append(output)
        for index, value in slots.items():
            if value is not computed.get(index):  # so it was at this call
                store(computed, index, value, older, 2)
        want = {name: slots[index] for index, name in enumerate(adapter.graph.names) if name in written}
        for name in want.keys() & {*runtime.bundle.plan.steps[call].corrects}:  # finished: what the next call yields
            branch = adapter.graph.names.index(name)
            want[name] = corrected(want[name], older.get(branch, ()), terms[call + 1][branch])
        arrays = {f"{INPUT}{inputs[column]}": (rounded[column], x) for column, x in seen.items()}
        arrays |= {f"cache_out.{name}": (runtime.to_numpy(value), want[name]) for name, value in written.items()}
        arrays |= {"model_output": (runtime.to_numpy(got), output)}
        found += [Drift(call, name, _relative(array, x), allowed) for name, (array, x) in arrays.items()]
    return found, [*latents, table.combine(table.num_calls, start, outputs, noises)]


def _moved(reference: _Reference, dtype: torch.dtype) -> tuple[list[torch.Tensor], float, float]:
    """The reference's latents; how far a start a few roundings away moves those, and outputs and slots."""
    table, _, start, noises, walk = reference
    starts = (start, (1 + NUDGE * torch.finfo(dtype).eps) * start)
    latents, outputs, moved = list[torch.Tensor](), (list[torch.Tensor](), list[torch.Tensor]()), 0.0
    far = list[float]()
    for (x, output, slots), (near, other, others) in zip(*map(walk, starts), strict=True):
        latents.append(x)
        far.append(_relative(_array(near), x))
        for kept, one in zip(outputs, (output, other), strict=True):
            kept.append(one)
        pairs = [(output, other), *((slots[index], others[index]) for index in slots)]
        moved = max(moved, *(_relative(_array(after), before) for before, after in pairs))
    finished, nudged = (table.combine(table.num_calls, *both, noises) for both in zip(starts, outputs, strict=True))
    return [*latents, finished], max(*far, _relative(_array(nudged), finished)), moved


class _Reference(NamedTuple):
    """What PyTorch generates a bundle's samples from: solver, conditions, x_T, noises, and the calls from an x_T."""

    table: SolverTable
    rows: Rows
    start: torch.Tensor
    noises: list[torch.Tensor]
    walk: Walk


def _reference(
    adapter: Adapter,
    bundle: Bundle,
    labels: Given,
    compute: NDArray[np.bool_] | None,
    corrections: Corrections | None,
    seed: int,
) -> _Reference:
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
    return _Reference(bundle.table, rows, start, noises, walk)


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
    """NaN where either holds one, infinite where they do not hold as many values."""
    want = _array(reference)
    if got.size != want.size:
        return float("inf")
    scale = max(float(np.abs(want).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(got.reshape(want.shape) - want).max() / scale)


def first_drift(found: Sequence[Drift]) -> Drift | None:
    """The first in the order of execution that does not hold."""
    return next((drift for drift in found if not drift.holds), None)


def prove(
    adapter: Adapter,
    folder: Path,
    compute: NDArray[np.bool_] | None = None,
    corrections: Corrections | None = None,
) -> NDArray[np.float64]:
    """The `parity` of the bundle in `folder` over a sample of each class (ten at most); leaves them as preview.png.

    Where there are no classes it is over two samples of made-up embeddings.
    Raises BundleError where something exceeds what is allowed: such a bundle must not be used. Latents without a
    decoder get no picture.
    """
    with Runtime(folder) as runtime:
        inputs = runtime.bundle.conditions
        given = example(inputs, min(10, inputs["labels"].classes or 1) if "labels" in inputs else 2)
        found = drifts(adapter, runtime, given, compute, corrections)
        if drift := first_drift(found):
            raise BundleError(
                f"ONNX Runtime and PyTorch differ by {drift.error:.1e} in {drift.tensor} of call {drift.call}, where "
                f"{drift.allowed:.0e} is allowed; nothing was written. This is a bug: please report it with this bundle"
            )
        pictures = runtime.pictures(runtime.generate(given))
        if pictures.shape[1] in (1, 3):
            write_atomically(folder / PREVIEW, png(pictures))
    return _latents(found)


def _latents(found: Sequence[Drift]) -> NDArray[np.float64]:
    return np.array([drift.error for drift in found if drift.tensor in CHAINED])
