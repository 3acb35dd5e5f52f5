"""One process at a time in a run folder: two that append to the same metrics and checkpoints spoil both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import final
from weakref import WeakValueDictionary

from hcompress.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@final
class Claim:
    """This process's hold on a folder, until nothing refers to it or the process ends, however it ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


_held: WeakValueDictionary[Path, Claim] = WeakValueDictionary()


def claim(folder: Path) -> Claim | None:
    """Hold `folder`, which is there; a second time in one process it is the same claim. None where nothing can be held.

    Raises RunError where another process holds it.
    """
    if held := _held.get(folder.resolve()):
        return held
    if fcntl is None:
        return None
    mine = Claim(os.open(folder, os.O_RDONLY))
    try:
        fcntl.flock(mine.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"another process is at work in {folder}; wait for it, or stop it and pass --resume") from error
    except OSError:  # a file system that knows no locks
        return None
    _held[folder.resolve()] = mine
    return mine
