"""`hcompress doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hcompress_runtime.backends import FLAVORS, find_gpu, load, mixed_up, require_gpu
from hcompress_runtime.errors import EngineError

Trouble = tuple[str, str | None]  # what is wrong, and the fix where there is one


@dataclass(frozen=True)
class Need:
    """Something that a command may need: `module` must import, and `check` must find no trouble."""

    name: str
    module: str
    serves: str
    extra: str
    check: Callable[[], Trouble | None] = lambda: None


@dataclass(frozen=True)
class Finding:
    """Whether a need is met here, and what is in the way where it is not."""

    name: str
    serves: str
    works: bool
    version: str | None = None
    problem: str | None = None
    fix: str | None = None


def _no_gpu() -> Trouble | None:
    try:
        find_gpu()
    except EngineError as error:
        return error.problem, error.fix
    return None


def _torch_cuda() -> Trouble | None:
    import torch

    if trouble := _no_gpu():
        return trouble
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA", "install a CUDA build of torch"
    return None if torch.cuda.is_available() else ("torch sees no GPU", "update the NVIDIA driver")


def _ort_cuda(provider: str = "CUDAExecutionProvider") -> Trouble | None:
    import onnxruntime

    if trouble := _no_gpu():
        return trouble
    if provider in onnxruntime.get_available_providers():
        return None
    fix = "pip uninstall onnxruntime onnxruntime-gpu; pip install 'hcompress[gpu]'"  # the two overwrite each other
    return f"no {provider} in this onnxruntime", fix


def _ort_tensorrt() -> Trouble | None:
    import onnxruntime

    if trouble := _ort_cuda("TensorrtExecutionProvider"):
        return trouble
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    wanted = (linked_tensorrt(provider) if provider.is_file() else None) or "libnvinfer.so.10"  # as 1.30 has it
    try:
        ctypes.CDLL(wanted)
    except OSError:
        return f"onnxruntime needs {wanted}; another TensorRT will not do", "install that version of its libraries"
    return None


def linked_tensorrt(library: Path) -> str | None:
    """The libnvinfer that `library` wants, such as libnvinfer.so.10."""
    found = re.search(rb"libnvinfer\.so\.\d+", library.read_bytes())
    return found.group().decode() if found else None


def _tensorrt(flavor: str) -> Trouble | None:
    try:
        load(FLAVORS[flavor])
        require_gpu(FLAVORS[flavor])
        importlib.import_module("cuda.bindings.runtime")
    except EngineError as error:
        return error.problem, error.fix
    except ImportError:
        return "cuda-python is not installed", f"pip install 'hcompress[{FLAVORS[flavor].extra}]'"
    return None


def _rtx() -> Trouble | None:
    trouble = _tensorrt("rtx")
    return trouble and (f"builds engines but cannot run them: {trouble[0]}", trouble[1])


NEEDS = [
    Need("torch", "torch", "train, export", "train"),
    Need("torch CUDA", "torch", "train on a GPU", "train", _torch_cuda),
    Need("diffusers", "diffusers", "models, solvers", "train"),
    Need("transformers", "transformers", "text encoders", "train"),
    Need("accelerate", "accelerate", "train on several GPUs", "train"),
    Need("modelopt", "modelopt.torch.quantization", "quantize", "train"),
    Need("onnxscript", "onnxscript", "export", "train"),
    Need("onnx-ir", "onnx_ir", "export", "train"),
    Need("ORT CPU", "onnxruntime", "bundles on a CPU", "cpu"),
    Need("ORT CUDA", "onnxruntime", "bundles on a GPU", "gpu", _ort_cuda),
    Need("ORT TensorRT", "onnxruntime", "bundles on a GPU", "gpu", _ort_tensorrt),
    Need("TensorRT", "tensorrt", "bundles on a GPU", "trt", partial(_tensorrt, "trt")),
    Need("TensorRT-RTX", "tensorrt_rtx", "bundles on a GPU", "trt-rtx", _rtx),
]


def examine(need: Need) -> Finding:
    """Import it and ask it: version numbers alone do not show what works."""
    broken = Finding(need.name, need.serves, works=False)
    package = need.module.partition(".")[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(need.module)
    except ModuleNotFoundError as error:
        problem = "not installed" if error.name == package else f"needs {error.name}, which is not installed"
        return replace(broken, problem=problem, fix=f"pip install 'hcompress[{need.extra}]'")
    except Exception as error:  # a broken native library raises whatever it likes; saying so is the point here
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = mixed_up(reason) or f"does not import: {reason}"
        return replace(broken, problem=problem, fix=f"pip install --force-reinstall 'hcompress[{need.extra}]'")
    version = getattr(sys.modules[package], "__version__", None)
    if trouble := need.check():
        return replace(broken, version=version, problem=trouble[0], fix=trouble[1])
    return Finding(need.name, need.serves, works=True, version=version)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Say what works on this machine, and how to mend what does not.

    Example: hcompress doctor --json
    """
    from rich.console import Console

    from hcompress.rundir import environment

    with Console(stderr=True).status("importing everything there is"):
        findings = [examine(need) for need in NEEDS]
    if as_json:
        print(json.dumps({"environment": environment(), "findings": [asdict(finding) for finding in findings]}))
        return
    for found in findings:
        mark = typer.style("yes", fg="green") if found.works else typer.style("no ", fg="red")
        advice = "; ".join(filter(None, (found.problem, found.fix)))
        typer.echo(f"{mark}  {found.name:12}  {found.version or '-':12}  {found.serves:22}  {advice}".rstrip())
