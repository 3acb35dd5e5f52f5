"""GPU memory, one stream and captured work: what engines need of CUDA, through NVIDIA's `cuda-python`; no torch.

Everything runs on the one stream of a Device, in the order in which it was asked for. So memory that nothing refers to
any more may be handed out again at once: whatever still uses it comes earlier on the stream.

It follows CUDA's documented calls, and runs in tests against a machine without a GPU only as far as its first error.
"""

from __future__ import annotations

import heapq
import importlib
from collections.abc import Callable
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.backends import Flavor, require_gpu
from hcompress_runtime.errors import EngineError, missing

ALIGNMENT = 256  # bytes, of every address that TensorRT is given; what cudaMalloc returns has it


@final
class Block:
    """Device memory; it goes back to its device when nothing refers to it any more."""

    __slots__ = ("_free", "address", "nbytes")

    def __init__(self, address: int, nbytes: int, free: dict[int, list[int]]) -> None:
        self.address, self.nbytes, self._free = address, nbytes, free

    def __del__(self) -> None:
        heapq.heappush(self._free.setdefault(self.nbytes, []), self.address)


@final
class Device:
    """The first GPU, as `with` opens and empties it. Entering raises EngineError and MissingExtra."""

    def __init__(self, flavor: Flavor) -> None:
        self.flavor = flavor
        self.owned: set[int] = set()
        self.free: dict[int, list[int]] = {}
        self.graphs: list[Any] = []

    def __enter__(self) -> Self:
        self.gpu = require_gpu(self.flavor)
        try:
            self.cudart = importlib.import_module("cuda.bindings.runtime")
        except ModuleNotFoundError as error:
            raise missing("cuda-python", self.flavor.extra) from error
        cudart = self.cudart
        self.stream = self._check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        return self

    def __exit__(self, *exception: object) -> None:
        cudart = self.cudart
        cudart.cudaStreamSynchronize(self.stream)
        for graph in self.graphs:
            cudart.cudaGraphExecDestroy(graph)
        for address in self.owned:
            cudart.cudaFree(address)
        cudart.cudaStreamDestroy(self.stream)
        self.owned, self.free, self.graphs = set(), {}, []

    @property
    def handle(self) -> int:
        """The stream as a number, as TensorRT wants it."""
        return int(self.stream)

    def allocate(self, nbytes: int) -> Block:
        """Memory that holds anything; freed memory of the same size first. Raises EngineError where none is left.

        The lowest address of what is free: a schedule that begins with the same blocks free meets the same addresses
        again, in whatever order they were freed before. That is what captured work is found by.
        """
        nbytes = max(nbytes, 1)
        address = heapq.heappop(addresses) if (addresses := self.free.get(nbytes)) else self._new(nbytes)
        return Block(address, nbytes, self.free)

    def upload(self, array: NDArray[Any]) -> Block:
        """A copy of `array`, which must be contiguous."""
        block = self.allocate(array.nbytes)
        self.write(block, array)
        return block

    def write(self, block: Block, array: NDArray[Any]) -> None:
        """Copy `array`, contiguous, into `block`; it may change once `wait` has returned."""
        self._copy(block.address, array.ctypes.data, array.nbytes, self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def read(self, block: Block, array: NDArray[Any]) -> None:
        """Copy `block` into `array`, contiguous; it holds that once `wait` has returned."""
        self._copy(array.ctypes.data, block.address, array.nbytes, self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def to_numpy(self, block: Block, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """What `block` holds, once everything before is done."""
        array = np.empty(shape, dtype)
        self.read(block, array)
        self.wait()
        return array

    def wait(self) -> None:
        """Return when all that was asked for is done."""
        self._check(self.cudart.cudaStreamSynchronize(self.stream))

    def capture(self, run: Callable[[], None]) -> Any:
        """What `run` puts on the stream, as one graph for `launch`; nothing of it is executed now."""
        cudart = self.cudart
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(cudart.cudaStreamBeginCapture(self.stream, mode))
        try:
            run()
        finally:
            ended = cudart.cudaStreamEndCapture(self.stream)
        recorded = self._check(ended)
        graph = self._check(cudart.cudaGraphInstantiate(recorded, 0))
        self._check(cudart.cudaGraphDestroy(recorded))
        self.graphs.append(graph)
        return graph

    def launch(self, graph: Any) -> None:
        """Run what was captured, with the addresses that it was captured with."""
        self._check(self.cudart.cudaGraphLaunch(graph, self.stream))

    def trim(self) -> None:
        """Hand memory that nothing refers to back to the driver."""
        self.wait()
        for addresses in self.free.values():
            for address in addresses:
                self._check(self.cudart.cudaFree(address))
            self.owned.difference_update(addresses)
            addresses.clear()

    def _new(self, nbytes: int) -> int:
        cudart = self.cudart
        full = cudart.cudaError_t.cudaErrorMemoryAllocation
        error, address = cudart.cudaMalloc(nbytes)
        if error == full:
            self.trim()
            error, address = cudart.cudaMalloc(nbytes)
        if error == full:
            raise EngineError(
                f"{self.gpu.name} has no {nbytes / 1e6:.0f} MB left", "generate fewer samples at once with --batch"
            )
        self.owned.add(address := int(self._check((error, address))))
        return address

    def _copy(self, to: int, source: int, nbytes: int, kind: Any) -> None:
        self._check(self.cudart.cudaMemcpyAsync(to, source, nbytes, kind, self.stream))

    def _check(self, answer: tuple[Any, ...]) -> Any:
        """What a call gave, without its error code. Raises EngineError where that is one."""
        cudart, (error, *result) = self.cudart, answer
        if error != cudart.cudaError_t.cudaSuccess:
            _, name = cudart.cudaGetErrorName(error)
            raise EngineError(f"{self.gpu.name} failed: {name.decode()}", "look at what nvidia-smi says")
        return result[0] if result else None
