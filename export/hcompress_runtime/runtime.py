"""Run a bundle: a loop over its plan. Needs NumPy, safetensors and one backend; no torch, no diffusers.

    runtime = Runtime("bundle")
    images = runtime.generate([0, 1, 2], seed=0)     # float32[3, C, H, W], about [-1, 1]

The numbers are those of `hcompress.sampling`: the same noise streams, the same solver table, the same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.backends import FLAVORS
from hcompress_runtime.bundle import DECODER, Bundle, open_bundle
from hcompress_runtime.conditions import Given, Rows, complete, take
from hcompress_runtime.engine import Engine, SlotValue
from hcompress_runtime.errors import InputError
from hcompress_runtime.noise import gaussian
from hcompress_runtime.ort import open_session, sessions_of
from hcompress_runtime.trt import engines_of

OnStep = Callable[[int, NDArray[np.float32]], object]
"""(call, x float32[B, C, H, W]): what call `call` is given; at `call` = T, the finished samples."""


class Runtime:
    """A bundle, loaded and ready to generate.

    bundle:   a folder, or a Bundle that is already open
    provider: "cpu" or "cuda", of ONNX Runtime; "trt" or "rtx", engines of TensorRT or TensorRT-RTX
    threads:  of one operator; None leaves it to the backend
    prepack:  trade memory for speed, see hcompress_runtime.ort; None decides by the size of the weights

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
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self._provider, self._threads = "cuda" if provider in FLAVORS else provider, threads  # of the decoder
        self.peak_cache_bytes = 0
        """The most bytes that slots have held at once so far, measured."""
        self._stack = ExitStack()
        if provider in FLAVORS:
            opened = engines_of(self.bundle, provider)
        else:
            opened = sessions_of(self.bundle, provider, threads, prepack)
        self.engines: Mapping[str, Engine] = self._stack.enter_context(opened)
        self._decoder: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engines."""
        self.engines, self._decoder = {}, None
        self._stack.close()

    def generate(
        self,
        labels: Given,
        seed: int = 0,
        *,
        batch: int = 16,
        first: int = 0,
        on_step: OnStep = lambda call, x: None,
    ) -> NDArray[np.float32]:
        """One sample for each label, float32[len(labels), C, H, W], in batches.

        A text-conditional bundle is given arrays by name instead of labels, one sample for each row of `prompt_embeds`;
        hcompress_runtime.conditions says which, and `load_prompts` there reads them from a file.

        Sample i draws stream `first` + i of `seed`, whatever the batch. Raises InputError for conditions, seeds and
        batches that this bundle cannot take.
        """
        rows = complete(self.bundle.conditions, labels)
        self._check(seed, batch, first)
        least, most = next(iter(self.engines.values())).batches
        count, batch, finished = len(next(iter(rows.values()))), min(batch, most), []
        for begin in range(0, count, batch):
            chosen = [*range(begin, min(begin + batch, count))]
            padded = [*chosen, *[begin] * (least - len(chosen))]  # an engine may be built for one batch only
            streams = range(first + begin, first + begin + len(padded))
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
        x: NDArray[np.float32],
        conditions: Rows,
        slots: dict[str, SlotValue],
        noises: Sequence[NDArray[np.float32]] = (),
    ) -> tuple[NDArray[np.float32], dict[str, SlotValue]]:
        """Model output [B, C, H, W] of one call, and the slots it wrote; brings `slots` up to date.

        conditions: of the B samples, complete and contiguous
        noises:     of the solver, all draws; only a learned variance asks for them here
        """
        plan, engine = self.bundle.plan.steps[call], self.engines[self.bundle.graphs[call]]
        output, written = engine.infer(self._feeds(call, x, conditions, noises), slots)
        written = {name: written[name] for name in plan.writes}
        slots |= written
        self.peak_cache_bytes = max(self.peak_cache_bytes, sum(map(engine.nbytes, slots.values())))
        for name in plan.frees:
            del slots[name]
        return output, written

    def _generate(self, conditions: Rows, seed: int, streams: Sequence[int], on_step: OnStep) -> NDArray[np.float32]:
        table = self.bundle.table
        start = gaussian(seed, streams, self.bundle.sample_shape)
        noises = [gaussian(seed, streams, self.bundle.sample_shape, draw=m + 1) for m in range(table.num_noises)]
        slots: dict[str, SlotValue] = {}
        outputs: list[NDArray[np.float32]] = []
        for call in range(table.num_calls):
            x = table.combine(call, start, outputs, noises)
            on_step(call, x)
            outputs.append(self.step(call, x, conditions, slots, noises)[0])
        x = table.combine(table.num_calls, start, outputs, noises)
        on_step(table.num_calls, x)
        return x

    def _feeds(
        self, call: int, x: NDArray[np.float32], conditions: Rows, noises: Sequence[NDArray[np.float32]]
    ) -> Mapping[str, NDArray[Any]]:
        constants = {f"step.{name}": rows[call : call + 1] for name, rows in self.bundle.constants.items()}
        computes = self.bundle.plan.steps[call].computes
        compute = np.array([branch in computes for branch in self.bundle.plan.branches])
        scale = np.array(self.bundle.cfg, np.float32)
        noise = self.bundle.table.noise_of(call, noises)
        noise = np.zeros_like(x) if noise is None else noise
        return {"latent": x, **conditions, "cfg": scale, "noise": noise, "compute": compute, **constants}

    @staticmethod
    def _check(seed: int, batch: int, first: int) -> None:
        if batch < 1:
            raise InputError(f"batch {batch} should be 1 or more")
        if not (0 <= seed < 1 << 64 and 0 <= first < 1 << 63):
            raise InputError(f"seed {seed} and first {first} number random streams: from 0, and below 2**64 and 2**63")
