"""Files that are either the old one or the new one, whatever happens: a kill, a full disk, Ctrl-C."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from hcompress_runtime.errors import DiskError


def write_atomically(path: Path, content: bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """Replace `path` by `content`, bytes or a function that writes to the open file it is given.

    The bytes go to `.NAME.part` in the same folder, which is made if absent, reach the disk (fsync), and take the
    name in one step. On any failure the old file stays whole and the new bytes are removed; a killed writer leaves
    its `.part`, which the next one overwrites. So one writer at a time.

    Raises DiskError where the disk refuses, also where a library has wrapped the refusal in an error of its own
    (torch.save raises RuntimeError); whatever else `content` raises passes through.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content) if isinstance(content, bytes | memoryview) else content(file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        _sync_folder(path.parent)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        reason = refusal.strerror or refusal
        raise DiskError(f"cannot write {path}: {reason}; what was there before is untouched") from error
    finally:
        with suppress(OSError):
            scratch.unlink()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refusal(error: BaseException | None) -> OSError | None:
    """The operating system's error that `error` is or came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
