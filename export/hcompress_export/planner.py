"""What each layout of a bundle would take, before anything is built, and which one to take.

`embedded`  a graph for each distinct step, weights inside: each session or engine holds its own copy of what it uses
`per-mask`  a graph for each distinct step, weights as inputs: held once, bound to all
`switch`    one graph, an `If` round each branch that is ever reused: weights once, but all slots at every call

Bytes of weights and caches are exact up to a few tensors that a step graph does not hold (the timestep embedder) or
that are no parameters (positions). Graphs, engines, scratch and seconds are approximations from the measurements below:
export.md is ../shared/design/export.md, "XL/2" is DiT-XL/2 at fp16, and no figure of TensorRT itself is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from hcompress.branches import BranchGraph
from hcompress.corrections import Corrections
from hcompress.errors import InputError
from hcompress_export.freeze import freeze
from hcompress_runtime.ort import PREPACK_LIMIT_BYTES
from hcompress_runtime.plan import Plan, before

ENGINES = {"ort-cpu": False, "ort-cuda": False, "tensorrt": True, "rtx": True}
"""The backends; whether each compiles graphs into engines, which lie on disk beside them."""

# An ONNX graph. Measured at 2 to 10 blocks: 115 kB where 20 branches are computed, 27 kB where 20 are reused.
GRAPH_BYTES, GRAPH_BYTES_COMPUTED, GRAPH_BYTES_REUSED = 12_000, 5_000, 1_000
# An engine without its weights. export.md §12: 3.8 MiB of a tiny DiT, 6.2 of XL/2 with 28 branches computed, 9.1 with
# 56, 13.6 of PixArt-XL with 42. This line is within a third of each.
ENGINE_BYTES, ENGINE_BYTES_COMPUTED = 3.5 * 2**20, 0.15 * 2**20
# Builds by TensorRT-RTX on two cores. export.md §12: XL/2, 750 M parameters, 7.0 s embedded and 4.2 as inputs; half
# reused, 530 M, 4.2 and 1.8; PixArt-XL half reused, 320 M, 4.7 and 3.8; tiny ones 1 s with the process each gets.
BUILD_S, BUILD_S_PER_PARAM = 1.0, {"embedded": 8e-9, "per-mask": 4e-9, "switch": 8e-9}
# Loading into ONNX Runtime. export.md §9: 20 sessions, 403 MB each: 9.9 s with weights packed, 0.65 s with none.
# Taken for CUDA too, where nothing is packed but all is copied.
LOAD_S, LOAD_S_PER_BYTE = 0.65 / 20, 9.9 / (20 * 403e6)
# What is held at once inside a graph, in outputs of the largest branch. An MLP: the residual stream, its normed copy,
# the hidden layer before and after its activation at four widths each, which is 10; ONNX Runtime's arena grows by
# doubling and held 15 to 18 (2 blocks, 49 to 256 tokens). Attention: the stream, its normed copy, Q, K, V and output,
# and, where it is not fused, scores before and after softmax, L / 64 outputs each at 64 channels a head: 38 at 1024
# tokens, where 34 and 43 were held.
SCRATCH_MLP, SCRATCH_ATTENTION, CHANNELS_PER_HEAD = 16, 6, 64
SMALL_BYTES = 64 << 20  # of weights, each engine's counted: so little that copies do not matter


@dataclass(frozen=True)
class Estimate:
    """What one layout takes.

    layout:        `embedded`, `per-mask` or `switch`
    num_graphs:    that are loaded, or built into engines
    disk_bytes:    of the bundle: graphs, the weight file, and engines where the backend builds any
    weight_bytes:  of all copies of weights that are held to run, on the device or, for ort-cpu, in memory, and of the
                   vectors of corrections
    cache_bytes:   of the slots that hold something at once, at most
    scratch_bytes: of what graphs need while they run, once for all, and of the engines' own code
    build_s:       to load all graphs or to build all engines; the trace that every layout starts from is not in it
    """

    layout: str
    num_graphs: int
    disk_bytes: int
    weight_bytes: int
    cache_bytes: int
    scratch_bytes: int
    build_s: float

    @property
    def device_bytes(self) -> int:
        """Memory that has to be there to run: weights, caches and scratch."""
        return self.weight_bytes + self.cache_bytes + self.scratch_bytes


def estimate(
    graph: BranchGraph,
    compute: NDArray[np.bool_],
    corrections: Corrections | None = None,
    *,
    rows: int,
    itemsize: int,
    backend: str,
    widen: bool = False,
    weight_bytes: int | None = None,
) -> list[Estimate]:
    """An Estimate of each layout, for `compute`, bool[T, N], and the corrections of what it reuses.

    rows:     of the network's batch: samples, doubled by guidance
    itemsize: bytes of an element of slots and activations, and of weights
    backend:  `ort-cpu`, `ort-cuda`, `tensorrt` or `rtx`
    widen:    as in `freeze`
    weight_bytes: of all weights where they are in few bits; all parts of the network are taken to save as much

    Raises ScheduleError for a mask that does not fit, InputError for another backend.
    """
    engines = _builds_engines(backend)
    plan = freeze(graph, compute, corrections, widen=widen)
    params_of = {branch.name: branch.params for branch in graph.branches}
    patterns = [pattern.computes for pattern in plan.patterns]
    each = itemsize if weight_bytes is None else weight_bytes / graph.total_params
    params = [graph.other_params + sum(params_of[name] for name in computes) for computes in patterns]
    used = [int(each * count) for count in params]
    computed = [len(computes) for computes in patterns]
    whole = int(each * graph.total_params)
    peak = plan.peak_cache_bytes(rows, itemsize)
    slots = rows * itemsize * sum(prod(shape) for shape in plan.slots.values())
    vectors, stored = _vector_bytes(plan, graph), 0
    if corrections is not None:
        stored = 4 * len(corrections.stored) * len(compute) * sum(graph.widths)
    activations = rows * itemsize * _scratch_elements(graph, fused=engines)

    def layout(name: str, computed: list[int], params: list[int], held: int, cache_bytes: int) -> Estimate:
        """computed: branches in each graph; params: of each; held: bytes of all copies of weights that are made."""
        inside = 0 if name == "per-mask" else held
        code = sum(map(_engine_bytes, computed)) if engines else 0
        disk_bytes = whole + vectors + stored + sum(_graph_bytes(len(graph), count) for count in computed)
        if engines:
            disk_bytes += inside + code
            build_s = len(params) * BUILD_S + sum(params) * BUILD_S_PER_PARAM[name]
        else:
            build_s = len(params) * LOAD_S + inside * LOAD_S_PER_BYTE
        return Estimate(name, len(params), disk_bytes, held + vectors, cache_bytes, activations + code, build_s)

    return [
        layout("embedded", computed, params, sum(used), peak),
        layout("per-mask", computed, params, whole, peak),
        layout("switch", [len(graph)], [graph.total_params], whole, slots),
    ]


def choose(
    estimates: Sequence[Estimate], *, backend: str, memory_budget: int | None, integers: bool = False
) -> tuple[Estimate, str]:
    """The layout to take on `backend` within `memory_budget` bytes, and one sentence that says why.

    integers: whether products are of int8 on both sides

    That is the layout which runs fastest there; where it is over the budget, the smallest other that is not.
    Raises InputError where nothing fits, naming the least that would be needed.
    """
    engines = _builds_engines(backend)
    by_layout = {estimate.layout: estimate for estimate in estimates}
    name, reason = _fastest(by_layout, backend, engines, integers)
    if memory_budget is None or by_layout[name].device_bytes <= memory_budget:
        return by_layout[name], f"{name}: {reason}."
    smallest = min(estimates, key=lambda estimate: estimate.device_bytes)
    needed = _size(smallest.device_bytes)
    if smallest.device_bytes > memory_budget:
        raise InputError(
            f"no layout fits into {_size(memory_budget)}: the smallest, {smallest.layout}, needs {needed}; "
            "raise --memory-budget or lower --batch"
        )
    return smallest, (
        f"{smallest.layout}: it needs {needed} and is the smallest; {name}, the first choice on {backend}, "
        f"needs {_size(by_layout[name].device_bytes)}, over the budget of {_size(memory_budget)}."
    )


def _fastest(estimates: Mapping[str, Estimate], backend: str, engines: bool, integers: bool) -> tuple[str, str]:
    """The layout that runs fastest without filling memory, and why."""
    copies, once = estimates["embedded"].weight_bytes, estimates["per-mask"].weight_bytes
    count = estimates["embedded"].num_graphs
    if engines and copies < SMALL_BYTES:
        return "embedded", f"all engines together hold only {_size(copies)} of weights, which the builder may pack"
    if backend == "ort-cpu" and count == 1:
        return "embedded", "one graph runs every call, so its weights are held once and packed"
    if backend == "ort-cpu" and copies <= PREPACK_LIMIT_BYTES:
        return "embedded", f"all {count} graphs together hold only {_size(copies)} of weights, packed for each"
    if (
        backend == "ort-cpu" and integers
    ):  # 645 against 969 ms at one sample, 2261 against 2699 at four (recipes/LOG.md)
        return (
            "switch",
            f"one graph's {_size(once)} of int8 weights are packed once; as inputs they would be at each call",
        )
    if backend == "ort-cpu":
        # Within 5 % as fast as `switch` and as packed copies, at 1.09 to 1.16 times the memory of one graph; `switch`
        # takes 1.26 to 1.40 (benchmarks/results/layouts.md: 131 M parameters, 512 rows). Packing pays where products
        # have few rows (export.md §9: 1.4x at 64), which no model of that size has.
        shared, copied = _size(once), _size(copies)
        return "per-mask", f"{shared} of weights serve all {count} graphs, as fast as {copied} of packed copies would"
    return "per-mask", f"{_size(once)} of weights serve every graph, where a copy inside each makes {_size(copies)}"


def _builds_engines(backend: str) -> bool:
    if backend not in ENGINES:
        raise InputError(f"there is no backend {backend!r}; choose from: {', '.join(ENGINES)}")
    return ENGINES[backend]


def _vector_bytes(plan: Plan, graph: BranchGraph) -> int:
    """Of the three float32 vectors of each branch that is ever corrected, and the fourth by q, for each call."""
    ever = {name for step in plan.steps for name in step.corrects}
    counts = [3 * (branch.name in ever) + (before(before(branch.name)) in ever) for branch in graph.branches]
    return 4 * len(plan.steps) * sum(count * width for count, width in zip(counts, graph.widths, strict=True))


def _graph_bytes(branches: int, computed: int) -> int:
    return GRAPH_BYTES + computed * GRAPH_BYTES_COMPUTED + (branches - computed) * GRAPH_BYTES_REUSED


def _engine_bytes(computed: int) -> int:
    return int(ENGINE_BYTES + computed * ENGINE_BYTES_COMPUTED)


def _scratch_elements(graph: BranchGraph, *, fused: bool) -> int:
    """Elements of all intermediates that are held at once, for one row."""
    shape = max((branch.shape for branch in graph.branches), key=prod)
    scores = 0 if fused else 2 * shape[0] // CHANNELS_PER_HEAD
    return max(SCRATCH_MLP, SCRATCH_ATTENTION + scores) * prod(shape)


def _size(size: int) -> str:
    """Bytes for people, in the decimal units that disks and GPUs are sold in."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
