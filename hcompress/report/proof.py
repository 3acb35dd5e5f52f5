"""A bundle against the reference sampler, on every backend there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcompress.adapter import weight_hash
from hcompress.corrections import Corrections
from hcompress.errors import BundleError, EngineError, MissingExtra
from hcompress.models.loading import load_model
from hcompress.schedule import Schedule
from hcompress_export.bundle import SCHEDULE
from hcompress_export.parity import CHAINED, INPUT, Drift, drifts, first_drift
from hcompress_runtime.backends import FLAVORS
from hcompress_runtime.bundle import Bundle, is_bundle, open_bundle
from hcompress_runtime.conditions import example
from hcompress_runtime.kernels import OF_FLOATS, OF_INTEGERS, executed
from hcompress_runtime.ort import PROVIDERS
from hcompress_runtime.runtime import Runtime


@dataclass(frozen=True)
class Proof:
    """One bundle on one backend.

    skipped:     why it cannot be run or compared here; all else is void then
    worst:       the largest drift call by call, where `tolerance` is allowed
    chained:     the largest drift in a whole generation, where `chained_tolerance` is allowed
    rounded:     whether PyTorch was given what the bundle rounds, call by call (hcompress_export.rounded)
    first_drift: the first beyond what is allowed
    products:    the matrix products that the first call runs on ONNX Runtime, by operator; from its own profile
    """

    bundle: Path
    backend: str
    tolerance: float = 0.0
    worst: float = 0.0
    chained_tolerance: float = 0.0
    chained: float = 0.0
    rounded: bool = False
    first_drift: Drift | None = None
    skipped: str | None = None
    products: Mapping[str, int] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing drifts, as far as it could be run."""
        return self.first_drift is None


def prove_all(
    path: Path, model: str | None = None, *, samples: int = 4, seed: int = 0, tolerance: float | None = None
) -> list[Proof]:
    """`path`, and its uncached bundle where that lies beside it, on every backend; `tolerance` instead of each own.

    Raises BundleError, ModelError.
    """
    dense = path.with_name(f"{path.name}-dense")
    backends = [*PROVIDERS, *(flavor for flavor in FLAVORS if any((path / "engines").glob(f"{flavor}-*")))]
    bundles = [open_bundle(path), *([open_bundle(dense)] if is_bundle(dense) else [])]
    identity = bundles[0].manifest["identity"]
    name = model or identity["model"]
    adapter = load_model(name).adapter
    if weight_hash(adapter.network) != identity["weight_hash"]:
        raise BundleError(f"{name} has other weights than {path}; pass the model it was made from with --model")
    proofs = []
    for bundle in bundles:
        if bundle.manifest["identity"]["weight_hash"] != identity["weight_hash"]:
            other = f"it is of another model, {bundle.manifest['identity']['model']}; verify it by itself"
            proofs += [Proof(bundle.path, backend, skipped=other) for backend in backends]
            continue
        for backend in backends:
            try:
                runtime = Runtime(bundle, backend)
            except (MissingExtra, EngineError) as error:
                proofs.append(Proof(bundle.path, backend, skipped=str(error)))
                continue
            with runtime:
                least, most = runtime.batches  # an engine may be built for some only
                given = example(bundle.conditions, int(np.clip(samples, least, most)))
                found = drifts(adapter, runtime, given, *_frozen(bundle), seed=seed)
            ran = executed(bundle, provider=backend) if backend in PROVIDERS else Counter[str]()
            found = [replace(drift, allowed=tolerance or drift.allowed) for drift in found]
            proofs.append(_proof(bundle.path, backend, found, _products(ran)))
    return proofs


def _proof(path: Path, backend: str, found: Sequence[Drift], products: Mapping[str, int]) -> Proof:
    worst, tolerance = _worst([drift for drift in found if drift.tensor not in CHAINED])
    chained, chained_tolerance = _worst([drift for drift in found if drift.tensor in CHAINED])
    rounded = any(drift.tensor.startswith(INPUT) for drift in found)
    return Proof(
        path, backend, tolerance, worst, chained_tolerance, chained, rounded, first_drift(found), products=products
    )


def _worst(found: Sequence[Drift]) -> tuple[float, float]:
    """The largest error, NaN above all, and what is allowed there."""
    drift = found[int(np.argmax([drift.error for drift in found]))]
    return drift.error, drift.allowed


def _products(ran: Mapping[str, int]) -> dict[str, int]:
    return {name: ran[name] for name in (*OF_INTEGERS, *OF_FLOATS) if ran.get(name)}


def _frozen(bundle: Bundle) -> tuple[NDArray[np.bool_] | None, Corrections | None]:
    """The mask that the bundle was frozen from and the corrections; None where it is dense, or reuse plain."""
    file = bundle.path / SCHEDULE
    schedule = Schedule.load(file) if file.exists() else None
    return (schedule.compute, schedule.corrections) if schedule else (None, None)
