"""A serving machine needs no torch: looked at from outside, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import Exported

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnx_ir")


def modules_after(code: str, *arguments: object) -> set[str]:
    """The top-level modules that a fresh Python has loaded after `code`."""
    report = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-W", "error", "-c", code + report, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_runtime_loads_neither_torch_nor_hcompress(tiny_bundle: Exported) -> None:
    code = """
import sys
from hcompress_runtime import Runtime
with Runtime(sys.argv[1]) as runtime:
    assert runtime.generate([0, 1]).shape == (2, 2, 8, 8)
"""
    loaded = modules_after(code, tiny_bundle.path)
    assert "onnxruntime" in loaded
    assert not loaded & {*HEAVY, "hcompress", "hcompress_export"}


def test_importing_the_runtime_loads_no_backend() -> None:
    assert not modules_after("import hcompress_runtime") & {*HEAVY, "onnxruntime", "numpy", "hcompress"}
    assert not modules_after("from hcompress_runtime import Runtime") & {*HEAVY, "onnxruntime", "hcompress"}


def test_generate_from_a_bundle_loads_neither_torch_nor_diffusers(tiny_run: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hcompress.cli.main", "export", str(tiny_run), "--out", str(tmp_path / "bundle")],
        check=True,
        capture_output=True,
    )
    code = """
import sys
from hcompress.cli.main import app
app(["generate", sys.argv[1], "--labels", "0,1,2", "--out", sys.argv[2]], standalone_mode=False)
"""
    loaded = modules_after(code, tmp_path / "bundle", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0
    assert not loaded & {*HEAVY, "hcompress_export"}
