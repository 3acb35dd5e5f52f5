"""How fast a bundle is against its uncached one, and against PyTorch, in one interleaved run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from hcompress.errors import BundleError
from hcompress_runtime.bundle import Bundle, is_bundle, open_bundle
from hcompress_runtime.conditions import Rows, example
from hcompress_runtime.measure import interleaved, peak_memory_bytes
from hcompress_runtime.runtime import Runtime


def compare_bundles(
    cached: Path,
    dense: Path,
    *,
    batch: int = 8,
    rounds: int = 10,
    threads: int | None = None,
    provider: str = "cpu",
    with_torch: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Medians of `rounds` generations of `batch` samples; what names without `dense_` belongs to `cached`.

    speedup = dense_latency_ms / latency_ms; efficiency = speedup / mac_ratio, 1 where time falls as arithmetic does.
    with_torch adds torch_latency_ms and dense_torch_latency_ms of the reference sampler, on the model that the bundle
    names. Raises BundleError where the two are not one model under one solver, the second uncached.
    """
    bundles = {"": open_bundle(cached)}
    if not is_bundle(dense):
        made = f"hcompress export SOURCE --dense --out {quote(str(dense))}"
        raise BundleError(f"there is no uncached bundle {dense} to compare with; make it ({made}) or pass --against")
    bundles["dense_"] = open_bundle(dense)
    ours, theirs = (bundle.manifest["identity"] for bundle in bundles.values())
    for what in ("config_hash", "weight_hash", "solver", "cfg"):
        if ours[what] != theirs[what]:
            raise BundleError(f"{cached} and {dense} differ in {what}; export both from one run, one with --dense")
    if bundles["dense_"].cur:
        cur = f"CUR {100 * bundles['dense_'].cur:.0f} %"
        raise BundleError(f"{dense} is cached too ({cur}); compare with one that `hcompress export --dense` made")
    # Before any is open here: a page that two processes hold counts half in each.
    memory = {prefix: peak_memory_bytes(b.path, batch, threads, provider=provider) for prefix, b in bundles.items()}
    given = example(bundles[""].conditions, batch)
    contenders: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        for prefix, bundle in bundles.items():
            runtime = stack.enter_context(Runtime(bundle, provider, threads))
            contenders[prefix] = lambda runtime=runtime: runtime.generate(given, batch=batch)  # type: ignore[misc]
        if with_torch:
            contenders |= _torch(bundles[""], given, batch, threads)
        latency_ms = {prefix: float(np.median(ms)) for prefix, ms in interleaved(contenders, rounds, progress).items()}
    speedup, mac_ratio = latency_ms["dense_"] / latency_ms[""], bundles[""].mac_ratio / bundles["dense_"].mac_ratio
    return {
        "speedup": speedup,
        "mac_ratio": mac_ratio,
        "efficiency": speedup / mac_ratio,
        "cur": bundles[""].cur,
        **{f"{prefix}latency_ms": value for prefix, value in latency_ms.items()},
        **{f"{prefix}peak_memory_bytes": value for prefix, value in memory.items()},
        "provider": provider,
        "batch": batch,
        "rounds": rounds,
        "threads": threads,
    }


def _torch(bundle: Bundle, given: Rows, batch: int, threads: int | None) -> dict[str, Callable[[], object]]:
    """The reference sampler on the bundle's model, cached and uncached."""
    import torch

    from hcompress.adapter import weight_hash
    from hcompress.models.loading import load_model
    from hcompress.sampling import sample_seeded
    from hcompress.schedule import Schedule

    if threads:
        torch.set_num_threads(threads)
    identity = bundle.manifest["identity"]
    adapter = load_model(identity["model"]).adapter
    if weight_hash(adapter.network) != identity["weight_hash"]:
        raise BundleError(f"{identity['model']} has other weights than {bundle.path}; export that again")
    schedule = Schedule.load(bundle.path / "schedule.safetensors")

    def run(**frozen: Any) -> object:
        return sample_seeded(adapter, bundle.table, given, seed=0, cfg=bundle.cfg, batch=batch, **frozen)

    cached = {"compute": schedule.compute, "corrections": schedule.corrections}
    return {"torch_": lambda: run(**cached), "dense_torch_": run}
