"""A set of generated Fashion-MNIST images against the real set, through the features of `zoo:fashion-classifier`.

Every distance between two finite samples is above zero even if both are real, and the more so the fewer they are. So
each value stands beside its floor: the same measure, at the same number of samples, of real images that neither the
classifier was trained on nor the reference holds. A value at its floor cannot be told from real.

Legend: N samples, 64 features, 10 classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcompress.errors import DataError
from hcompress.metrics.distances import class_score, frechet_distance, moments, precision_recall
from hcompress.zoo.fashion_classifier import FEATURES, NUM_CLASSES, load_classifier, load_reference

MIN_SAMPLES, MAX_SAMPLES = FEATURES + 1, 5000  # a covariance of full rank; as many as there are held-out real images
BATCH = 500


@dataclass(frozen=True)
class FashionMetrics:
    """What `fashion_metrics` measures. None of these is FID or IS: the network is our own small classifier."""

    fd64: float  # Fréchet distance on 64 features to all 10 000 test images; lower is closer
    fd64_floor: float
    accuracy: float  # share of images that the classifier takes for the class that was asked for
    precision: float  # share of generated images inside the manifold of real ones: fidelity
    precision_floor: float
    recall: float  # share of real images inside the manifold of generated ones: variety
    recall_floor: float
    class_score: float  # sure of each image, spread over the set: from 1 to 10; the formula of IS, another network
    num_samples: int


def fashion_metrics(images: Tensor, labels: Tensor) -> FashionMetrics:
    """Measure float images [N, 1, 28, 28] in [-1, 1] that were asked to be of classes `labels`, int[N] in 0..9.

    Images are judged as they would be saved: clamped, in 256 levels. N is 65 to 5 000; spread it evenly over the
    classes, as real images are. Raises DataError for another N, another shape, an unknown class or a value that is
    not finite.
    """
    _check(images, labels)
    n, classifier, reference = len(images), load_classifier(), load_reference()
    with torch.no_grad():
        saved = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        features = torch.cat([classifier.features(batch) for batch in saved.split(BATCH)])
        logits = classifier.head(features)
    real, heldout = reference.features[:n].float(), reference.heldout_features[:n].float()
    precision, recall = precision_recall(features, real)
    precision_floor, recall_floor = precision_recall(heldout, real)
    return FashionMetrics(
        fd64=frechet_distance(*moments(features), reference.mean, reference.covariance),
        fd64_floor=frechet_distance(*moments(heldout), reference.mean, reference.covariance),
        accuracy=float((logits.argmax(dim=1) == labels.cpu()).double().mean()),
        precision=precision,
        precision_floor=precision_floor,
        recall=recall,
        recall_floor=recall_floor,
        class_score=class_score(logits),
        num_samples=n,
    )


def _check(images: Tensor, labels: Tensor) -> None:
    """Raise DataError where `fashion_metrics` cannot judge."""
    if images.ndim != 4 or images.shape[1:] != (1, 28, 28) or labels.shape != images.shape[:1]:
        raise DataError(
            "Fashion metrics need images [N, 1, 28, 28] and N labels, "
            f"got images {list(images.shape)} and labels {list(labels.shape)}"
        )
    if not MIN_SAMPLES <= len(images) <= MAX_SAMPLES:
        raise DataError(
            f"Fashion metrics need {MIN_SAMPLES} to {MAX_SAMPLES} samples (the covariance of {FEATURES} features, "
            f"the number of held-out real images), got {len(images)}"
        )
    if not images.isfinite().all():
        raise DataError("the images hold NaN or infinity; the sampler that made them diverged")
    if labels.is_floating_point() or not ((labels >= 0) & (labels < NUM_CLASSES)).all():
        raise DataError(f"labels must be whole numbers from 0 to {NUM_CLASSES - 1}")
