"""Small trained models that ship with the package, with cards and training scripts, and where their data lies."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """Where `hcompress zoo fetch-data` puts what it fetches: $HCOMPRESS_DATA, or hcompress in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HCOMPRESS_DATA") or Path(cache) / "hcompress")
