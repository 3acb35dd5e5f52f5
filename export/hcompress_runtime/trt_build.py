"""One step graph as one engine file of TensorRT or TensorRT-RTX.

    build_engine(graph, out, flavor="rtx", sm=89, batch=(1, 4, 8), per_sample={"cache_in.0.attn": 512})

Each build runs in a process of its own, `python -m hcompress_runtime.trt_build`, which reads one JSON object and writes
one: after a build that failed, TensorRT-RTX may refuse the next one in the same process, and what needs too much memory
should take nothing else with it.

Engine files are packed, gzip: kernels repeat and are padded, so a tenth of the bytes is left. `gunzip` gives what
TensorRT's own tools take.

The network is strongly typed: precision is what the graph says. Weights come from the graph's external data (TensorRT's
parser reads safetensors by offset) or stay inputs, `w.*`; then an engine holds kernels only.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.backends import FLAVORS, Flavor, check_target, load, make_logger, require_gpu
from hcompress_runtime.bake import bake
from hcompress_runtime.errors import BundleError, DiskError, EngineError, HcompressError, InputError, MissingExtra
from hcompress_runtime.files import write_atomically

Batch = tuple[int, int, int]
"""Least, best and most samples at once; where all three are equal, every shape in the engine is static."""
RAISED = {kind.__name__: kind for kind in (BundleError, DiskError, EngineError, InputError, MissingExtra)}


@dataclass(frozen=True)
class Request:
    """What `build_engine` was asked, as it goes to the process that does it."""

    graph: str
    out: str
    flavor: str
    sm: int | None
    batch: Batch
    per_sample: Mapping[str, int]
    timing_cache: str | None
    constants: Mapping[str, Any]


@dataclass(frozen=True)
class Built:
    """An engine that was built.

    version: of the library
    engine_bytes, sha256: of the file; unpacked_bytes of what it is unpacked
    seconds: parsing and building; without starting the process
    inputs, outputs: name -> shape of each, -1 where it grows with the batch
    """

    version: str
    sm: int
    engine_bytes: int
    unpacked_bytes: int
    sha256: str
    seconds: float
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]


def build_engine(
    graph: Path,
    out: Path,
    *,
    flavor: str,
    sm: int | None,
    batch: Batch,
    per_sample: Mapping[str, int],
    timing_cache: Path | None = None,
    constants: Mapping[str, NDArray[np.float32]] | None = None,
) -> Built:
    """Build the ONNX file `graph` into the engine file `out`, packed, which is replaced whole or not touched.

    flavor:       a key of FLAVORS
    sm:           compute capability as in sm_89; None, and for TensorRT always, that of the GPU here
    per_sample:   input name -> how much of its first dimension one sample takes; 1 where absent
    constants:    inputs that the engine shall hold as they are here, instead of asking for them
    timing_cache: TensorRT's file of kernel timings, read and brought up to date; TensorRT-RTX has none

    Raises BundleError for a graph that is broken or that the library cannot take, with the operator and its layer;
    InputError for a batch; EngineError for what is missing on this machine; MissingExtra without the library.
    """
    check_batch(batch)
    timings = str(timing_cache) if timing_cache else None
    plain = {name: array.tolist() for name, array in (constants or {}).items()}
    request = Request(str(graph), str(out), flavor, sm, batch, dict(per_sample), timings, plain)
    command = [sys.executable, "-P", "-m", "hcompress_runtime.trt_build"]
    done = subprocess.run(command, input=json.dumps(asdict(request)), capture_output=True, text=True, check=False)
    if done.returncode < 0:
        killed = signal.Signals(-done.returncode).name
        raise EngineError(f"the build of {graph} was ended by {killed}", "it may have run out of memory; see dmesg")
    if done.returncode:
        raise RuntimeError(f"building {graph} failed:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "kind" in answer:
        raise RAISED[answer["kind"]](answer["message"])
    shapes = {side: {name: tuple(shape) for name, shape in answer.pop(side).items()} for side in ("inputs", "outputs")}
    return Built(**answer, inputs=shapes["inputs"], outputs=shapes["outputs"])


def check_batch(batch: Batch) -> None:
    """Raise InputError where `batch` is not least, best, most."""
    if len(batch) != 3 or not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise InputError(f"batch {batch} should be least, best and most samples at once, such as 1,4,8")


def _build(request: Request) -> Built:
    """What `build_engine` promises, in this process."""
    flavor, graph = FLAVORS[request.flavor], Path(request.graph)
    timing_cache = Path(request.timing_cache) if request.timing_cache and flavor.name == "trt" else None
    trt = load(flavor)
    sm = _target(trt, flavor, request.sm)
    started = time.monotonic()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    constants = {name: np.array(values, np.float32) for name, values in request.constants.items()}
    _parse(parser, network, graph, constants, f"{flavor.title} {trt.__version__}")
    config = builder.create_builder_config()
    if flavor.name == "rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{sm}"], 0)
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or its runs could not be captured as a CUDA graph
    _set_batch(builder, network, config, request)
    if timing_cache:
        _use_timings(config, timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BundleError(f"{flavor.title} {trt.__version__} cannot build {graph} for sm_{sm}: {logger.reason()}")
    content = gzip.compress(memoryview(serialized), compresslevel=6, mtime=0)
    write_atomically(Path(request.out), content)
    if timing_cache:
        cache = config.get_timing_cache()
        write_atomically(timing_cache, memoryview(cache.serialize()))
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return Built(
        version=trt.__version__,
        sm=sm,
        engine_bytes=len(content),
        unpacked_bytes=memoryview(serialized).nbytes,
        sha256=hashlib.sha256(content).hexdigest(),
        seconds=time.monotonic() - started,
        inputs={tensor.name: tuple(tensor.shape) for tensor in inputs},
        outputs={tensor.name: tuple(tensor.shape) for tensor in outputs},
    )


def _target(trt: Any, flavor: Flavor, sm: int | None) -> int:
    """The compute capability to build for."""
    if flavor.name == "rtx" and sm is not None:
        check_target(trt, sm)
        return sm
    gpu = require_gpu(flavor)
    if sm not in (None, gpu.sm):
        problem = f"TensorRT builds for the GPU at hand, sm_{gpu.sm}, not for sm_{sm}"
        raise EngineError(problem, "build on such a GPU, or for RTX GPUs with --flavor rtx")
    return gpu.sm


def _parse(parser: Any, network: Any, graph: Path, constants: Mapping[str, NDArray[np.float32]], library: str) -> None:
    """Fill `network`. The line of the BundleError names each operator that is refused, and its layer."""
    again = "export the bundle again, or run it on ONNX Runtime"
    parsed = parser.parse(bake(graph, constants), str(graph)) if constants else parser.parse_from_file(str(graph))
    if not parsed:
        reasons = []
        for problem in (parser.get_error(index) for index in range(parser.num_errors)):
            layer = f"operator {problem.node_operator()} in layer {problem.node_name()!r}, "
            what = f"{problem.code().name}: {' '.join(problem.desc().split())}"
            reasons.append(layer + what if problem.node_operator() else what)
        more = f" / and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise BundleError(f"{library} cannot take {graph}: {' / '.join(reasons[:3])}{more}; {again}")
    if not network.num_outputs:  # bytes that are no ONNX at all can parse as an empty message
        raise BundleError(f"{graph} holds no graph; {again}")


def _set_batch(builder: Any, network: Any, config: Any, request: Request) -> None:
    """Give every input its shape, or where the batch may vary, its range of shapes."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        if -1 in shape[1:]:
            problem = f"input {tensor.name} of {request.graph} has shape {shape}"
            raise BundleError(f"{problem}; only its first dimension may be open")
        each = request.per_sample.get(tensor.name, 1)
        least, best, most = ((each * size, *shape[1:]) for size in request.batch)
        if least == most:
            tensor.shape = best
        else:
            profile.set_shape(tensor.name, least, best, most)
            dynamic = True
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise BundleError(f"batch {request.batch} does not fit {request.graph}; export the bundle again")


def _use_timings(config: Any, file: Path) -> None:
    """Start from the timings in `file`, if they are there and of this GPU and version."""
    kept = file.read_bytes() if file.is_file() else b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def main() -> None:
    """Do what the JSON object on stdin asks for; answer with one on stdout."""
    try:
        answer = asdict(_build(Request(**json.loads(sys.stdin.read()))))
    except HcompressError as error:
        answer = {"kind": type(error).__name__, "message": str(error)}
    print("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
