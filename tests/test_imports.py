"""Who may load what: the layers of CONTRIBUTING.md, seen from sys.modules of a fresh interpreter."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "modelopt", "onnxruntime"}
ALL_OF_RUNTIME = """
import importlib, pkgutil, hcompress_runtime
for module in pkgutil.iter_modules(hcompress_runtime.__path__):
    importlib.import_module(f"hcompress_runtime.{module.name}")
"""
RUN_HELP = """
import sys
sys.argv = ["hcompress", {verb}"--help"]
from hcompress.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
"""

# what is run: what it must not load
FORBIDDEN = {
    "import hcompress": HEAVY,
    "import hcompress.recipe, hcompress.comparison, hcompress.rundir, hcompress.schedule, hcompress.branches": HEAVY,
    "import hcompress_runtime": HEAVY | {"hcompress", "hcompress_export"},
    ALL_OF_RUNTIME: HEAVY | {"hcompress", "hcompress_export", "tensorrt", "tensorrt_rtx"},
    RUN_HELP.format(verb=""): HEAVY,
    RUN_HELP.format(verb="'doctor', "): HEAVY,
    RUN_HELP.format(verb="'recipes', "): HEAVY,
}


@pytest.mark.parametrize("code", FORBIDDEN, ids=[code.strip().partition("\n")[0] for code in FORBIDDEN])
def test_loads_nothing_it_must_not(code):
    report = "\nimport sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "sys" in loaded
    assert not loaded & FORBIDDEN[code]
