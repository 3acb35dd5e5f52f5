"""Step graphs on ONNX Runtime, CPU or CUDA.

A bundle is several sessions that run in turn, and ONNX Runtime gives each its own of everything. Taken back here:

- activations: one arena for all sessions of the process. Zoo model, 20 sessions, 64 samples: 0.5 GB instead of 1.9.
- threads: a pool spins while its own session runs and sleeps otherwise, or it would keep the cores from the next
  session's. Zoo model, two threads, 8 samples: 156 ms; 191 where no pool ever spins, 500 where all always do.
- weights: all sessions point into one file, but each re-packs what it uses for its kernels, as a private copy. That is
  worth 3 % (8 samples) to 10 % (one sample) on this model and more on others, so it stays on until the copies would
  fill memory; without it, sessions share the file's pages. The `switch` layout has but one session and copy; in
  `per-mask` weights are inputs, which nothing packs and all sessions share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self, final

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.bundle import WEIGHTS, Bundle
from hcompress_runtime.engine import Engine, SlotValue
from hcompress_runtime.errors import BundleError, InputError, missing
from hcompress_runtime.weights import find, map_weights

READ, WRITTEN, WEIGHT = "cache_in.", "cache_out.", "w."
FLOAT8E4M3FN = 17  # in ONNX; NumPy has no such type
ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PREPACK_LIMIT_BYTES = 1 << 30  # of weights, each session's counted; beyond, sessions share the file's pages
PROVIDERS = {"cpu": ("CPUExecutionProvider", "cpu"), "cuda": ("CUDAExecutionProvider", "gpu")}


@contextmanager
def sessions_of(
    bundle: Bundle, provider: str = "cpu", threads: int | None = None, prepack: bool | None = None
) -> Iterator[dict[str, Engine]]:
    """Graph file -> its session, loaded, for every distinct graph of `bundle`; freed with the context.

    prepack: None re-packs weights as long as that makes one copy of them, or few bytes. Raises as OnnxRuntime does.
    """
    if prepack is None:
        prepack = len(bundle.weight_bytes) == 1 or sum(bundle.weight_bytes.values()) <= PREPACK_LIMIT_BYTES
    weights = SharedWeights(bundle.path / WEIGHTS, provider) if bundle.layout == "per-mask" else None
    with ExitStack() as stack:
        yield {
            graph: stack.enter_context(
                OnnxRuntime(bundle.path / graph, provider=provider, threads=threads, prepack=prepack, weights=weights)
            )
            for graph in dict.fromkeys(bundle.graphs)
        }


@final
class SharedWeights:
    """The weights in `file` as ONNX Runtime's values, each made once: on a CPU the file's pages, elsewhere a copy."""

    def __init__(self, file: Path, provider: str) -> None:
        self.arrays, self.provider = map_weights(file), provider
        self.values: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The OrtValue of a tensor, or of rows of one."""
        from onnxruntime import OrtValue

        if name not in self.values:
            array = find(self.arrays, name)
            if array.dtype != np.uint8:
                self.values[name] = OrtValue.ortvalue_from_numpy(array, self.provider)
            elif self.provider == "cpu":
                self.values[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(array, FLOAT8E4M3FN)
            else:
                self.values[name] = value = OrtValue.ortvalue_from_shape_and_type(
                    array.shape, FLOAT8E4M3FN, self.provider
                )
                value.update_inplace(OrtValue.ortvalue_from_numpy_with_onnx_type(array, FLOAT8E4M3FN))
        return self.values[name]


@final
class OnnxRuntime(Engine):
    """One step graph as an ONNX Runtime session.

    graph:    file of the graph
    provider: a key of PROVIDERS
    threads:  of one operator; None leaves it to ONNX Runtime (all physical cores)
    prepack:  re-pack the weights, see above
    weights:  what to bind where weights are inputs; one for all sessions

    Entering raises MissingExtra where onnxruntime or the provider is absent, BundleError for a graph that it rejects.
    """

    def __init__(
        self,
        graph: Path,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        prepack: bool = True,
        weights: SharedWeights | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise InputError(f"there is no provider {provider!r}; choose from: {', '.join(PROVIDERS)}, trt, rtx")
        self.graph, self.provider, self.threads, self.prepack = graph, provider, threads, prepack
        self.weights = weights

    def __enter__(self) -> Self:
        # A blocked layout pays for stacks of convolutions; here it reorders around the one that makes patches.
        without = ["NchwcTransformer"]
        self.session = open_session(self.graph, self.provider, self.threads, prepack=self.prepack, without=without)
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.bound = {name: self.weights[name] for name in inputs if self.weights and name.startswith(WEIGHT)}
        self.reads = {name.removeprefix(READ): _empty(value) for name, value in inputs.items() if name.startswith(READ)}
        self.feeds = [name for name in inputs if not name.startswith(READ) and name not in self.bound]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.writes = [name.removeprefix(WRITTEN) for name in self.outputs[1:]]
        return self

    def __exit__(self, *exception: object) -> None:
        del self.session

    def infer(
        self, feeds: Mapping[str, NDArray[Any]], slots: Mapping[str, SlotValue]
    ) -> tuple[NDArray[np.float32], dict[str, SlotValue]]:
        """See Engine. Caches stay on the device, handed on uncopied; a slot that holds nothing is bound empty."""
        binding = self.session.io_binding()
        for name in self.feeds:
            binding.bind_cpu_input(name, feeds[name])
        for name, value in self.bound.items():
            binding.bind_ortvalue_input(name, value)
        for slot, nothing in self.reads.items():
            binding.bind_ortvalue_input(READ + slot, slots.get(slot, nothing))
        for name in self.outputs:
            binding.bind_output(name, "cpu" if name == "model_output" else self.provider)
        self.session.run_with_iobinding(binding)
        output, *written = binding.get_outputs()
        return output.numpy(), dict(zip(self.writes, written, strict=True))

    @staticmethod
    def nbytes(value: SlotValue) -> int:
        """See Engine."""
        return int(value.tensor_size_in_bytes())

    @staticmethod
    def to_numpy(value: SlotValue) -> NDArray[Any]:
        """See Engine."""
        return np.array(value.numpy())


def open_session(
    graph: Path,
    provider: str,
    threads: int | None,
    *,
    prepack: bool = True,
    without: Sequence[str] = (),
    profile: Path | None = None,
) -> Any:
    """A session of `graph` without the optimizers called `without`. Raises MissingExtra, BundleError.

    profile: write a profile of its runs to a file of this name and more
    """
    name, extra = PROVIDERS[provider]
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise missing("onnxruntime", extra) from error
    if name not in ort.get_available_providers():
        raise missing(f"an onnxruntime with {name}", extra)
    _share_arena()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # keeps operands close: 2 to 5 % faster
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return ort.InferenceSession(str(graph), options, providers=[name], disabled_optimizers=[*without])
    except Exception as error:  # onnxruntime's exceptions share no base class but this one
        reason = " ".join(str(error).split())
        raise BundleError(f"onnxruntime cannot load {graph} ({reason}); export it again") from error


def _empty(slot: Any) -> Any:
    """What the `switch` graph is given for a slot that its step does not read."""
    from onnxruntime import OrtValue

    shape = [size if isinstance(size, int) else 0 for size in slot.shape]
    return OrtValue.ortvalue_from_numpy(np.zeros(shape, ELEMENTS[slot.type]))


@cache
def _share_arena() -> None:
    """One CPU arena for all sessions that ask for it, made once a process."""
    import onnxruntime as ort

    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, None)
