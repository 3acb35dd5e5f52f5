"""Learned feature caching for diffusion transformers. Importing this loads no torch; the functions below do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcompress.pipeline import apply_schedule, remove_schedule

__version__ = "0.1.0"
__all__ = ["apply_schedule", "remove_schedule"]


def __getattr__(name: str) -> Any:
    """Load what `__all__` promises when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hcompress import pipeline

    return getattr(pipeline, name)
