"""Every name of TensorRT and CUDA that is used exists, and is called with as many arguments as it takes.

A check of names and signatures, not of TensorRT: TensorRT-RTX is the installed library, but of TensorRT only bindings
can be had from the package index. They are imported over libraries that are empty but for the functions they link to.
What a variable in the sources is, its name says; OBJECTS lists them.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import hcompress_runtime

SOURCES = ("backends", "device", "trt", "trt_build")
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "cache": "ITimingCache",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
RTX_ONLY = {
    "trt.ComputeCapability",
    "trt.ComputeCapability.__members__",
    "trt.BuilderFlag.REQUIRE_USER_ALLOCATION",
    "config.num_compute_capabilities",
    "config.set_compute_capability",
    "context.is_stream_capturable",
}  # each behind a question for the flavor
STUBS = """
#define EXPORT(name) void *name(void) { return 0; }
EXPORT(createInferBuilder_INTERNAL) EXPORT(createInferRefitter_INTERNAL) EXPORT(createInferRuntime_INTERNAL)
EXPORT(createNvOnnxParserRefitter_INTERNAL) EXPORT(createNvOnnxParser_INTERNAL) EXPORT(getNvOnnxParserVersion)
EXPORT(getBuilderPluginRegistry) EXPORT(getPluginRegistry) EXPORT(initLibNvInferPlugins)
"""
BINDINGS = ["tensorrt-cu12-bindings==10.13.3.9.post1", "tensorrt-cu13-bindings==11.4.0.106"]  # the oldest and newest
# Prints {dotted name: docstring} for those of the names on stdin that exist.
LOOK_UP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for dotted, path in json.load(sys.stdin).items():
    value = module
    try:
        for part in path:
            value = getattr(value, part)
    except AttributeError:
        continue
    found[dotted] = getattr(value, "__doc__", None) or ""
print(json.dumps(found))
"""


@cache
def uses() -> tuple[dict[str, list[str]], dict[str, set[int]]]:
    """Dotted name as in the source -> where to look it up; and with how many arguments it is called, if it is."""
    paths: dict[str, list[str]] = {}
    calls: dict[str, set[int]] = {}
    for source in SOURCES:
        file = Path(hcompress_runtime.__file__).parent / f"{source}.py"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and (dotted := spell(node)):
                root, *rest = dotted.split(".")
                paths[dotted] = rest if root in ("trt", "cudart") else [OBJECTS[root], *rest]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and (dotted := spell(node.func)):
                assert not node.keywords, f"{dotted} is called with keywords, which this test cannot check"
                if dotted.split(".")[-1][0].isupper():  # a class: its docstring has no signature
                    dotted += ".__init__"
                    paths[dotted] = dotted.split(".")[1:]
                calls.setdefault(dotted, set()).add(len(node.args))
    return paths, calls


def spell(node: ast.expr) -> str | None:
    """`a.b.c` where a, or self.a, is an object that is known here."""
    if isinstance(node, ast.Name):
        return node.id if node.id in {*OBJECTS, "trt", "cudart"} else None
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "shared"):
            return spell(ast.Name(node.attr))
        root = spell(node.value)
        return root and f"{root}.{node.attr}"
    return None


def look_up(module: str, root: str, **environment: str) -> dict[str, str]:
    """What of `uses` the module has, with docstrings; imported in a process of its own."""
    paths = {
        dotted: path for dotted, path in uses()[0].items() if (dotted.split(".")[0] == "cudart") == (root == "cudart")
    }
    command = [sys.executable, "-c", LOOK_UP, module]
    done = subprocess.run(
        command, input=json.dumps(paths), env=environment or None, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def arities(doc: str) -> set[int]:
    """The numbers of arguments, without self, that the signatures in a docstring allow."""
    counts: set[int] = set()
    for inner in re.findall(r"^(?:\d+\. )?\w+\((.*?)\)(?: ->.*)?$", doc, re.MULTILINE):
        if "*args" in inner:
            continue
        inner = re.sub(r"<[^<>]*>|\[[^\[\]]*\]", "", inner)
        arguments = [part for part in inner.split(",") if part.strip() and not part.strip().startswith("self")]
        counts |= set(range(sum("=" not in part for part in arguments), len(arguments) + 1))
    return counts


def check_calls(found: dict[str, str]) -> None:
    checked = 0
    for dotted, counts in uses()[1].items():
        if allowed := arities(found.get(dotted, "")):
            assert counts <= allowed, f"{dotted} is called with {counts} arguments, but takes {allowed}"
            checked += 1
    assert checked > 10  # or the docstrings have changed their form


def test_the_sources_use_every_object_that_is_checked_here():
    roots = {dotted.split(".")[0] for dotted in uses()[0]}
    assert roots == {*OBJECTS, "trt", "cudart"}
    assert {*uses()[0]} >= RTX_ONLY
    assert len(uses()[0]) > 60


def test_all_names_are_those_of_tensorrt_rtx():
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hcompress[trt-rtx]'")
    found = look_up("tensorrt_rtx", "trt")
    assert {name for name in uses()[0] if not name.startswith("cudart")} - found.keys() == set()
    check_calls(found)


@pytest.mark.parametrize("bindings", BINDINGS)
def test_all_names_are_those_of_tensorrt(bindings, tmp_path):
    found = look_up("tensorrt_bindings", "trt", **over_stubs(bindings, tmp_path))
    assert {name for name in uses()[0] if not name.startswith("cudart")} - found.keys() == RTX_ONLY
    check_calls(found)


def test_all_names_are_those_of_cuda_python():
    pytest.importorskip("cuda.bindings.runtime", reason="pip install cuda-python")
    found = look_up("cuda.bindings.runtime", "cudart")
    assert {name for name in uses()[0] if name.startswith("cudart")} - found.keys() == set()
    check_calls(found)


def over_stubs(bindings: str, folder: Path) -> dict[str, str]:
    """An environment in which the bindings import over stubs; skips where that cannot be had."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler to make stub libraries with")
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--retries", "0", "--timeout", "5"]
    pip = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", str(folder), bindings]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, check=False, timeout=40)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{bindings} cannot be had from the package index: no answer")
    if done.returncode:
        pytest.skip(f"{bindings} cannot be had from the package index: {done.stderr.splitlines()[-1:]}")
    (folder / "stubs.c").write_text(STUBS)
    major = bindings.partition("==")[2].partition(".")[0]
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        command = [compiler, "-shared", "-fPIC", "-o", str(folder / library), str(folder / "stubs.c")]
        subprocess.run([*command, f"-Wl,-soname,{library}"], check=True)
    return {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}
