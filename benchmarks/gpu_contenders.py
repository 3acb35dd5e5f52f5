"""The contenders of gpu_check.py: ways to run one model, dense and cached, each behind the same three calls.

    prepare = CONTENDERS[name].open(case, stack)   # raises Absent where this machine lacks what it needs
    run = prepare(variant)                         # exports, loads, captures, compiles or builds
    samples = run()                                # float32[B, C, H, W]; all work is done when it returns

Legend: B samples, T model calls.
"""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from gpu_case import CFG, SEED, Case, Variant
from numpy.typing import NDArray
from torch import Tensor

from hcompress.adapter import Adapter
from hcompress.sampling import constants_of, hard_route, sample, start_noise
from hcompress_export.freeze import freeze
from hcompress_runtime.errors import HcompressError
from hcompress_runtime.plan import Pattern, Plan

Samples = NDArray[np.float32]
Run = Callable[[], Samples]
Step = Callable[..., tuple[Tensor, ...]]
"""(x [B, C, H, W], condition, constants, *slots it reads) -> (model output [B, C, H, W], *slots it writes)."""


class Absent(Exception):
    """This machine lacks what a contender needs; the message says what."""


class Loop:
    """One generation under a plan, a call at a time, by tensors that stay where they are.

    That is what CUDA graphs can record: called in order, each call finds what earlier ones left at the same addresses.
    A slot is held exactly as long as the plan says. `compiler` is given the function of each distinct step once.
    """

    def __init__(self, case: Case, adapter: Adapter, plan: Plan, compiler: Callable[[Step], Step] = lambda f: f):
        self.table, self.plan = case.table, plan
        self.noise = start_noise(adapter, SEED, range(len(case.labels)))
        self.start = self.noise.clone()
        self.condition, self.constants = adapter.label_condition(case.labels), constants_of(adapter, case.table)
        self.steps = {pattern: compiler(make_step(adapter, pattern)) for pattern in plan.patterns}
        self.begin()

    def begin(self) -> None:
        """Forget the last generation."""
        self.outputs: list[Tensor] = []
        self.slots: dict[str, Tensor] = {}

    @torch.no_grad()
    def call(self, call: int) -> None:
        """Model call `call`; at T, what finishes the samples."""
        self.x = self.table.combine(call, self.start, self.outputs)
        if call == self.table.num_calls:
            return
        step = self.plan.steps[call]
        held = [self.slots[name] for name in step.reads]
        output, *written = self.steps[step.pattern](self.x, self.condition, self.constants[call], *held)
        self.outputs.append(output)
        self.slots |= dict(zip(step.writes, written, strict=True))
        for name in step.frees:
            del self.slots[name]

    def run(self) -> Samples:
        """The samples, call after call."""
        self.begin()
        for call in range(self.table.num_calls + 1):
            self.call(call)
        return _finished(self.x)

    def capture(self) -> Run:
        """The samples by replaying a CUDA graph for each call; all graphs share one pool, so order is everything."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()  # libraries prepare themselves, and torch.compile compiles, outside of a capture only
        torch.cuda.current_stream().wait_stream(side)
        self.begin()
        pool, graphs = torch.cuda.graph_pool_handle(), []
        for call in range(self.table.num_calls + 1):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool):
                self.call(call)

        def replay() -> Samples:
            self.start.copy_(self.noise)
            for graph in graphs:
                graph.replay()
            return _finished(self.x)

        return replay


def make_step(adapter: Adapter, pattern: Pattern) -> Step:
    """A model call that computes, reads and writes what `pattern` says."""
    computes, reads, writes, _ = pattern
    names, channels = adapter.graph.names, adapter.sample_shape[0]
    row: Any = tuple(name in computes for name in names)  # plain bools: under torch.compile, numpy's are tensors
    read, written = ([names.index(name) for name in some] for some in (reads, writes))

    def step(x: Tensor, condition: Mapping[str, Tensor], constants: Mapping[str, Tensor], *held: Tensor) -> Any:
        slots = dict(zip(read, held, strict=True))
        output = adapter.guided(x, condition, constants, CFG, hard_route(row, slots))[:, :channels]
        return output, *[slots[branch] for branch in written]

    return step


Prepare = Callable[[Variant], Run]


def eager(case: Case, stack: ExitStack) -> Prepare:
    """The reference sampler, in the precision to run in."""
    adapter = copy.deepcopy(case.adapter).to(case.device)
    condition, noise = adapter.label_condition(case.labels), start_noise(adapter, SEED, range(len(case.labels)))

    def prepare(variant: Variant) -> Run:
        compute = None if variant.is_dense else variant.compute
        return lambda: _finished(sample(adapter, case.table, condition, noise, cfg=CFG, compute=compute))

    return prepare


def graphs(case: Case, stack: ExitStack) -> Prepare:
    """The eager kernels, recorded: a CUDA graph for each call."""
    _need_cuda(case)
    adapter = copy.deepcopy(case.adapter).to(case.device)
    return lambda variant: Loop(case, adapter, freeze(adapter.graph, variant.compute)).capture()


def compiled(case: Case, stack: ExitStack) -> Prepare:
    """torch.compile of each distinct step as a whole, recorded: a CUDA graph for each call."""
    _need_cuda(case)
    _need("triton")
    adapter = copy.deepcopy(case.adapter).to(case.device)
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))  # one function, a variant for each pattern
    stack.callback(torch._dynamo.reset)
    compiler = partial(torch.compile, fullgraph=True, dynamic=False)

    def prepare(variant: Variant) -> Run:
        plan = freeze(adapter.graph, variant.compute, widen=True)
        case.say(f"compiles {len(plan.patterns)} steps of {variant.name}")
        return Loop(case, adapter, plan, compiler).capture()

    return prepare


def products(format: str, case: Case, stack: ExitStack) -> Prepare:
    """PyTorch with the products of `format`, recorded: a CUDA graph for each call; on a CPU eager."""
    from gpu_lowbit import multiplied

    if format == "fp8" and case.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Absent("FP8 needs compute capability 8.9 or newer")
    if format == "fp8" and case.device == "cpu":
        raise Absent("FP8 products need a CUDA device")
    adapter = multiplied(case.quantized(format), case.device)

    def prepare(variant: Variant) -> Run:
        loop = Loop(case, adapter, freeze(adapter.graph, variant.compute))
        return loop.capture() if case.device == "cuda" else loop.run

    return prepare


def onnxruntime(layout: str, capture: bool, case: Case, stack: ExitStack, *, format: str | None = None) -> Prepare:
    """A bundle of `layout`, of floats or in `format`, on ONNX Runtime, by the runtime that ships.

    capture: with its CUDA graphs
    """
    if capture:
        _need_cuda(case)
    _need("onnxruntime", "onnx", "onnx_ir", "onnxscript")
    import onnxruntime as ort

    from hcompress_runtime import Runtime

    name = f"{case.device.upper()}ExecutionProvider"
    if name not in ort.get_available_providers():
        raise Absent(f"no {name} in onnxruntime {ort.__version__}; onnxruntime-gpu has it")
    if case.device == "cuda":
        ort.preload_dlls()  # CUDA's libraries as torch brought them

    def prepare(variant: Variant) -> Run:
        bundle = case.bundle(variant, layout, format)
        if layout == "switch" or format or (capture and not variant.is_dense):  # other contenders go on with the rest
            stack.callback(shutil.rmtree, bundle.path, ignore_errors=True)
        samples = len(case.labels)
        runtime = stack.enter_context(Runtime(bundle, case.device, capture=samples if capture else None))
        for engine in runtime.engines.values():
            if cast(Any, engine).session.get_providers()[0] != name:
                raise Absent(f"onnxruntime {ort.__version__} fell back from {name}, whose libraries do not load here")
        return _prepared(lambda: runtime.generate(case.labels, SEED, batch=samples), capture)

    return prepare


def tensorrt(capture: bool, case: Case, stack: ExitStack, *, format: str | None = None) -> Prepare:
    """A per-mask bundle, of floats or in `format`, as engines built here: TensorRT's, or else TensorRT-RTX's."""
    _need_cuda(case)
    _need("onnx", "onnx_ir", "onnxscript")
    try:
        from hcompress_runtime import Runtime
        from hcompress_runtime.backends import choose_flavor, load, require_gpu
        from hcompress_runtime.engine_cache import build_engines

        flavor = choose_flavor("auto")
        load(flavor)
        require_gpu(flavor)
        importlib.import_module("cuda.bindings.runtime")
    except (ImportError, HcompressError) as error:
        raise Absent(str(error)) from error
    batch = len(case.labels)

    def tell(done: int, total: int, what: str) -> None:
        case.say(f"engine {done} of {total}: {what}")

    def prepare(variant: Variant) -> Run:
        bundle = case.bundle(variant, "per-mask", format)
        build_engines(bundle, flavor.name, batch=(batch, batch, batch), progress=tell)
        runtime = stack.enter_context(Runtime(bundle, flavor.name, capture=batch if capture else None))
        return _prepared(lambda: runtime.generate(case.labels, SEED, batch=batch), capture)

    return prepare


@dataclass(frozen=True)
class Contender:
    """open: see above; share: of the time left, which it may take; few: whether it gets the masks of few rows.

    in_torch: whether its memory is torch's, on top of the weights of `eager`
    tolerance: of its samples against those of the float model; None: that of the precision
    """

    open: Callable[[Case, ExitStack], Prepare]
    share: float
    few: bool = False
    in_torch: bool = False
    tolerance: float | None = None


EIGHT_BITS = 0.25  # ranges are those of one sample; this finds what is broken, not what is worse
CONTENDERS = {  # most important first
    "PyTorch eager": Contender(eager, 0.5, in_torch=True),
    "PyTorch, CUDA graphs": Contender(graphs, 0.5, in_torch=True),
    "ONNX Runtime, per-mask": Contender(partial(onnxruntime, "per-mask", False), 0.5),
    "ONNX Runtime, CUDA graphs": Contender(partial(onnxruntime, "per-mask", True), 0.4),
    "TensorRT": Contender(partial(tensorrt, False), 0.6, few=True),
    "TensorRT, CUDA graphs": Contender(partial(tensorrt, True), 0.3, few=True),
    "TensorRT, W8A8": Contender(partial(tensorrt, False, format="w8a8"), 0.4, few=True, tolerance=EIGHT_BITS),
    "TensorRT, FP8": Contender(partial(tensorrt, False, format="fp8"), 0.4, few=True, tolerance=EIGHT_BITS),
    "PyTorch, INT8 products": Contender(partial(products, "w8a8"), 0.3, in_torch=True, tolerance=EIGHT_BITS),
    "PyTorch, FP8 products": Contender(partial(products, "fp8"), 0.3, in_torch=True, tolerance=EIGHT_BITS),
    "ONNX Runtime, W8A8": Contender(partial(onnxruntime, "per-mask", False, format="w8a8"), 0.4, tolerance=EIGHT_BITS),
    "torch.compile, CUDA graphs": Contender(compiled, 0.8, few=True, in_torch=True),
    "ONNX Runtime, switch": Contender(partial(onnxruntime, "switch", False), 1.0),
}


def _prepared(run: Run, capture: bool) -> Run:
    """`run`, after the two generations that a capture takes: replaying is what is compared and timed."""
    for _ in range(3 if capture else 0):
        run()
    return run


def _need(*modules: str) -> None:
    absent = [module for module in modules if not find_spec(module)]
    if absent:
        raise Absent(f"{', '.join(absent)} not installed")


def _need_cuda(case: Case) -> None:
    if case.device != "cuda":
        raise Absent("needs a CUDA device")


def _finished(samples: Tensor) -> Samples:
    """On the host, once all work on the device is done."""
    if samples.is_cuda:
        torch.cuda.synchronize()
    return samples.float().cpu().numpy()
