"""The engines of a bundle: which there are, whether they are whole, and building those that are missing.

    bundle/engines/<flavor>-<library version>-sm<NN>/<graph hash>.engine.gz
                                                    /engines.json     what was built, for which batch; sizes and SHA-256

An engine runs on one kind of GPU under one version of one library, so these two and the bundle's own hash are the key.
Whatever does not fit its key is never used; the error says how to build it again:

    python -m hcompress_runtime.engine_cache BUNDLE --flavor rtx --sm 89 --batch 1,4,8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcompress_runtime.backends import Flavor, check_formats, check_target, choose_flavor, load, require_gpu
from hcompress_runtime.bundle import MANIFEST, SCALES, Bundle, open_bundle
from hcompress_runtime.errors import BundleError, EngineError, HcompressError, InputError
from hcompress_runtime.files import write_atomically
from hcompress_runtime.trt_build import Batch, build_engine, check_batch

FORMAT = "hcompress-engines-1"
RECORD = "engines.json"
Progress = Callable[[int, int, str], object]
"""(engines done, engines in all, what happens next)"""


@dataclass(frozen=True)
class Target:
    """What engines are built for: a key of FLAVORS, the version of that library, and 89 for sm_89."""

    flavor: str
    version: str
    sm: int

    def __str__(self) -> str:
        return f"{self.flavor}-{self.version}-sm{self.sm}"


@dataclass(frozen=True)
class Engines:
    """Verified engines of a bundle: for each graph file its engine file, all for the same `batch`."""

    target: Target
    batch: Batch
    files: Mapping[str, Path]
    seconds: Mapping[str, float]

    def figures(self) -> dict[str, float]:
        """engine_bytes of all and largest_bytes of one; seconds of building them, one after the other."""
        sizes = [file.stat().st_size for file in self.files.values()]
        return {"engine_bytes": sum(sizes), "largest_bytes": max(sizes), "seconds": sum(self.seconds.values())}


def build_engines(
    bundle: Bundle | Path,
    flavor: str = "auto",
    sms: Sequence[int] = (),
    batch: Batch = (1, 1, 1),
    progress: Progress = lambda done, total, what: None,
) -> list[Engines]:
    """Build what is missing, an engine for each distinct graph and each of `sms`; none named means the GPU here.

    Two processes may do this at once: each engine is built by one of them and used by both. An engine that is there
    and whole, for this batch, is not built again. Raises what `build_engine` raises.
    """
    check_batch(batch)
    bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    if bundle.manifest.get("layout") == "switch":
        raise BundleError(f"{bundle.path} has layout 'switch', for ONNX Runtime; export it with --layout per-mask")
    chosen = choose_flavor(flavor)
    library = load(chosen)
    targets = [Target(chosen.name, library.__version__, sm) for sm in sms or [gpu_here(chosen)]]
    for target in targets:
        if chosen.name == "rtx":
            check_target(library, target.sm)
    check_formats(bundle.manifest.get("quantized", []), [target.sm for target in targets])
    for nth, target in enumerate(targets):
        for index, graph in enumerate(bundle.all_graphs):
            done, total = nth * len(bundle.all_graphs) + index, len(targets) * len(bundle.all_graphs)
            progress(done, total, f"{Path(graph).stem} for sm_{target.sm}")
            _build_one(bundle, target, graph, batch, partial(progress, done, total))
    total = len(targets) * len(bundle.all_graphs)
    progress(total, total, "done")
    return [find_engines(bundle, target) for target in targets]


def find_engines(bundle: Bundle, target: Target) -> Engines:
    """The engines of `bundle` for `target`. Raises BundleError, with the command that mends it, if one is not whole."""
    folder = folder_of(bundle, target)
    record = _read(folder)
    again = f"build: {build_command(bundle.path, target, record['batch'] if record else None)}"
    if not record:
        others = sorted(path.parent.name for path in folder.parent.glob(f"*/{RECORD}"))
        there = f"only for {', '.join(others)}" if others else "none at all"
        raise BundleError(f"{bundle.path} holds no engines for {target}, {there}; {again}")
    if record["bundle"] != _hash(bundle.path / MANIFEST):
        raise BundleError(f"the engines in {folder} are of another bundle; {again}")
    files, seconds = {}, {}
    for graph in bundle.all_graphs:
        files[graph] = file = engine_file(folder, graph)
        if trouble := _trouble(file, record["engines"].get(file.name)):
            raise BundleError(f"{file} {trouble}; {again}")
        seconds[graph] = record["engines"][file.name]["seconds"]
    least, best, most = record["batch"]
    return Engines(target, (least, best, most), files, seconds)


def folder_of(bundle: Bundle, target: Target) -> Path:
    """Where the engines of `bundle` for `target` lie."""
    return bundle.path / "engines" / str(target)


def engine_file(folder: Path, graph: str) -> Path:
    """The engine of graph file `graph` in a target's folder, packed."""
    return folder / f"{Path(graph).stem}.engine.gz"


def build_command(bundle: Path, target: Target, batch: Sequence[int] | None = None) -> str:
    """What a person types to have these engines built."""
    profile = f" --batch {','.join(map(str, batch))}" if batch else ""
    where = quote(str(bundle))
    return f"python -m hcompress_runtime.engine_cache {where} --flavor {target.flavor} --sm {target.sm}{profile}"


def parse_batch(text: str) -> Batch:
    """ "4" as (4, 4, 4), static; "1,4,8" as least, best and most. Raises InputError."""
    try:
        sizes = [int(part) for part in text.split(",")]
        least, best, most = sizes * 3 if len(sizes) == 1 else sizes
    except ValueError as error:
        raise InputError(f"batch {text!r} should be a number, or least, best and most such as 1,4,8") from error
    check_batch((least, best, most))
    return least, best, most


def gpu_here(flavor: Flavor) -> int:
    """The compute capability of the GPU here."""
    try:
        return require_gpu(flavor).sm
    except EngineError as error:
        if flavor.name == "rtx":
            raise EngineError(error.problem, "name the kind of GPU to build for, such as --sm 89") from error
        raise


def _build_one(bundle: Bundle, target: Target, graph: str, batch: Batch, say: Callable[[str], object]) -> None:
    """Have the engine of one graph, whoever builds it."""
    folder = folder_of(bundle, target)
    head = {"format": FORMAT, "bundle": _hash(bundle.path / MANIFEST), **asdict(target), "batch": [*batch]}
    file = engine_file(folder, graph)
    with _locked(folder, say):
        record = _read(folder)
        engines = record["engines"] if record and head.items() <= record.items() else {}
        if not _trouble(file, engines.get(file.name)):
            return
        tokens = {f"cache_in.{slot}": shape[0] * bundle.rows_per_sample for slot, shape in bundle.plan.slots.items()}
        built = build_engine(
            bundle.path / graph,
            file,
            flavor=target.flavor,
            sm=target.sm,
            batch=batch,
            per_sample=tokens,
            timing_cache=folder / "timing.cache",
            constants=_step_sizes(bundle, graph),
        )
        entry = {"bytes": built.engine_bytes, "sha256": built.sha256, "seconds": round(built.seconds, 3)}
        text = json.dumps(head | {"engines": engines | {file.name: entry}}, indent=1)
        write_atomically(folder / RECORD, text.encode())


def _step_sizes(bundle: Bundle, graph: str) -> dict[str, NDArray[np.float32]]:
    """What an engine of `graph` holds of a quantized bundle: the largest step sizes of the calls that it serves."""
    served = [call for call, other in enumerate(bundle.graphs) if other == graph]
    if SCALES not in bundle.constants or not served:  # the solver's update serves none
        return {}
    return {f"step.{SCALES}": bundle.constants[SCALES][served].max(axis=0, keepdims=True)}


@contextmanager
def _locked(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """One process at a time in `folder`; the lock goes with the process that holds it."""
    import fcntl  # not on Windows

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("wb")
    except OSError as error:
        raise EngineError(f"cannot write {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that builds in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(folder: Path) -> dict[str, Any] | None:
    """The record in `folder`; None where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        least, best, most = map(int, record["batch"])
        entries = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"]), "seconds": float(entry["seconds"])}
            for name, entry in record["engines"].items()
        }
        known = record["format"] == FORMAT and isinstance(record["bundle"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record | {"batch": [least, best, most], "engines": entries} if known else None


def _trouble(file: Path, entry: Mapping[str, Any] | None) -> str | None:
    """Why an engine file is not what its record says."""
    if entry is None or not file.is_file():
        return "is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {entry['bytes']}"
    return None if _hash(file) == entry["sha256"] else "was changed"


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    """Build the engines of a bundle: `python -m hcompress_runtime.engine_cache --help`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--flavor", default="auto", help="auto, trt or rtx")
    parser.add_argument("--sm", type=int, action="append", default=[], help="such as 89; repeat for several")
    parser.add_argument("--batch", default="1", help="samples at once, or least,best,most")
    asked = parser.parse_args()
    try:
        for engines in build_engines(asked.bundle, asked.flavor, asked.sm, parse_batch(asked.batch)):
            print(json.dumps({"target": str(engines.target), **engines.figures()}))
    except HcompressError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
