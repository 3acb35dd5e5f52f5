"""A set of generated emoji against real ones, and each against the prompt it was asked for; see zoo/emoji_clip.py.

Every distance between two finite samples is above what it is between whole distributions, so each value stands beside
its floor: the same measure, at the same number of samples, of real emoji whose concepts the reference does not hold.

Legend: N samples, 128 components of the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcompress.errors import DataError
from hcompress.metrics.distances import frechet_distance, kernel_distance, moments
from hcompress.zoo.emoji_clip import (
    COMPONENTS,
    TEXT_FEATURES,
    image_features,
    load_clip,
    load_efflite0,
    load_reference,
    sentences,
)

MIN_SAMPLES, MAX_SAMPLES = COMPONENTS + 1, 2000  # a covariance of full rank; as many as the floor has real images
KERNEL_UNIT = 1000  # kernel distances are written in thousandths, as KID is


@dataclass(frozen=True)
class EmojiMetrics:
    """What `emoji_metrics` measures. None of these is FID, KID or CLIP score: the networks are others."""

    emoji_clip: float  # 100 x cosine of image and prompt in emoji-CLIP's space; higher is closer to what was asked
    emoji_clip_floor: float  # of real emoji of held-out concepts with their captions: nothing has to surpass it
    retrieval: float  # share of images to which, of all distinct prompts given, their own is nearest
    fd_efflite0: float  # Fréchet distance to real emoji; lower is closer
    fd_efflite0_floor: float
    kid_efflite0: float  # 1000 x unbiased kernel distance to real emoji; lower is closer, 0 is the same distribution
    kid_efflite0_floor: float
    num_samples: int


def emoji_metrics(images: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> EmojiMetrics:
    """Measure float images [N, 3, H, W] in [-1, 1] that were asked for by MiniLM's states [N, S, 384], mask [N, S].

    Images are judged as they would be saved: clamped, in 256 levels. N is 129 to 2 000; repeat each of the prompts
    equally often. Raises DataError for another N, another shape or a value that is not finite; MissingExtra without the
    packages of EfficientNet-Lite0.
    """
    _check(images, prompt_embeds, prompt_mask)
    n, network, clip, real = len(images), load_efflite0(), load_clip(), load_reference()
    saved = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    features = image_features(network, saved)
    asked = clip.text(sentences(prompt_embeds.cpu(), prompt_mask.cpu()))
    shown = clip.image(features)
    generated = (features - real.mean) @ real.components
    reference, floor = real.reference.float(), real.floor[:n].float()
    return EmojiMetrics(
        emoji_clip=100 * float((shown * asked).sum(dim=1).mean()),
        emoji_clip_floor=100 * float(real.clip.mean()),
        retrieval=retrieval(shown, asked),
        fd_efflite0=frechet_distance(*moments(generated), *moments(reference)),
        fd_efflite0_floor=frechet_distance(*moments(floor), *moments(reference)),
        kid_efflite0=KERNEL_UNIT * kernel_distance(generated, reference),
        kid_efflite0_floor=KERNEL_UNIT * kernel_distance(floor, reference),
        num_samples=n,
    )


def retrieval(shown: Tensor, asked: Tensor) -> float:
    """Share of unit vectors [N, D] `shown` of whose distinct partners `asked` [N, D] their own is the nearest."""
    distinct, own = torch.unique(asked, dim=0, return_inverse=True)
    return float(((shown @ distinct.T).argmax(dim=1) == own).double().mean())


def _check(images: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> None:
    """Raise DataError where `emoji_metrics` cannot judge."""
    n, states, mask = len(images), prompt_embeds.shape, prompt_mask.shape
    if images.ndim != 4 or images.shape[1] != 3 or len(states) != 3 or states[::2] != (n, TEXT_FEATURES):
        raise DataError(
            f"emoji metrics need images [N, 3, H, W] and MiniLM's states [N, S, {TEXT_FEATURES}], "
            f"got images {list(images.shape)} and states {list(states)}"
        )
    if mask != states[:2] or not prompt_mask.any(dim=1).all():
        raise DataError(f"prompt_mask should be {list(states[:2])} with a token in every row, got {list(mask)}")
    if not MIN_SAMPLES <= n <= MAX_SAMPLES:
        raise DataError(
            f"emoji metrics need {MIN_SAMPLES} to {MAX_SAMPLES} samples (the covariance of {COMPONENTS} components, "
            f"the number of real emoji for the floor), got {n}"
        )
    if not images.isfinite().all():
        raise DataError("the images hold NaN or infinity; the sampler that made them diverged")
