"""The command itself: results on stdout, errors in one line on stderr, exit codes 0, 1, 2 and 130."""

import json
import re
import signal
import subprocess
import sys

import pytest
import typer

from hcompress.cli.doctor import NEEDS, Need, examine, linked_tensorrt
from hcompress.cli.main import app
from hcompress.recipe import COMPARISONS, resolve, shipped

HCOMPRESS = [sys.executable, "-m", "hcompress.cli.main"]


def hcompress(*arguments, cwd=None):
    return subprocess.run([*HCOMPRESS, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, check=False)


def commands(command, name="hcompress"):
    """Every command and group, as it is typed."""
    yield name
    for child, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {child}")


@pytest.mark.parametrize("command", [*commands(typer.main.get_command(app))])
def test_every_help_holds_an_example(command):
    done = hcompress(*command.split()[1:], "--help")
    assert done.returncode == 0
    assert re.search(rf"Example: {command if command != 'hcompress' else 'hcompress '}", done.stdout)


def test_recipes_are_listed_shown_copied_and_valid(tmp_path):
    kinds = json.loads(hcompress("recipes", "list", "--json").stdout)
    listed, comparisons = kinds["recipes"], kinds["comparisons"]
    assert set(listed) == set(shipped()) and set(comparisons) == set(shipped(COMPARISONS))
    assert all({**listed, **comparisons}.values())
    assert "cells" in hcompress("recipes", "validate", next(iter(comparisons))).stdout
    name, file = next(iter(shipped().items()))
    assert name in hcompress("recipes", "list").stdout
    assert hcompress("recipes", "show", name).stdout == file.read_text()
    assert hcompress("recipes", "copy", name, cwd=tmp_path).returncode == 0
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    resolved = hcompress("recipes", "validate", file.name, cwd=tmp_path).stdout
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert resolve(tmp_path / "resolved.yaml") == resolve(file)


def test_copy_never_overwrites(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("my changes")
    done = hcompress("recipes", "copy", next(iter(shipped())), mine)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {mine} exists; pass another DEST\n"
    assert mine.read_text() == "my changes"


def test_an_error_is_one_line_and_with_json_an_object(tmp_path):
    (tmp_path / "r.yaml").write_text("modle: zoo:fashion-dit\n")
    done = hcompress("recipes", "validate", "r.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: unknown key 'modle'; did you mean 'model'?\n"
    raise_one = """
import sys
import hcompress.cli.main as command
from hcompress.errors import ModelError

def app():
    raise ModelError("no model here;\\nlook there")

command.app = app
sys.argv = ["hcompress", "doctor", "--json"]
command.main()
"""
    done = subprocess.run([sys.executable, "-c", raise_one], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: no model here; look there\n"
    assert json.loads(done.stdout) == {"error": {"kind": "ModelError", "message": "no model here; look there"}}


def test_a_wrong_flag_exits_2():
    done = hcompress("recipes", "list", "--no-such-flag")
    assert (done.returncode, done.stdout) == (2, "")


def test_ctrl_c_exits_130():
    a_slow_verb = """
import signal, sys, time
from hcompress.cli.main import app, main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored

@app.command()
def wait():
    print("waiting", flush=True)
    time.sleep(60)

sys.argv = ["hcompress", "wait"]
main()
"""
    code = [sys.executable, "-c", a_slow_verb]
    with subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"waiting\n"
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=30)
    assert running.returncode == 130
    assert b"Traceback" not in stderr


def test_doctor_finds_what_is_here_and_says_how_to_get_what_is_not():
    done = hcompress("doctor", "--json")
    findings = {found["name"]: found for found in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0
    assert list(findings) == [need.name for need in NEEDS]
    assert findings["torch"]["works"] and findings["torch"]["version"].startswith("2.")
    assert all(found["problem"] for found in findings.values() if not found["works"])
    absent = [found for found in findings.values() if found["problem"] == "not installed"]
    assert all(re.fullmatch(r"pip install 'hcompress\[[a-z-]+\]'", found["fix"]) for found in absent)


def test_doctor_tells_absent_from_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_backend.py").write_text("raise OSError('libfoo.so.1: cannot open shared object file')")
    (tmp_path / "hungry_backend.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    assert examine(Need("a", "no_such_backend", "x", "gpu")).problem == "not installed"
    assert "libfoo.so.1" in examine(Need("a", "broken_backend", "x", "gpu")).problem
    assert "no_such_dependency" in examine(Need("a", "hungry_backend", "x", "gpu")).problem
    limping = examine(Need("a", "json", "x", "gpu", lambda: ("no GPU", "buy one")))
    assert (limping.works, limping.problem, limping.fix) == (False, "no GPU", "buy one")


def test_doctor_says_when_tensorrt_10_and_11_are_mixed_up(tmp_path, monkeypatch):
    (tmp_path / "bindings_of_11.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file: No such file or directory')"
    )
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs" / "__init__.py").touch()
    (tmp_path / "tensorrt_libs" / "libnvinfer.so.10").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = examine(Need("a", "bindings_of_11", "x", "trt"))
    assert found.problem == ("TensorRT 11's bindings need libnvinfer.so.11, which is not here; libnvinfer.so.10 is")
    assert found.fix == "pip install --force-reinstall 'hcompress[trt]'"


def test_doctor_reads_which_tensorrt_a_library_is_linked_with(tmp_path):
    library = tmp_path / "provider.so"
    library.write_bytes(b"\x7fELF libcudart.so.13\0libnvinfer.so.10\0libnvinfer_plugin.so.10\0")
    assert linked_tensorrt(library) == "libnvinfer.so.10"
    library.write_bytes(b"\x7fELF")
    assert linked_tensorrt(library) is None


def test_doctor_tells_building_engines_from_running_them():
    need = next(need for need in NEEDS if need.module == "tensorrt_rtx")
    pytest.importorskip(need.module, reason="pip install 'hcompress[trt-rtx]'")
    found = examine(need)
    assert found.version.startswith("1.")
    assert found.works or found.problem.startswith("builds engines but cannot run them: ")
