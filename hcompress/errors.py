"""What can go wrong for a user, as a tree. Each is one line that says the fix; the command line exits 1 on it.

HcompressError
├── RecipeError      a recipe, a --set or a flag asks for something that does not exist or does not fit
├── ModelError       a model cannot be found, loaded or adapted
│   └── AbsentModel      it is on a hub that cannot be reached
├── SolverError      a scheduler is not affine, or its settings do not fit the run
├── ScheduleError    a schedule is broken, or belongs to another model, solver or number of steps
│   └── NoSchedule       there is none of the kind that was asked for
├── RunError         a run folder cannot be resumed or written
├── DataError        data that a command needs is absent or broken
├── BundleError      a bundle is truncated, tampered with, or of an unknown format       (hcompress_runtime)
├── DiskError        a file cannot be written; what was there before is untouched        (hcompress_runtime)
├── EngineError      a library, driver or GPU that engines need is absent or unfit       (hcompress_runtime)
├── InputError       labels, prompts, seeds or sizes that this model cannot take         (hcompress_runtime)
└── MissingExtra     an optional library is not installed; the message holds the command (hcompress_runtime)

Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from hcompress_runtime.errors import (
    BundleError,
    DiskError,
    EngineError,
    HcompressError,
    InputError,
    MissingExtra,
    missing,
)

__all__ = [
    "AbsentModel",
    "BundleError",
    "DataError",
    "DiskError",
    "EngineError",
    "HcompressError",
    "InputError",
    "MissingExtra",
    "ModelError",
    "NoSchedule",
    "RecipeError",
    "RunError",
    "ScheduleError",
    "SolverError",
    "missing",
]


class RecipeError(HcompressError):
    """A recipe, a `--set` or a flag asks for something that does not exist or does not fit."""


class ModelError(HcompressError):
    """A model cannot be found, loaded or adapted."""


class AbsentModel(ModelError):
    """A model is on a hub that cannot be reached."""


class SolverError(HcompressError):
    """A scheduler is not affine, or its settings do not fit the run."""


class ScheduleError(HcompressError):
    """A schedule is broken, or belongs to another model, solver or number of steps."""


class NoSchedule(ScheduleError):
    """There is no schedule of the kind that was asked for, such as a rule's at that CUR."""


class RunError(HcompressError):
    """A run folder cannot be resumed or written."""


class DataError(HcompressError):
    """Data that a command needs is absent or broken."""
