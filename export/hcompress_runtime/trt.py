"""Step graphs as engines of TensorRT or TensorRT-RTX. Parsing and ahead-of-time builds proven, execution not.

No machine with such a GPU and library has run this file yet: its calls follow the documentation and are checked by name
and signature against TensorRT-RTX 1.7 and the bindings of TensorRT 10.13 and 11.4, see tests/test_trt_names.py.

A bundle is several engines that run in turn on one stream, and they share whatever can be shared:

- weights: where they are inputs (`w.*`, the `per-mask` layout), each is on the GPU once and every engine is given its
  address. Rows of a tensor, `w.<hash>[a:b]`, lie inside it, unless their address is not a multiple of 256 bytes.
- scratch memory: contexts are USER_MANAGED and take turns with one block, as large as the largest of them needs.
- values: blocks that one engine writes and others read, slots and latents alike, never copied. A block is used anew
  once nothing refers to it, so what slots take is the plan's peak. The host only waits for what it asks for, which in a
  generation is the finished samples.

With `capture`, a run is recorded as a CUDA graph when the same addresses have come together twice, and replayed from
then on. A schedule has a fixed order, so in generations of one batch size they always do.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.backends import choose_flavor, load, make_logger, require_gpu
from hcompress_runtime.bundle import WEIGHTS, Bundle
from hcompress_runtime.device import ALIGNMENT, Block, Device
from hcompress_runtime.engine import Engine, Value
from hcompress_runtime.engine_cache import Engines, Target, build_command, find_engines
from hcompress_runtime.errors import BundleError, EngineError, InputError
from hcompress_runtime.weights import find, map_weights, widen

SLOT, WEIGHT = "cache_in.", "w."


@contextmanager
def engines_of(bundle: Bundle, flavor: str = "auto", *, capture: int | None = None) -> Iterator[dict[str, Engine]]:
    """Graph file -> its engine, loaded, for all graphs of `bundle`; freed with the context.

    capture: run exactly so many samples at once, as CUDA graphs where the library allows it

    Raises InputError for a `capture` that engines are not built for, MissingExtra and EngineError for what this machine
    lacks, BundleError with the build command for engines that are absent, broken, or of another version or GPU.
    """
    chosen = choose_flavor(flavor)
    target = Target(chosen.name, load(chosen).__version__, require_gpu(chosen).sm)
    engines = find_engines(bundle, target)
    least, _, most = engines.batch
    if capture and not least <= capture <= most:
        again = build_command(bundle.path, target, [capture])
        raise InputError(f"engines in {bundle.path} take {least} to {most} samples, not {capture}; build: {again}")
    with ExitStack() as stack:
        shared = stack.enter_context(Shared(bundle, engines))
        yield {
            graph: stack.enter_context(TensorRT(file, shared, capture=capture)) for graph, file in engines.files.items()
        }


@final
class Shared:
    """What the engines of one bundle have in common: the library, a stream, weights and memory on the GPU."""

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        self.bundle, self.engines = bundle, engines
        self.flavor = choose_flavor(engines.target.flavor)
        self.device = Device(self.flavor)
        self.scratch: Block | None = None
        self.bound: dict[str, tuple[Block, int]] = {}

    def __enter__(self) -> Self:
        self.trt = load(self.flavor)
        self.logger = make_logger(self.trt)
        self.arrays = map_weights(self.bundle.path / WEIGHTS)
        self.device.__enter__()
        self.runtime = self.trt.Runtime(self.logger)
        return self

    def __exit__(self, *exception: object) -> None:
        del self.runtime
        self.bound, self.scratch = {}, None
        self.device.__exit__(*exception)

    def reserve(self, nbytes: int) -> None:
        """Make scratch memory large enough for one more context."""
        if self.scratch is None or self.scratch.nbytes < nbytes:
            self.scratch = None
            self.device.trim()  # or the smaller block would lie unused
            self.scratch = self.device.allocate(nbytes)

    def weight(self, name: str) -> tuple[Block, int]:
        """The block that holds a tensor or rows of one, and their address. Raises BundleError for an unknown name."""
        if name not in self.bound:
            array, whole = find(self.arrays, name), name.partition("[")[0]
            within = array.ctypes.data - self.arrays[whole].ctypes.data
            if whole != name and within % ALIGNMENT == 0:
                block, address = self.weight(whole)
                self.bound[name] = block, address + within
            else:
                block = self.device.upload(array)
                self.bound[name] = block, block.address
        return self.bound[name]


@final
@dataclass(frozen=True)
class Held:
    """A tensor on the GPU: its memory and what that holds. NumPy lacks bfloat16: `dtype` is uint16 then, its bits."""

    block: Block
    shape: tuple[int, ...]
    dtype: Any
    device: Device


@final
class TensorRT(Engine):
    """One step graph as an engine of either flavor. Parsing and ahead-of-time builds proven, execution not.

    file:    the engine file, packed
    shared:  what it has in common with the other engines of its bundle, entered
    capture: run exactly so many samples, replayed as CUDA graphs where the library allows it

    Entering raises BundleError for an engine that cannot be loaded or wants other weights, EngineError for a full GPU.
    """

    def __init__(self, file: Path, shared: Shared, *, capture: int | None = None) -> None:
        self.file, self.shared, self.capture = file, shared, capture
        least, _, most = shared.engines.batch
        self.batches = (capture or least, capture or most)

    def __enter__(self) -> Self:
        shared, trt = self.shared, self.shared.trt
        engine = shared.runtime.deserialize_cuda_engine(gzip.decompress(self.file.read_bytes()))
        if engine is None:
            raise BundleError(f"{self.file} cannot be loaded: {shared.logger.reason()}; {self._build()}")
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(f"{self.file} cannot be run: {shared.logger.reason()}", "free memory on the GPU")
        self.engine, self.context = engine, context
        shared.reserve(engine.device_memory_size_v2)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs = [name for name in inputs if not name.startswith(WEIGHT)]
        self.feeds = [name for name in self.inputs if not name.startswith(SLOT)]
        self.outputs = [name for name in names if name not in inputs]
        self.expected = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self.dtypes = {name: _numpy_dtype(trt, engine.get_tensor_dtype(name)) for name in names}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: Block | None = None
        self.captured: dict[tuple[object, ...], Any] = {}
        self.seen: set[tuple[object, ...]] = set()
        self._bind({name: self._weight(name) for name in inputs if name.startswith(WEIGHT)})
        return self

    def __exit__(self, *exception: object) -> None:
        self.shared.device.wait()
        self.captured = {}
        del self.context, self.engine  # in this order

    def infer(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """See Engine. Everything stays on the GPU; nothing is waited for."""
        given: dict[str, Held] = {name: inputs[name] for name in self.inputs}
        self._resize(given)
        results: dict[str, Value] = {}
        for name in self.outputs:
            shape, dtype = tuple(self.context.get_tensor_shape(name)), self.dtypes[name]
            block = self.shared.device.allocate(prod(shape) * dtype.itemsize)
            results[name] = Held(block, shape, dtype, self.shared.device)
        self._run({name: value.block.address for name, value in (given | results).items()})
        return results

    def put(self, array: NDArray[Any], into: Value | None = None) -> Value:
        """See Engine."""
        device, array = self.shared.device, np.asarray(array, order="C")
        held = into or Held(device.allocate(array.nbytes), array.shape, array.dtype, device)
        device.write(held.block, array)
        device.wait()  # until then `array` may not change
        return held

    @staticmethod
    def nbytes(value: Value) -> int:
        """See Engine."""
        return int(value.block.nbytes)

    @staticmethod
    def to_numpy(value: Value) -> NDArray[Any]:
        """See Engine; bfloat16 as float32."""
        array: NDArray[Any] = value.device.to_numpy(value.block, value.shape, value.dtype)
        return widen(array) if array.dtype == np.uint16 else array

    def _weight(self, name: str) -> int:
        """The address of weights that this engine takes as an input."""
        expected, found = self.expected[name], find(self.shared.arrays, name)
        if found.shape != expected or found.itemsize != self.dtypes[name].itemsize:
            mismatch = (
                f"{found.shape} of {found.itemsize} bytes each instead of {expected} of {self.dtypes[name].itemsize}"
            )
            raise BundleError(f"{self.file} was built for other weights: {name} is {mismatch}; {self._build()}")
        return self.shared.weight(name)[1]

    def _resize(self, given: Mapping[str, Held]) -> None:
        """Tell the context the shapes of this run, where they are not those of the last."""
        shapes = {name: value.shape for name, value in given.items()}
        if shapes == self.shapes:
            return
        self.shapes, self.captured, self.seen = {}, {}, set()  # what was recorded holds for one set of shapes
        for name, shape in shapes.items():
            expected, dtype = self.expected[name], self.dtypes[name]
            fits = self.context.set_input_shape(name, shape) if -1 in expected else shape == expected
            if not fits or given[name].dtype != dtype:
                wrong = f"{name} is {given[name].dtype}{list(shape)} instead of {dtype}{list(expected)}"
                raise BundleError(f"{self.file} cannot be run: {wrong}; {self._build()}")
        self.shapes = shapes

    def _bind(self, addresses: Mapping[str, int]) -> None:
        """Tell the context where tensors are, where that is news."""
        for name, address in addresses.items():
            if self.addresses.get(name) != address and not self.context.set_tensor_address(name, address):
                raise EngineError(f"{self.file} refuses the address of {name}: {self.shared.logger.reason()}")
        self.addresses |= addresses

    def _run(self, addresses: Mapping[str, int]) -> None:
        """Put this run on the stream."""
        device, scratch = self.shared.device, self.shared.scratch
        if scratch is not None and scratch is not self.scratch:
            self.context.set_device_memory(scratch.address, scratch.nbytes)
            self.scratch = scratch
        key = (*self.shapes.items(), *addresses.items(), scratch and scratch.address)
        if (graph := self.captured.get(key)) is not None:
            device.launch(graph)
            return
        self._bind(addresses)
        self._enqueue()  # also before a capture: only outside of one may a library prepare itself
        if self.capture and key in self.seen and key not in self.captured:
            self.captured[key] = device.capture(self._enqueue) if self._can_capture() else None
        self.seen.add(key)

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.shared.device.handle):
            raise EngineError(f"{self.file} failed: {self.shared.logger.reason()}", self._build())

    def _can_capture(self) -> bool:
        """Whether runs may be recorded; TensorRT cannot be asked, and can wherever no shape depends on data."""
        if self.shared.flavor.name == "trt":
            return True
        return bool(self.context.is_stream_capturable(self.shared.device.handle))

    def _build(self) -> str:
        engines = self.shared.engines
        return f"build: {build_command(self.shared.bundle.path, engines.target, engines.batch)}"


def _numpy_dtype(trt: Any, dtype: Any) -> np.dtype[Any]:
    """NumPy's name for a type of the library; for bfloat16 and float8 that of their bits."""
    bits = {trt.DataType.BF16: np.uint16, trt.DataType.FP8: np.uint8}
    return np.dtype(bits[dtype] if dtype in bits else trt.nptype(dtype))
