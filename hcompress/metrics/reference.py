"""What real images are reduced to before others are compared with them; a set that was seen once is not seen again.

A reference is a set of pictures, or ADM's npz of its statistics, which may hold pictures too:

    mu float[2048], sigma float[2048, 2048]       of `pool`: FID
    mu_s float[2023], sigma_s float[2023, 2023]   of `spatial`: sFID
    arr_0 uint8[n, H, W, 3]                       pictures: KID, precision and recall
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hcompress.errors import DataError
from hcompress.metrics.distances import moments
from hcompress.metrics.image_sets import DAMAGED, ImageSet, open_set
from hcompress.metrics.inception import POOL, SPATIAL, Inception, features_of
from hcompress_runtime.files import write_atomically

Moments = tuple[Tensor, Tensor]
PAIRS = {("mu", "sigma"): POOL, ("mu_s", "sigma_s"): SPATIAL}


@dataclass(frozen=True)
class Reference:
    """Real images: mean float64[D] and covariance float64[D, D] of both layers, and `pool` float32[n, 2048].

    spatial: None where the npz does not hold it; pool: None where it holds no pictures
    """

    name: str
    moments: Moments
    spatial: Moments | None
    pool: Tensor | None


def load_reference(
    path: Path,
    network: Inception,
    size: int | None = None,
    *,
    on_broken: Callable[[str], object] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """The reference in a folder or npz. What the network makes of pictures is kept in `cache_folder()`.

    size: as in `open_set`. Raises DataError for what is neither, or statistics of other dimensions.
    """
    stored = _statistics(path) if path.suffix == ".npz" and path.is_file() else {}
    if stored and "arr_0" not in stored:
        return Reference(str(path), _moments(stored, "", path), _spatial(stored, path), None)
    seen = _seen(open_set(path, size, on_broken), network, progress)
    own = seen["mean"], seen["covariance"]
    spatial = seen["mean_s"], seen["covariance_s"]
    if "mu" in stored:
        own, spatial = _moments(stored, "", path), _spatial(stored, path) or spatial
    return Reference(str(path), own, spatial, seen["pool"])


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/hcompress, ~/.cache/hcompress where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hcompress"


def _seen(images: ImageSet, network: Inception, progress: Callable[[int, int], None]) -> dict[str, Tensor]:
    """Features and moments of real images, from the cache where it has them."""
    key = hashlib.sha256(json.dumps([network.fingerprint, images.traits()]).encode()).hexdigest()
    file = cache_folder() / f"reference-{key[:32]}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        pass  # not there, or cut short: it is made anew
    features = features_of(images, network, progress=lambda done: progress(done, len(images)))
    if len(features) < 2:
        raise DataError("a reference needs at least 2 pictures for a covariance; got 1")
    (mean, covariance), (mean_s, covariance_s) = moments(features.pool), moments(features.spatial)
    found = {"pool": features.pool, "mean": mean, "covariance": covariance}
    found |= {"mean_s": mean_s, "covariance_s": covariance_s}
    write_atomically(file, save({name: tensor.contiguous() for name, tensor in found.items()}))
    return found


def _statistics(path: Path) -> dict[str, NDArray[np.float64]]:
    """The statistics of an npz; of pictures, only that there are some."""
    try:
        with path.open("rb") as file, np.load(file) as stored:  # of a path that is damaged, numpy leaves the file open
            wanted = [name for pair in PAIRS for name in pair if name in stored]
            return {name: stored[name] for name in wanted} | ({"arr_0": np.empty(0)} if "arr_0" in stored else {})
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read as an npz ({error}); download or copy it again") from error


def _moments(stored: dict[str, NDArray[np.float64]], suffix: str, path: Path) -> Moments:
    """`mu` and `sigma` of a layer, checked."""
    names = f"mu{suffix}", f"sigma{suffix}"
    width = PAIRS[names]
    if not set(names) <= stored.keys():
        raise DataError(
            f"{path} holds {', '.join(stored)}; a reference has {' and '.join(names)}, or pictures in arr_0"
        )
    mean, covariance = (torch.from_numpy(np.asarray(stored[name], np.float64)) for name in names)
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise DataError(
            f"{path}: {names[0]} is {list(mean.shape)} and {names[1]} {list(covariance.shape)}, but Inception gives "
            f"{width} features here; these are statistics of another network or layer"
        )
    return mean, covariance


def _spatial(stored: dict[str, NDArray[np.float64]], path: Path) -> Moments | None:
    return _moments(stored, "_s", path) if "mu_s" in stored else None
