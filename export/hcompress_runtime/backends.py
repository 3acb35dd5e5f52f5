"""The two TensorRT libraries, and one clear line for each way in which they or the GPU can be missing.

    trt   TensorRT 10.13 to 11 (module `tensorrt`): data-centre GPUs; builds on the GPU that will run the engine
    rtx   TensorRT-RTX 1.7 (module `tensorrt_rtx`): RTX GPUs; builds for others, without a GPU

Both have the same interface. Nothing here needs either library, CUDA's Python package or a GPU to be imported.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hcompress_runtime.errors import EngineError, InputError, missing

Version = tuple[int, ...]
FLOAT8_SM = 89  # Ada; int8 and int4 build for every target


@dataclass(frozen=True)
class Flavor:
    """One of the libraries: `versions` from the first to below the second are the ones this code is written for."""

    name: str
    title: str
    module: str
    extra: str
    versions: tuple[Version, Version]


FLAVORS = {
    "trt": Flavor("trt", "TensorRT", "tensorrt", "trt", ((10, 13), (12,))),
    "rtx": Flavor("rtx", "TensorRT-RTX", "tensorrt_rtx", "trt-rtx", ((1, 7), (2,))),
}


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, its compute capability as in sm_89, and the newest CUDA that its driver knows."""

    name: str
    sm: int
    cuda: Version


def choose_flavor(flavor: str) -> Flavor:
    """The flavor called `flavor`; "auto" takes TensorRT where it is installed beside a GPU, else TensorRT-RTX."""
    if flavor != "auto":
        if flavor not in FLAVORS:
            raise InputError(f"there is no flavor {flavor!r}; choose from: auto, {', '.join(FLAVORS)}")
        return FLAVORS[flavor]
    installed = [name for name, wanted in FLAVORS.items() if find_spec(wanted.module)]
    if not installed:
        raise EngineError("neither tensorrt nor tensorrt_rtx is installed", "pip install 'hcompress[trt-rtx]'")
    if len(installed) > 1:
        try:
            find_gpu()
        except EngineError:
            return FLAVORS["rtx"]
    return FLAVORS[installed[0]]


def load(flavor: Flavor) -> Any:
    """The library's module. Raises MissingExtra where it is absent, EngineError where it does not load or fit."""
    try:
        module = importlib.import_module(flavor.module)
    except ModuleNotFoundError as error:
        raise missing(flavor.module, flavor.extra) from error
    except (ImportError, OSError) as error:
        problem = mixed_up(str(error)) or f"{flavor.module} does not load: {str(error).partition(chr(10))[0]}"
        raise EngineError(problem, f"pip install --force-reinstall 'hcompress[{flavor.extra}]'") from error
    check_version(flavor, module.__version__)
    return module


def check_version(flavor: Flavor, found: str) -> None:
    """Raise EngineError for a version that this code is not written for."""
    least, below = flavor.versions
    if not least <= _parse(found) < below:
        wanted = f"{'.'.join(map(str, least))} or newer, below {below[0]}"
        raise EngineError(f"{flavor.title} {found} is not {wanted}", f"pip install 'hcompress[{flavor.extra}]'")


def mixed_up(reason: str) -> str | None:
    """What is wrong where the loader, whose message is `reason`, missed one TensorRT and another is installed."""
    wanted = re.search(r"lib(nvinfer\w*|nvonnxparser)\.so\.(\d+)", reason)
    if not wanted or "cannot open" not in reason:
        return None
    library, major = wanted.groups()
    here = sorted(_sonames(library) - {f"lib{library}.so.{major}"})
    beside = f"{', '.join(here)} is" if here else "no other version is either"
    return f"TensorRT {major}'s bindings need lib{library}.so.{major}, which is not here; {beside}"


def find_gpu() -> Gpu:
    """The first GPU. Raises EngineError where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineError("no NVIDIA driver (libcuda.so.1) here") from error
    if driver.cuInit(0) or not _integer(driver.cuDeviceGetCount):
        raise EngineError("the NVIDIA driver finds no GPU", "look at what nvidia-smi says")
    name = ctypes.create_string_buffer(96)
    driver.cuDeviceGetName(name, len(name), 0)
    major, minor = (_integer(driver.cuDeviceGetAttribute, attribute, 0) for attribute in (75, 76))
    cuda = _integer(driver.cuDriverGetVersion)  # 1000 major + 10 minor
    return Gpu(name.value.decode(errors="replace"), 10 * major + minor, (cuda // 1000, cuda % 1000 // 10))


def require_gpu(flavor: Flavor) -> Gpu:
    """The GPU that engines of `flavor` will run on. Raises EngineError where there is none that can."""
    gpu = find_gpu()
    check_driver(flavor, gpu)
    if flavor.name == "rtx":
        check_target(load(flavor), gpu.sm)
    return gpu


def check_driver(flavor: Flavor, gpu: Gpu) -> None:
    """Raise EngineError where the driver is older than the CUDA that the installed packages are built for."""
    needs = {name: major for name in ("cuda-bindings", flavor.module) if (major := _cuda_of(name))}
    for name, major in needs.items():
        if gpu.cuda < (major,):
            known = ".".join(map(str, gpu.cuda))
            raise EngineError(
                f"the NVIDIA driver knows CUDA {known}, but {name} needs CUDA {major}", "update the NVIDIA driver"
            )


def check_target(trt: Any, sm: int) -> None:
    """Raise EngineError for a compute capability that TensorRT-RTX has no kernels for, such as 90."""
    targets = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    if sm not in targets:
        choice = ", ".join(map(str, targets))
        raise EngineError(
            f"TensorRT-RTX does not support sm_{sm}, only {choice}", "use TensorRT there: --flavor trt on such a GPU"
        )


def check_formats(formats: Iterable[Mapping[str, Any]], sms: Sequence[int]) -> None:
    """Raise EngineError where layers are in float8, see `quantized` in a manifest, and one of `sms` has none of it."""
    old = [sm for sm in sms if sm < FLOAT8_SM]
    if old and any("fp8" in (one.get("weight"), one.get("activation")) for one in formats):
        raise EngineError(
            f"sm_{old[0]} has no float8, which needs sm_{FLOAT8_SM} or newer",
            "quantize to int8 for it, such as --method int8-max",
        )


def make_logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps what the library calls errors, in `errors`."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the library is only known at run time
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(" ".join(message.split()))

        def reason(self) -> str:
            """What was complained of since this was last asked, in one line, without what every CPU-only build says."""
            telling = [line for line in self.errors if "cudaError 35" not in line] or self.errors
            self.errors = []
            return " / ".join(telling[:2]) or "it does not say why"

    return Logger()


def _integer(function: Any, *arguments: int) -> int:
    """What a function of the CUDA driver writes to its first argument; 0 where it fails."""
    value = ctypes.c_int()
    return 0 if function(ctypes.byref(value), *arguments) else value.value


def _cuda_of(name: str) -> int | None:
    """The major version of CUDA that an installed package is built for; None where that cannot be told."""
    try:
        if name == "cuda-bindings":
            return _parse(version(name))[0]
    except PackageNotFoundError:
        return None
    for major in (13, 12):
        try:
            version(f"{name.replace('_', '-')}-cu{major}-bindings")
        except PackageNotFoundError:
            continue
        return major
    return None


def _sonames(library: str) -> set[str]:
    """Versions of lib`library` in TensorRT's wheel of libraries and where the system's loader looks."""
    spec = find_spec("tensorrt_libs")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = {file.name for folder in folders for file in folder.glob(f"lib{library}.so.*")}
    return found | {name for name in [ctypes.util.find_library(library)] if name}


def _parse(text: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
