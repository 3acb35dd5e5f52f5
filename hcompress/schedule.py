"""A schedule: which branches are computed at which model call, and for whom it was learned.

Stored as safetensors, `compute` and where there are such `logits` and `correction.N`, readable without torch. Its one
metadata key is the format's name and holds the rest as JSON: the library writes several keys in no particular order.
Rows count executed model calls: row 0 runs first, at the largest noise, and always computes everything.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hcompress.branches import BranchGraph
from hcompress.corrections import Corrections, Reuse, taylor
from hcompress.errors import ScheduleError
from hcompress_runtime.files import write_atomically

FORMAT = "hcompress-schedule-1"


@dataclass(frozen=True)
class Identity:
    """What a schedule belongs to; using it with anything else is refused.

    model:       a name for people ("zoo:fashion-dit")
    config_hash: SHA-256 of the network's configuration
    weight_hash: SHA-256 of its weights as float32; None in imported schedules, which do not record one
    solver:      class, steps and config hash of the diffusers scheduler
    cfg:         guidance scale

    Raises TypeError where solver or hashes are something else, as a tampered file may have it.
    """

    model: str
    config_hash: str | None
    weight_hash: str | None
    solver: dict[str, Any]
    cfg: float | None

    def __post_init__(self) -> None:
        hashes = (self.config_hash, self.weight_hash)
        if not isinstance(self.solver, dict) or not all(isinstance(value, str | None) for value in hashes):
            raise TypeError("an identity whose solver is no dict or whose hashes are no text")


@dataclass(frozen=True)
class Schedule:
    """Which branches are computed at which model call.

    Legend: T model calls, N branches.

    compute:     bool[T, N]. True = compute, False = reuse the slot written last.
    names:       the N branch names in column order
    identity:    the model, solver and guidance it belongs to
    method:      how it came to be, with its settings ({"name": "harmonica", "beta": ...})
    logits:      float32[T, N] of the router, where one was learned
    corrections: what a reused branch yields in place of its slot; None yields the slot as it is

    Raises ScheduleError where a row 0 reuses (nothing is cached yet), or shapes, dtypes or values do not fit.
    """

    compute: NDArray[np.bool_]
    names: tuple[str, ...]
    identity: Identity
    method: dict[str, Any] = field(default_factory=dict)
    logits: NDArray[np.float32] | None = None
    corrections: Corrections | None = None

    def __post_init__(self) -> None:
        mask = self.compute
        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise ScheduleError(f"`compute` must be bool[T, N], got {mask.dtype}{list(mask.shape)}")
        if len(mask) < 2:
            raise ScheduleError("a schedule of one call has nothing to reuse; use 2 steps or more")
        if mask.shape[1] != len(self.names):
            raise ScheduleError(f"`compute` has {mask.shape[1]} columns but {len(self.names)} branch names")
        if not mask[0].all():
            first = self.names[int(np.argmin(mask[0]))]
            raise ScheduleError(f"row 0 reuses {first!r}, but nothing is cached before the first call")
        if self.logits is not None and self.logits.shape != mask.shape:
            raise ScheduleError(f"`logits` {list(self.logits.shape)} and `compute` {list(mask.shape)} differ in shape")
        if self.logits is not None and self.logits.dtype != np.float32:
            raise ScheduleError(f"`logits` must be float32[T, N], got {self.logits.dtype}")
        if self.logits is not None and not np.isfinite(self.logits).all():
            raise ScheduleError("`logits` holds NaN or infinity; the file is damaged or its training diverged")
        if self.corrections is not None:
            self.corrections.check_fits(mask, self.names)

    @property
    def num_calls(self) -> int:
        """T, the number of model calls of one generation."""
        return len(self.compute)

    @property
    def cur(self) -> float:
        """Cache utilisation ratio: reused share of all T N entries, the first call included (HarmoniCa, section 4)."""
        return float(1.0 - self.compute.mean())

    @property
    def flags(self) -> dict[str, Any]:
        """Steps, where they are recorded, and guidance that it is for, as flags of a recipe."""
        scale, steps = self.identity.cfg, self.identity.solver.get("steps")
        return ({} if steps is None else {"solver.steps": int(steps)}) | {"cfg": 1.0 if scale is None else scale}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of which branches are computed when, and of corrections: equal for two schedules that run alike."""
        digest = hashlib.sha256(self.compute.tobytes())
        if self.corrections is not None:
            digest.update(self.corrections.fingerprint.encode())
        return digest.hexdigest()

    @property
    def reuse(self) -> Reuse:
        """What a reused branch yields: plain, taylor or corrected."""
        return self.corrections.rule if self.corrections else "plain"

    @property
    def order(self) -> int:
        """How many computed values but the last its corrections look at, at most: 1 or 2; 1 under plain reuse."""
        return self.corrections.order if self.corrections else 1

    @property
    def fallbacks(self) -> int:
        """How many reused entries have less than rule and order ask for, such as no p; 0 under plain reuse."""
        return self.corrections.fallbacks(self.compute) if self.corrections else 0

    def reusing(self, rule: str | None, graph: BranchGraph) -> Schedule:
        """The same mask under another rule, `taylor` of order 1; None, or its own rule, leaves the schedule as it is.

        Raises ScheduleError for `corrected` where nothing was fitted: that takes the model, see hcompress.caching.
        """
        if rule is None or rule == self.reuse:
            return self
        if rule == "plain":
            return replace(self, corrections=None)
        if rule == "taylor":
            return replace(self, corrections=taylor(self.compute, graph.widths))
        if rule == "corrected":
            raise ScheduleError(
                f"this schedule holds no fitted corrections, its rule is {self.reuse}; learn it with "
                "`hcompress train --reuse corrected`, or fit them to this one: "
                "hcompress train MODEL --schedule FILE --reuse corrected --out RUN"
            )
        raise ScheduleError(f"there is no rule of reuse {rule!r}; choose from: {', '.join(get_args(Reuse))}")

    def fitted_elsewhere(self, cfg: float) -> str | None:
        """A line of warning where corrections were fitted at another guidance scale; None where they were not.

        On zoo:fashion-dit (fitted at 1.5, every other call reused) a fit of another scale is up to 0.9 dB below one of
        the scale itself, and 10 dB above plain reuse: not worth a refusal.
        """
        if self.reuse != "corrected" or self.identity.cfg in (None, cfg):
            return None
        return (
            f"corrections were fitted at guidance {self.identity.cfg}, not {cfg}: up to 1 dB worse than a fit of its "
            f"own, which `hcompress train ... --reuse corrected --cfg {cfg}` makes"
        )

    def check_fits(self, graph: BranchGraph, identity: Identity) -> None:
        """Raise ScheduleError unless this schedule was made for this network, these weights, this solver and T.

        The guidance scale is not compared: a schedule runs at any, and the caller may warn.
        """
        if self.names != graph.names:
            n, names = len(self.names), graph.names
            at = next((i for i, pair in enumerate(zip(self.names, names, strict=False)) if len({*pair}) > 1), None)
            where = "" if at is None else f"; first difference at {at}: {self.names[at]!r} != {names[at]!r}"
            raise ScheduleError(
                f"schedule has {n} branches but {identity.model} has {len(graph)}{where}. "
                f"It was learned on {self.identity.model}; re-learn it with `hcompress train`"
            )
        if self.corrections is not None and self.corrections.widths != graph.widths:
            at = next(i for i, width in enumerate(graph.widths) if self.corrections.widths[i] != width)
            raise ScheduleError(
                f"corrections of {self.names[at]!r} are {self.corrections.widths[at]} wide, but in {identity.model} "
                f"that branch is {graph.widths[at]} wide; re-learn it with `hcompress train`"
            )
        theirs = self.identity
        for what in ("config_hash", "weight_hash"):
            mine, yours = getattr(theirs, what), getattr(identity, what)
            if mine and yours and mine != yours:
                raise ScheduleError(
                    f"schedule was learned on {theirs.model} ({what} {mine[:12]}), not on {identity.model} "
                    f"({what} {yours[:12]}); re-learn it with `hcompress train {identity.model}`"
                )
        for what in ("class", "steps", "config_hash"):
            mine, yours = theirs.solver.get(what), identity.solver.get(what)
            if mine is not None and mine != yours:
                raise ScheduleError(
                    f"schedule was learned for solver {theirs.solver.get('class')} with {theirs.solver.get('steps')} "
                    f"steps, but this run uses {identity.solver.get('class')} with {identity.solver.get('steps')} "
                    f"({what} differs); use the same solver and --steps, or re-learn it"
                )

    def save(self, path: Path) -> None:
        """Write to `path`, atomically. Raises DiskError where the disk refuses."""
        tensors: dict[str, NDArray[Any]] = {"compute": self.compute}
        if self.logits is not None:
            tensors["logits"] = self.logits
        described: dict[str, Any] = {"names": self.names, "identity": asdict(self.identity), "method": self.method}
        described["cur"] = self.cur
        if self.corrections is not None:
            tensors |= self.corrections.tensors()
            described["reuse"] = self.corrections.rule
        laid_out = {
            name: np.ascontiguousarray(array) for name, array in tensors.items()
        }  # `save` writes memory as it lies
        write_atomically(path, save(laid_out, {FORMAT: json.dumps(described, sort_keys=True)}))

    @staticmethod
    def load(path: str | Path, *, reuse: str | None = None) -> Schedule:
        """Read a schedule, a file or that of a run folder or bundle.

        reuse: the rule that it will run under, `reusing`; vectors that play no part then, be they damaged, are not read

        Raises ScheduleError where the file is absent, truncated or not a schedule.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "schedule.safetensors"
        if not path.is_file():
            raise ScheduleError(f"no schedule at {path}; `hcompress train` leaves RUN/schedule.safetensors")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise ScheduleError(
                f"{path} is truncated or not a safetensors file ({error}); copy or re-learn it"
            ) from error
        except (TypeError, AttributeError) as error:  # bfloat16, float8: numpy has no such type
            raise ScheduleError(
                f"{path} holds a tensor of a type that no schedule has ({error}); copy it again"
            ) from error
        if FORMAT not in metadata:
            raise ScheduleError(f"{path} is no schedule that this version reads: its metadata lacks {FORMAT!r}")
        try:
            described = json.loads(metadata[FORMAT])
            if not isinstance(described["method"], dict) or not all(
                isinstance(name, str) for name in described["names"]
            ):
                raise TypeError("its method or names")
            rule = described.get("reuse")
            if reuse in {"plain", "taylor"} - {rule}:
                rule = None
            return Schedule(
                compute=tensors["compute"],
                names=tuple(described["names"]),
                identity=Identity(**described["identity"]),
                method=described["method"],
                logits=tensors.get("logits"),
                corrections=None if rule is None else Corrections.of_tensors(rule, tensors),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ScheduleError(f"{path} lacks or garbles {error}; copy or re-learn it") from error
