"""What gpu_check.py asks of every contender: a model, its masks, and the samples that have to come out.

Masks are random, so all 20 calls differ. Where a graph takes minutes of building (torch.compile, TensorRT), masks have
only FEW different rows after the first, in rotation, at the same CUR. Merging the 20 rows (hcompress_export.merge)
would do it too, but random rows have nothing in common: merged into 4 they would compute all but 4 % of the branches.

Legend: B samples, T model calls, N branches.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcompress.adapter import Adapter
from hcompress.caching.rules import random_mask
from hcompress.lowbit.adapter import QuantizedAdapter
from hcompress.models.random import DIT, PREFIX, SCHEDULER, make_random, random_dit
from hcompress.quant.build import build
from hcompress.quant.calibration import Walk, observe
from hcompress.quant.selection import select
from hcompress.sampling import sample, start_noise
from hcompress.schedule import Identity, Schedule
from hcompress.solver import make_scheduler, probe, solver_identity
from hcompress_runtime.table import SolverTable

if TYPE_CHECKING:
    import onnx_ir as ir

    from hcompress_runtime.bundle import Bundle

CURS, CFG, SEED, FEW = (0.375, 0.5), 1.5, 0, 2  # 37.5 %: the CUR of HarmoniCa's poster
WIDER = {torch.float16: torch.float32, torch.float32: torch.float64}
TINY = DIT | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}


@dataclass(frozen=True)
class Variant:
    """The dense model, or a mask for it.

    compute:   bool[T, N]
    reference: samples [B, C, H, W] of the reference sampler, in the next wider precision
    added:     what of them the network added to the start noise, which alone would hide any error
    """

    name: str
    compute: NDArray[np.bool_]
    reference: NDArray[np.floating[Any]]
    added: NDArray[np.floating[Any]]

    @property
    def is_dense(self) -> bool:
        """Whether every branch is computed at every call."""
        return bool(self.compute.all())

    def deviation(self, samples: NDArray[np.floating[Any]]) -> float:
        """The largest difference from the reference, relative to the most that the network added."""
        return float(np.abs(samples - self.reference).max() / np.abs(self.added).max())


@dataclass(frozen=True)
class Case:
    """What every contender runs.

    adapter:  on the CPU, in the precision to run in
    device:   "cuda" or "cpu"
    variants: the dense model and a mask for each of CURS, all rows different
    few:      the same with FEW different rows
    folder:   where bundles go
    say:      told what is going on
    """

    name: str
    adapter: Adapter
    table: SolverTable
    identity: Identity
    labels: list[int]
    device: str
    variants: tuple[Variant, ...]
    few: tuple[Variant, ...]
    folder: Path
    say: Callable[[str], object] = field(repr=False)
    lowbit: dict[str, QuantizedAdapter] = field(default_factory=dict, repr=False)
    traces: dict[str | None, ir.Model] = field(default_factory=dict, repr=False)

    @property
    def weight_bytes(self) -> int:
        """Of the network, each tensor once."""
        return sum(tensor.nbytes for tensor in (*self.adapter.parameters(), *self.adapter.buffers()))

    def quantized(self, format: str) -> QuantizedAdapter:
        """The adapter in `format`, on the CPU, by the ranges that one sample shows; made once."""
        if format not in self.lowbit:
            self.say(f"quantizes to {format}")
            adapter = copy.deepcopy(self.adapter).to(self.device)
            selection = select(adapter, format, modulation=format)
            amax = observe(adapter, selection, Walk(self.table, CFG, samples=1, batch=1)).amax
            timesteps = torch.from_numpy(self.table.timesteps).float()
            self.lowbit[format] = build(self.adapter, selection, amax, timesteps, {"name": "absmax"})
        return self.lowbit[format]

    def traced(self, format: str | None) -> ir.Model:
        """The network as ONNX: nine tenths of an export, and the same for all bundles of a format; made once."""
        from hcompress_export.trace import trace  # needs what may not be installed

        if format not in self.traces:
            self.traces[format] = trace(self.quantized(format) if format else self.adapter, CFG)
        return self.traces[format]

    def bundle(self, variant: Variant, layout: str, format: str | None = None) -> Bundle:
        """The bundle of `variant`, of floats or in `format`, exported unless it is there."""
        from hcompress_export.bundle import export_bundle  # needs what may not be installed
        from hcompress_runtime.bundle import open_bundle

        adapter = self.quantized(format) if format else self.adapter
        path = self.folder / f"{format or 'float'}-{layout}-{re.sub('[^0-9a-z]+', '-', variant.name.lower())}"
        if path.exists():
            return open_bundle(path)
        self.say(f"exports {variant.name}")
        names, schedule = self.adapter.graph.names, None
        if not variant.is_dense:
            schedule = Schedule(variant.compute, names, self.identity, {"name": "rule", "rule": variant.name})
        options: dict[str, Any] = {"schedule": schedule, "layout": layout, "widen": True, "traced": self.traced(format)}
        return export_bundle(adapter, self.table, self.identity, path, cfg=CFG, **options)


def open_case(folder: Path, say: Callable[[str], object], *, tiny: bool) -> Case:
    """DiT-XL/2, float16, on the GPU, 8 samples, 20 calls; with `tiny` a small DiT, float32, on the CPU, 2 and 4."""
    name = "a tiny random DiT" if tiny else f"{PREFIX}DiT-XL-2-256"
    device, dtype, calls, batch = ("cpu", torch.float32, 4, 2) if tiny else ("cuda", torch.float16, 20, 8)
    say(f"draws the weights of {name}")
    adapter = random_dit(TINY) if tiny else make_random(name)
    scheduler = make_scheduler("ddim", SCHEDULER)
    table = probe(scheduler, calls)
    identity = adapter.identity(name, dict(solver_identity(scheduler, calls)), CFG)
    labels, branches = [37 * index % adapter.num_classes for index in range(batch)], len(adapter.graph)
    adapter.to(device, WIDER[dtype])
    say(f"samples references in {str(adapter.dtype).removeprefix('torch.')}")

    def variant(name: str, compute: NDArray[np.bool_]) -> Variant:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            noise = start_noise(adapter, SEED, range(batch)).to(adapter.dtype)
            drawn = sample(adapter, table, adapter.label_condition(labels), noise, cfg=CFG, compute=compute)
        return Variant(name, compute, drawn.cpu().numpy(), (drawn - noise * float(table.start[-1])).cpu().numpy())

    dense = variant("dense", np.ones((calls, branches), np.bool_))
    every, few = [dense], [dense]
    for cur in CURS:
        every.append(variant(f"CUR {100 * cur:g} %", random_mask(calls, branches, cur=cur, seed=SEED)))
        few.append(variant(f"CUR {100 * cur:g} %, {FEW} masks", few_masks(calls, branches, cur=cur)))
    adapter.to("cpu", dtype)
    return Case(name, adapter, table, identity, labels, device, tuple(every), tuple(few), folder, say)


def few_masks(calls: int, branches: int, *, cur: float, distinct: int = FEW) -> NDArray[np.bool_]:
    """bool[T, N], `distinct` random rows in rotation after a full first one, each reusing equally many branches.

    Their number is the nearest to a CUR of `cur`.
    """
    rng = np.random.default_rng(SEED)
    reused = min(branches, round(cur * calls * branches / (calls - 1)))
    compute = np.ones((calls, branches), np.bool_)
    rows = [rng.permutation(branches) >= reused for _ in range(distinct)]
    for call in range(1, calls):
        compute[call] = rows[(call - 1) % distinct]
    return compute
