"""Step graphs on ONNX Runtime, CPU or CUDA.

A bundle is several sessions that run in turn, and ONNX Runtime gives each its own of everything. Taken back here:

- activations: one arena for all sessions of the process. Zoo model, 20 sessions, 64 samples: 0.5 GB instead of 1.9.
- threads: a pool spins while its own session runs and sleeps otherwise, or it would keep the cores from the next
  session's. Zoo model, two threads, 8 samples: 156 ms; 191 where no pool ever spins, 500 where all always do.
- weights: all sessions point into one file, but each re-packs what it uses for its kernels, as a private copy. That is
  worth 3 % (8 samples) to 10 % (one sample) on this model and more on others, so it stays on until the copies would
  fill memory; without it, sessions share the file's pages. The `switch` layout has but one session and copy; in
  `per-mask` weights are inputs, which nothing packs and all sessions share.

With `capture`, CUDA replays each call as a graph (the provider's `enable_cuda_graph`). A recording holds for the
addresses it was made with, so outputs are written where the last of their name was: `cache_out.<slot>` has one place in
all sessions, which no step both reads and writes; `ahead_next` has two in turn, as has a slot whose last value is kept
as `<slot>.before`. Slots then take room for all, not the plan's peak. A recording is made when the same addresses have
come together twice. Nobody has run this on a GPU yet.
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
from hcompress_runtime.engine import Engine, Value
from hcompress_runtime.errors import BundleError, EngineError, InputError, missing
from hcompress_runtime.weights import find, map_weights, widen

SLOT, WEIGHT = "cache_in.", "w."
BFLOAT16, FLOAT8E4M3FN = 16, 17  # in ONNX; NumPy has no such types
RAW = {np.dtype(np.uint16): BFLOAT16, np.dtype(np.uint8): FLOAT8E4M3FN}  # what hcompress_runtime.weights has them as
ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": BFLOAT16}
PREPACK_LIMIT_BYTES = 1 << 30  # of weights, each session's counted; beyond, sessions share the file's pages
OLDEST = (1, 30)  # version of onnxruntime: before, a binding that is cleared takes its results with it
PROVIDERS = {"cpu": ("CPUExecutionProvider", "cpu"), "cuda": ("CUDAExecutionProvider", "gpu")}


@contextmanager
def sessions_of(
    bundle: Bundle,
    provider: str = "cpu",
    threads: int | None = None,
    prepack: bool | None = None,
    capture: int | None = None,
) -> Iterator[dict[str, Engine]]:
    """Graph file -> its session, loaded, for all graphs of `bundle`; freed with the context.

    prepack: None re-packs weights as long as that makes one copy of them, or few bytes
    capture: run exactly so many samples at once, on CUDA as CUDA graphs

    Raises as OnnxRuntime does, BundleError for a `switch` bundle to capture.
    """
    if capture and bundle.layout == "switch":
        raise BundleError(f"{bundle.path} has layout 'switch', which cannot be captured; export it with per-mask")
    if prepack is None:
        prepack = len(bundle.weight_bytes) == 1 or sum(bundle.weight_bytes.values()) <= PREPACK_LIMIT_BYTES
    weights = SharedWeights(bundle.path / WEIGHTS, provider) if bundle.layout == "per-mask" else None
    places = Places(capture) if capture else None
    with ExitStack() as stack:
        yield {
            graph: stack.enter_context(OnnxRuntime(bundle.path / graph, provider, threads, prepack, weights, places))
            for graph in bundle.all_graphs
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
            if (element := RAW.get(array.dtype)) is None:
                self.values[name] = OrtValue.ortvalue_from_numpy(array, self.provider)
            else:
                self.values[name] = value = OrtValue.ortvalue_from_shape_and_type(array.shape, element, self.provider)
                value.update_inplace(OrtValue.ortvalue_from_numpy_with_onnx_type(array, element))
        return self.values[name]


@final
class Places:
    """Where sessions that are captured for `samples` write: values that outlast a run, by the name of the output."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.values: dict[str, list[Value]] = {}

    def find(self, name: str, taken: set[int]) -> Value | None:
        """A place for the output `name` that is not among the addresses `taken`; None where there is none yet."""
        return next((value for value in self.values.get(name, ()) if value.data_ptr() not in taken), None)


@final
class OnnxRuntime(Engine):
    """One step graph as an ONNX Runtime session.

    graph:    file of the graph
    provider: a key of PROVIDERS
    threads:  of one operator; None leaves it to ONNX Runtime (all physical cores)
    prepack:  re-pack the weights, see above
    weights:  what to bind where weights are inputs; one for all sessions
    places:   where outputs go if runs are to be captured; one for all sessions

    Entering raises MissingExtra where onnxruntime or the provider is absent, BundleError for a graph that it rejects,
    EngineError for a precision that the provider does not compute in.
    """

    def __init__(
        self,
        graph: Path,
        provider: str = "cpu",
        threads: int | None = None,
        prepack: bool = True,
        weights: SharedWeights | None = None,
        places: Places | None = None,
    ) -> None:
        if provider not in PROVIDERS:
            raise InputError(f"there is no provider {provider!r}; choose from: {', '.join(PROVIDERS)}, trt, rtx")
        self.graph, self.provider, self.threads, self.prepack = graph, provider, threads, prepack
        self.weights, self.places = weights, places
        if places:
            self.batches = (places.samples, places.samples)

    def __enter__(self) -> Self:
        # A blocked layout pays for stacks of convolutions; here it reorders around the one that makes patches.
        without, samples = ["NchwcTransformer"], self.places and self.places.samples
        self.session = open_session(
            self.graph, self.provider, self.threads, prepack=self.prepack, without=without, capture=samples
        )
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.bound = {name: self.weights[name] for name in inputs if self.weights and name.startswith(WEIGHT)}
        self.slots = {name: _empty(value) for name, value in inputs.items() if name.startswith(SLOT)}
        self.feeds = [name for name in inputs if name not in self.slots.keys() | self.bound.keys()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.recordings: dict[tuple[int, ...], int] = {}
        return self

    def __exit__(self, *exception: object) -> None:
        del self.session
        self.bound, self.weights, self.places = {}, None, None

    def infer(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """See Engine. Everything stays on the device; a slot that holds nothing is bound empty."""
        binding = self.session.io_binding()
        given = {name: inputs[name] for name in self.feeds}
        given |= {name: inputs.get(name, nothing) for name, nothing in self.slots.items()}
        for name, value in (given | self.bound).items():
            binding.bind_ortvalue_input(name, value)
        if not self.places:
            for name in self.outputs:
                binding.bind_output(name, self.provider)
            self.session.run_with_iobinding(binding)
            return self._results(binding)
        addresses = [value.data_ptr() for value in given.values()]
        held = {value.data_ptr() for value in inputs.values()}  # also what a later call will be given
        places = {name: self.places.find(name, held) for name in self.outputs}
        for name, place in places.items():
            if place is None:
                binding.bind_output(name, self.provider)
            else:
                binding.bind_ortvalue_output(name, place)
        known = None not in places.values()
        key = (*addresses, *(place.data_ptr() for place in places.values() if place is not None))
        self.session.run_with_iobinding(binding, _numbered(self.recordings.get(key, -1) if known else -1))
        results = self._results(binding)
        if known:
            self.recordings.setdefault(key, len(self.recordings))
        for name in (name for name, place in places.items() if place is None):
            self.places.values.setdefault(name, []).append(results[name])
        return results

    def _results(self, binding: Any) -> dict[str, Value]:
        """The outputs by name. The binding lets go of everything: merely dropped, it holds its values for a while."""
        results = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        return results

    def put(self, array: NDArray[Any], into: Value | None = None) -> Value:
        """See Engine. On a CPU the value is the array itself."""
        from onnxruntime import OrtValue

        array = np.asarray(array, order="C")
        if into is None:
            return OrtValue.ortvalue_from_numpy(array, self.provider)
        into.update_inplace(array)
        return into

    @staticmethod
    def nbytes(value: Value) -> int:
        """See Engine."""
        return int(value.tensor_size_in_bytes())

    @staticmethod
    def to_numpy(value: Value) -> NDArray[Any]:
        """See Engine; bfloat16 as float32."""
        from onnxruntime import OrtValue

        if value.element_type() != BFLOAT16:
            return np.array(value.numpy())
        bits = np.empty(value.shape(), np.uint16)
        OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16).update_inplace(value)
        return widen(bits)


def open_session(
    graph: Path,
    provider: str,
    threads: int | None,
    *,
    prepack: bool = True,
    without: Sequence[str] = (),
    capture: int | None = None,
    profile: Path | None = None,
) -> Any:
    """A session of `graph` without the optimizers called `without`.

    Raises MissingExtra, BundleError, and EngineError for a precision that the provider has no kernels for.

    capture: fix the batch to so many samples, and on CUDA let runs be recorded
    profile: write a profile of its runs to a file of this name and more
    """
    name, extra = PROVIDERS[provider]
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise missing("onnxruntime", extra) from error
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < OLDEST:  # older ones crash in `_results`
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"onnxruntime {ort.__version__} is too old", f"pip install 'onnxruntime>={oldest}'")
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
    if capture:
        options.add_free_dimension_override_by_name("batch", capture)  # shapes become constants, none left to a CPU
    settings = [{"enable_cuda_graph": str(int(bool(capture)))}] if provider == "cuda" else [{}]
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return ort.InferenceSession(str(graph), options, [name], settings, disabled_optimizers=[*without])
    except Exception as error:  # onnxruntime's exceptions share no base class but this one
        reason = " ".join(str(error).split())
        if "NOT_IMPLEMENTED" in reason:
            raise EngineError(
                f"onnxruntime {ort.__version__} has no {provider} kernel for what {graph} holds ({reason})",
                "bfloat16 takes a GPU: export it with --dtype float16, or with --no-prove to run it elsewhere",
            ) from error
        raise BundleError(f"onnxruntime cannot load {graph} ({reason}); export it again") from error


def _empty(slot: Any) -> Any:
    """What the `switch` graph is given for a slot that its step does not read."""
    from onnxruntime import OrtValue

    shape = [size if isinstance(size, int) else 0 for size in slot.shape]
    return OrtValue.ortvalue_from_shape_and_type(shape, ELEMENTS[slot.type])


def _numbered(recording: int) -> Any:
    """Options of a run that is recorded under this number or replays that recording; -1 for neither."""
    from onnxruntime import RunOptions

    options = RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(recording))
    return options


@cache
def _share_arena() -> None:
    """One CPU arena for all sessions that ask for it, made once a process."""
    import onnxruntime as ort

    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, None)
