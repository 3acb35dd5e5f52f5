"""Run hcompress bundles without torch: `from hcompress_runtime import Runtime`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcompress_runtime.runtime import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    """Load Runtime, and NumPy with it, when it is first asked for: `hcompress --help` only needs the errors."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hcompress_runtime.runtime import Runtime

    return Runtime
