"""The Inception network that FID, sFID and IS are defined by, and its features of pictures.

The weights are TensorFlow's Inception of 2015-12-05 (`classify_image_graph_def.pb`, which ADM's evaluator runs), in
torch-fidelity's conversion. So is the preprocessing: 8-bit pictures in, resized to 299 x 299 by TensorFlow 1's bilinear
rule (no antialiasing, corners not aligned), then (x - 128) / 128. clean-fid's antialiased resize gives other figures.

    pool     [N, 2048]  `pool_3`: FID, KID, precision and recall
    spatial  [N, 2023]  `mixed_6/conv`, its first 7 of 192 channels at 17 x 17, in the order row, column, channel: sFID
    logits   [N, 1008]  pool times the last layer's weight, without its bias: IS
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final
from urllib.error import URLError

import torch
from torch import Tensor, nn

from hcompress.device import checked_device
from hcompress.errors import DataError, ModelError, missing
from hcompress.metrics.image_sets import ImageSet

POOL, SPATIAL_CHANNELS = 2048, 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS
FEATURES = ["2048", "logits_unbiased"]  # torch-fidelity's names
NETWORK = "torch_fidelity.feature_extractor_inceptionv3"


@dataclass(frozen=True)
class Features:
    """Of N pictures: pool float32[N, 2048], spatial float32[N, 2023], logits float32[N, 1008]."""

    pool: Tensor
    spatial: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.pool)


@final
class Inception:
    """The network; `fingerprint` is the SHA-256 of its weights.

    weights: torch-fidelity's file; None takes the one in torch's hub cache, and fetches it where it is not there

    Raises MissingExtra without torch-fidelity, ModelError where the weights are absent, broken or another network's,
    InputError for a device that is not there.
    """

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        place, module = checked_device(device), _network_module()
        file = _weights(module.URL_INCEPTION_V3) if weights is None else weights
        try:
            torch.load(file, map_location="cpu", weights_only=True)  # the library reads it in a way that runs code
            network = module.FeatureExtractorInceptionV3("inception", FEATURES, feature_extractor_weights_path=file)
        except (OSError, RuntimeError, EOFError, ValueError, TypeError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{file} cannot be read as Inception's weights ({reason}); download {module.URL_INCEPTION_V3}"
            ) from error
        self.network: nn.Module = network.to(place)
        self.device = place
        self.fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(lambda layer, inputs, output: self._spatial.append(output))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """Features of uint8[B, 3, H, W]."""
        pool, logits = self.network(pictures.to(self.device))
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool.cpu(), spatial.float().cpu(), logits.cpu())


def features_of(
    images: ImageSet, network: Inception, batch: int = 32, progress: Callable[[int], None] = lambda done: None
) -> Features:
    """Features of all pictures of a set that can be read."""
    found, done = [], 0
    for _, pictures in images.batches(batch):
        found.append(network(pictures))
        progress(done := done + len(pictures))
    if not found:
        raise DataError("there are no pictures to judge")
    return Features(*(torch.cat([getattr(one, name) for one in found]) for name in ("pool", "spatial", "logits")))


def _network_module() -> Any:
    """torch-fidelity's module of the network, without the package's own start.

    That one imports torchvision, for other networks, and fails where torchvision was not built for the torch at hand.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise missing("torch-fidelity", "metrics")
    if "torch_fidelity" in sys.modules:
        return importlib.import_module(NETWORK)
    sys.modules["torch_fidelity"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(NETWORK)
    finally:
        del sys.modules["torch_fidelity"]  # who imports it next gets all of it


def _weights(url: str) -> Path:
    """Where torch.hub keeps the file at `url`, fetched first where it is not there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(url)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except (URLError, OSError) as error:
            raise ModelError(
                f"Inception's weights are not at {file} and cannot be fetched ({error}); download {url} there, "
                "or pass --inception FILE"
            ) from error
    return file
