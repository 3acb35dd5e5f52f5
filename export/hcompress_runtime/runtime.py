"""Run a bundle: a loop over its plan. Needs NumPy, safetensors and one backend; no torch, no diffusers.

    runtime = Runtime("bundle")
    images = runtime.generate([0, 1, 2], seed=0)     # float32[3, C, H, W], about [-1, 1]

The numbers are those of `hcompress.sampling`: the same noise streams, the same solver table, the same slots. Between
the calls everything stays where the network runs, latents too: the solver's update is a graph like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.backends import FLAVORS
from hcompress_runtime.bundle import DECODER, UPDATE, Bundle, open_bundle
from hcompress_runtime.conditions import Given, Rows, complete, take
from hcompress_runtime.engine import Engine, Value
from hcompress_runtime.errors import InputError
from hcompress_runtime.noise import gaussian
from hcompress_runtime.ort import open_session, sessions_of
from hcompress_runtime.plan import before
from hcompress_runtime.trt import engines_of

OnStep = Callable[[int, NDArray[np.float32]], object]
"""(call, x float32[B, C, H, W]): what call `call` is given; at `call` = T, the finished samples."""


class Runtime:
    """A bundle, loaded and ready to generate.

    bundle:   a folder, or a Bundle that is already open
    provider: "cpu" or "cuda", of ONNX Runtime; "trt" or "rtx", engines of TensorRT or TensorRT-RTX
    threads:  of one operator; None leaves it to the backend
    prepack:  trade memory for speed, see hcompress_runtime.ort; None decides by the size of the weights
    capture:  run exactly so many samples at once, on a GPU each call as a CUDA graph once it has been run twice

    `put` and `to_numpy` are the backend's, see Engine; `batches` are the least and most samples it takes at once.
    Every distinct graph is loaded here, once, so that the first sample takes no longer than the others and a graph
    that cannot run is found out now. Raises BundleError, MissingExtra, EngineError.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        provider: str = "cpu",
        threads: int | None = None,
        *,
        prepack: bool | None = None,
        capture: int | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self._provider, self._threads = "cuda" if provider in FLAVORS else provider, threads  # of the decoder
        self.peak_cache_bytes = 0
        """The most bytes that slots have held at once so far, measured."""
        if provider in FLAVORS:
            opened = engines_of(self.bundle, provider, capture=capture)
        else:
            opened = sessions_of(self.bundle, provider, threads, prepack, capture)
        self._lock = Lock()
        self._given: dict[str, Value] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._decoder: Any = None
        with ExitStack() as stack:
            self.engines: Mapping[str, Engine] = stack.enter_context(opened)
            self._update = self.engines[UPDATE]
            self.put, self.to_numpy = self._update.put, self._update.to_numpy
            self.batches = self._update.batches
            self._constants = [self._of_call(call) for call in range(self.bundle.table.num_calls)]
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engines."""
        self.engines, self._constants, self._given, self._decoder = {}, [], {}, None
        self._stack.close()

    def generate(
        self,
        labels: Given,
        seed: int = 0,
        *,
        batch: int = 16,
        first: int = 0,
        on_step: OnStep | None = None,
    ) -> NDArray[np.float32]:
        """One sample for each label, float32[len(labels), C, H, W], in batches.

        A text-conditional bundle is given arrays by name instead of labels, one sample for each row of `prompt_embeds`;
        hcompress_runtime.conditions says which, and `load_prompts` there reads them from a file.

        Sample i draws stream `first` + i of `seed`, whatever the batch. Of several threads one generates at a time: the
        engines and what they are given are one set. Raises InputError for conditions, seeds and
        batches that this bundle cannot take.
        """
        rows = complete(self.bundle.conditions, labels)
        self._check(seed, batch, first)
        least, most = self.batches
        count, batch, finished = len(next(iter(rows.values()))), min(batch, most), []
        for begin in range(0, count, batch):
            chosen = [*range(begin, min(begin + batch, count))]
            padded = [*chosen, *[begin] * (least - len(chosen))]  # an engine may be built for one batch only
            streams = range(first + begin, first + begin + len(padded))
            with self._lock:
                finished.append(self._generate(take(rows, padded), seed, streams, on_step)[: len(chosen)])
        return np.concatenate(finished)

    def pictures(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `generate` gave as pictures, float32[B, C, H, W] in about [-1, 1]: latents go through the decoder.

        Where a bundle has none its samples are returned as they are. The decoder is loaded by the first call, and runs
        one sample at a time, since its activations are many times a latent.
        """
        if not self.bundle.has_decoder:
            return samples
        if self._decoder is None:
            self._decoder = open_session(self.bundle.path / DECODER, self._provider, self._threads)
        return np.concatenate([self._decoder.run(None, {"latent": samples[i : i + 1]})[0] for i in range(len(samples))])

    def step(
        self,
        call: int,
        latent: Value,
        conditions: Mapping[str, Value],
        slots: dict[str, Value],
        results: dict[str, Value] | None = None,
    ) -> tuple[Value, dict[str, Value]]:
        """Model output [B, C, H, W] of one call, and the slots it wrote; brings `slots` up to date.

        latent, conditions: of the B samples, complete, where the backend has them (`put`); the call's noise is among
                            the conditions if the graphs want it, see hcompress_runtime.table
        results:            filled with all that the graph gave
        """
        plan, engine = self.bundle.plan.steps[call], self.engines[self.bundle.graphs[call]]
        slots |= {before(name): slots.pop(name) for name in plan.keeps}
        held = dict(slots)
        for _ in range(2):  # where there is no p or no q yet, what was computed after it
            held = {before(name): value for name, value in held.items()} | held
        given = {f"cache_in.{name}": value for name, value in held.items()}
        got = engine.infer({"latent": latent, **conditions, **self._constants[call], **given})
        if results is not None:
            results |= got
        written = {name: got[f"cache_out.{name}"] for name in plan.writes}
        slots |= written
        self.peak_cache_bytes = max(self.peak_cache_bytes, sum(map(engine.nbytes, slots.values())))
        for name in plan.frees:
            del slots[name]
        return got["model_output"], written

    def _generate(
        self, conditions: Rows, seed: int, streams: Sequence[int], on_step: OnStep | None
    ) -> NDArray[np.float32]:
        table, shape = self.bundle.table, self.bundle.sample_shape
        noises = [gaussian(seed, streams, shape, draw=m + 1) for m in range(table.num_noises)]
        known = table.ahead(gaussian(seed, streams, shape), noises)
        noise = [table.noise_input(call, noises, known[:, 0].shape) for call in range(table.num_calls)]
        drawn = {f"{name}.{call}": array for call, arrays in enumerate(noise) for name, array in arrays.items()}
        given = self._give({"latent": known[:, 0], "ahead": known[:, 1:], **conditions, **drawn})
        x, ahead, slots = given.pop("latent"), given.pop("ahead"), dict[str, Value]()
        for call in range(table.num_calls):
            if on_step:
                on_step(call, self.to_numpy(x))
            now = {name: given[f"{name}.{call}"] for name in noise[call]}
            output, _ = self.step(call, x, given | now, slots)
            moved = self._update.infer({"ahead": ahead, "model_output": output, **self._constants[call]})
            x, ahead = moved["latent"], moved["ahead_next"]
        samples = self.to_numpy(x)
        if on_step:
            on_step(table.num_calls, samples)
        return samples

    def _give(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Value]:
        """`arrays` where the backend has them, in the memory of the last generation if that was of this size."""
        if any(self._shapes.get(name) != array.shape for name, array in arrays.items()):
            self._given, self._shapes = {}, {name: array.shape for name, array in arrays.items()}
        self._given = {name: self.put(array, self._given.get(name)) for name, array in arrays.items()}
        return dict(self._given)

    def _of_call(self, call: int) -> dict[str, Value]:
        """What graphs are given at `call`, whatever is generated."""
        computes = self.bundle.plan.steps[call].computes
        arrays = {f"step.{name}": rows[call : call + 1] for name, rows in self.bundle.constants.items()}
        arrays["cfg"] = np.array(self.bundle.cfg, np.float32)
        arrays["compute"] = np.array([branch in computes for branch in self.bundle.plan.branches])
        arrays["share"] = self.bundle.table.shares()[call]
        return {name: self.put(array) for name, array in arrays.items()}

    @staticmethod
    def _check(seed: int, batch: int, first: int) -> None:
        if batch < 1:
            raise InputError(f"batch {batch} should be 1 or more")
        if not (0 <= seed < 1 << 64 and 0 <= first < 1 << 63):
            raise InputError(f"seed {seed} and first {first} number random streams: from 0, and below 2**64 and 2**63")
