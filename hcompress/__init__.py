"""Learned feature caching for diffusion transformers. Importing this loads no torch; the functions below do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcompress.pipeline import apply_schedule, remove_schedule
    from hcompress.solver import make_scheduler

__version__ = "0.1.0"
__all__ = ["apply_schedule", "make_scheduler", "remove_schedule"]


def __getattr__(name: str) -> Any:
    """Load what `__all__` promises when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "make_scheduler":
        from hcompress.solver import make_scheduler

        return make_scheduler
    from hcompress import pipeline

    return getattr(pipeline, name)
