"""The small network behind the Fashion-MNIST metrics, and the real-image statistics that they compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from hcompress.errors import DataError

FOLDER = Path(__file__).parent / "fashion-classifier"
FEATURES, NUM_CLASSES = 64, 10


def conv(width_in: int, width_out: int, stride: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()
    )


class FashionClassifier(nn.Module):
    """Images [B, 1, 28, 28] in [-1, 1] to logits [B, 10], through 64 features, by four convolutions (108 k weights)."""

    def __init__(self) -> None:
        """Initialise at random; `load_classifier` gives the trained one."""
        super().__init__()
        self.trunk = nn.Sequential(conv(1, 24, 1), conv(24, 48, 2), conv(48, 96, 2), conv(96, FEATURES, 1))
        self.head = nn.Linear(FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, [B, 64]: the last feature maps, averaged over space."""
        maps: Tensor = self.trunk(images)
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10]."""
        logits: Tensor = self.head(self.features(images))
        return logits


@dataclass(frozen=True)
class Reference:
    """Real Fashion-MNIST as the classifier sees it.

    In `features`, `heldout_features` and `images`, row i is of class i % 10, so any first N rows are balanced.
    """

    mean: Tensor  # float64[64], over all 10 000 test images
    covariance: Tensor  # float64[64, 64], likewise
    features: Tensor  # float16[5000, 64], of test images
    heldout_features: Tensor  # float16[5000, 64], of training-split images that the classifier was not trained on
    images: Tensor  # uint8[200, 28, 28], the test images behind the first 200 rows of `features`


def load_classifier(folder: Path = FOLDER) -> FashionClassifier:
    """The trained classifier, float32, in evaluation mode, frozen. Raises DataError where its file is absent."""
    classifier = FashionClassifier()
    classifier.load_state_dict(load_file(present(folder / "model.safetensors")))
    return classifier.eval().requires_grad_(False)


def load_reference(folder: Path = FOLDER) -> Reference:
    """The statistics stored with the classifier. Raises DataError where their file is absent."""
    return Reference(**load_file(present(folder / "reference.safetensors")))


def present(path: Path) -> Path:
    """`path`, or DataError where it is no file."""
    if not path.is_file():
        raise DataError(f"no {path}; reinstall hcompress, or run `python -m hcompress.zoo.train_fashion_classifier`")
    return path
