"""A bundle against the reference sampler, on every backend there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcompress.adapter import weight_hash
from hcompress.errors import BundleError, EngineError, MissingExtra
from hcompress.models.loading import load_model
from hcompress.schedule import Schedule
from hcompress_export.bundle import SCHEDULE
from hcompress_export.parity import TOLERANCE, Drift, drifts, first_drift
from hcompress_runtime.backends import FLAVORS
from hcompress_runtime.bundle import Bundle, is_bundle, open_bundle
from hcompress_runtime.conditions import example
from hcompress_runtime.ort import PROVIDERS
from hcompress_runtime.runtime import Runtime


@dataclass(frozen=True)
class Proof:
    """One bundle on one backend.

    skipped:     why the backend cannot run here; all else is void then
    worst:       the largest drift of all calls and tensors
    first_drift: the first beyond `tolerance`
    """

    bundle: Path
    backend: str
    tolerance: float
    worst: float = 0.0
    first_drift: Drift | None = None
    skipped: str | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing drifts, as far as it could be run."""
        return self.first_drift is None


def prove_all(
    path: Path, model: str | None = None, *, samples: int = 4, seed: int = 0, tolerance: float | None = None
) -> list[Proof]:
    """`path`, and its uncached bundle where that lies beside it, on every backend. Raises BundleError, ModelError."""
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
        allowed = tolerance or TOLERANCE[bundle.manifest["dtype"]]
        for backend in backends:
            try:
                runtime = Runtime(bundle, backend)
            except (MissingExtra, EngineError) as error:
                proofs.append(Proof(bundle.path, backend, allowed, skipped=str(error)))
                continue
            with runtime:
                least, most = runtime.batches  # an engine may be built for some only
                given = example(bundle.conditions, int(np.clip(samples, least, most)))
                found = drifts(adapter, runtime, given, _mask(bundle), seed=seed)
            worst = float(np.max([drift.error for drift in found]))
            proofs.append(Proof(bundle.path, backend, allowed, worst, first_drift(found, allowed)))
    return proofs


def _mask(bundle: Bundle) -> NDArray[np.bool_] | None:
    """What the bundle was frozen from; None where it is dense."""
    file = bundle.path / SCHEDULE
    return Schedule.load(file).compute if file.exists() else None
