"""A file is the old one or the new one: on a full disk, after a kill, and when the writer itself fails."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from hcompress.errors import DiskError
from hcompress_runtime.files import sha256, write_atomically

LIMIT_BYTES = 64 * 1024


@pytest.fixture
def small_disk():
    """Files of this process may not grow past LIMIT_BYTES: the kernel refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def torch_save(file):
    import torch

    torch.save({"weights": torch.zeros(LIMIT_BYTES)}, file)


BIG_WRITERS = {
    "bytes": bytes(2 * LIMIT_BYTES),
    "function": lambda file: file.write(bytes(2 * LIMIT_BYTES)),
    "torch.save": torch_save,  # wraps the refusal in a RuntimeError
}


def test_bytes_and_functions_write_the_same_file_into_a_new_folder(tmp_path):
    write_atomically(tmp_path / "new" / "a", b"content")
    write_atomically(tmp_path / "new" / "b", lambda file: file.write(b"content"))
    assert (tmp_path / "new" / "a").read_bytes() == (tmp_path / "new" / "b").read_bytes() == b"content"
    assert sorted(os.listdir(tmp_path / "new")) == ["a", "b"]
    assert sha256(tmp_path / "new" / "a") == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"


@pytest.mark.parametrize("content", BIG_WRITERS.values(), ids=BIG_WRITERS)
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, small_disk, content):
    path = tmp_path / "schedule.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(DiskError, match=r"cannot write .*schedule\.safetensors: File too large") as caught:
        write_atomically(path, content)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(DiskError, match="cannot write"):
        write_atomically(tmp_path / "out" / "grid.png", b"new")


def test_a_bug_of_the_writer_is_not_blamed_on_the_disk(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def buggy(file):
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomically(path, buggy)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_kill_in_the_middle_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    half_written = """
import sys, time
from pathlib import Path
from hcompress_runtime.files import write_atomically

def slow(file):
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    time.sleep(60)

write_atomically(Path(sys.argv[1]), slow)
"""
    with subprocess.Popen([sys.executable, "-c", half_written, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"half\n"
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_a_reader_never_sees_a_partial_file(tmp_path):
    """Kill a writer that replaces one file over and over: whatever is there is one of its two contents."""
    path = tmp_path / "a"
    contents = (b"x" * 100_000, b"y" * 200_000)
    replace_forever = """
import sys
from pathlib import Path
from hcompress_runtime.files import write_atomically

while True:
    write_atomically(Path(sys.argv[1]), b"x" * 100_000)
    write_atomically(Path(sys.argv[1]), b"y" * 200_000)
"""
    with subprocess.Popen([sys.executable, "-c", replace_forever, path]) as writer:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(path.read_bytes() in contents for _ in range(200))
        writer.kill()
    assert path.read_bytes() in contents
