"""Metrics: what they must be for equal, shifted, noisy, blurred and partial images. Only one test needs the data set.

The real images are the 200 test images that ship with the classifier; 200 samples are few, so the floors are high,
and the harm done here (5 % noise, a 3x3 blur, half the classes) is large.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from hcompress.errors import DataError
from hcompress.metrics.distances import (
    class_score,
    frechet_distance,
    frechet_to,
    kernel_distance,
    moments,
    precision_recall,
)
from hcompress.metrics.fashion import MAX_SAMPLES, MIN_SAMPLES, fashion_metrics
from hcompress.metrics.paired import PSNR_CEILING_DB, psnr_db, relative_l2, ssim
from hcompress.zoo.fashion import FOLDER as DATA
from hcompress.zoo.fashion import load_fashion
from hcompress.zoo.fashion_classifier import FOLDER, load_classifier, load_reference

PAIRED = {psnr_db: PSNR_CEILING_DB, ssim: 1.0, relative_l2: 0.0}  # metric: its value for equal images
REFERENCE = load_reference()
REAL = REFERENCE.images.unsqueeze(1).float() / 127.5 - 1  # [200, 1, 28, 28]
LABELS = torch.arange(len(REAL)) % 10


def noisy(images: Tensor, sigma: float) -> Tensor:
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blurred(images: Tensor) -> Tensor:
    return functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


@pytest.mark.parametrize("metric", PAIRED)
def test_equal_images_are_perfect(metric) -> None:
    assert metric(REAL, REAL) == PAIRED[metric]


@pytest.mark.parametrize("metric", PAIRED)
def test_more_noise_is_worse(metric) -> None:
    distances = [abs(metric(noisy(REAL, sigma), REAL) - PAIRED[metric]) for sigma in (0.001, 0.01, 0.1, 1.0)]
    assert distances == sorted(distances) and distances[0] > 0


@pytest.mark.parametrize("metric", PAIRED)
def test_every_image_counts_the_same(metric) -> None:
    other = torch.cat([noisy(REAL[:1], 0.5), noisy(REAL[1:2], 0.01)])
    each = [metric(other[i : i + 1], REAL[i : i + 1]) for i in range(2)]
    assert metric(other, REAL[:2]) == pytest.approx(sum(each) / 2)


@pytest.mark.parametrize("metric", PAIRED)
def test_paired_metrics_refuse_what_they_cannot_compare(metric) -> None:
    for images, reference in ((REAL[:1], REAL[:2]), (REAL[:0], REAL[:0]), (REAL[:1] * math.nan, REAL[:1])):
        with pytest.raises(DataError):
            metric(images, reference)


GRAYS = st.integers(-255, 255).map(lambda level: level / 255)


@given(GRAYS, GRAYS)
def test_constant_images_have_the_values_of_the_formulas(a: float, b: float) -> None:
    x, y = (torch.full((1, 3, 16, 12), value, dtype=torch.float64) for value in (a, b))
    c1 = 0.02**2
    # abs: the variances of constants cancel to 1e-16, beside c2 = 0.06^2
    assert ssim(x, y) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-12)
    if a != b:
        assert psnr_db(x, y) == pytest.approx(20 * math.log10(2 / abs(a - b)))
    if b != 0:
        assert relative_l2(x, y) == pytest.approx(abs(a - b) / abs(b))


def test_ssim_needs_a_window() -> None:
    with pytest.raises(DataError, match="11x11"):
        ssim(REAL[..., :10], REAL[..., :10])


@given(st.integers(0, 1000))
def test_frechet_distance_of_gaussians_that_share_axes(seed: int) -> None:
    """There it is |m - m'|^2 + sum (sigma - sigma')^2, whatever the axes, even where some sigma is 0."""
    rng = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(8, 8, generator=rng, dtype=torch.float64)).Q
    means = torch.randn(2, 8, generator=rng, dtype=torch.float64)
    sigmas = torch.rand(2, 8, generator=rng, dtype=torch.float64)
    sigmas[0, 0] = 0
    first, second = (axes @ torch.diag(sigma**2) @ axes.T for sigma in sigmas)
    expected = float((means[0] - means[1]).square().sum() + (sigmas[0] - sigmas[1]).square().sum())
    # abs: an eigenvalue of 0 comes out as about 1e-16, its root as 1e-8
    assert frechet_distance(means[0], first, means[1], second) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(means[0], first, means[0], first) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 1000))
def test_kernel_distance_is_the_sum_over_pairs_of_its_definition(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 4, generator=rng, dtype=torch.float64) for n in (5, 7))

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum((float(a @ b) / 4 + 1) ** 3 for a, b in pairs) / len(pairs)

    within = sum(mean([(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y))
    assert kernel_distance(x, y) == pytest.approx(within - 2 * mean([(a, b) for a in x for b in y]))


def test_kernel_distance_has_no_bias() -> None:
    """Over many pairs of small sets of one distribution it is 0 on average; the biased one would be 0.27."""
    rng = torch.Generator().manual_seed(0)
    drawn = [kernel_distance(*torch.randn(2, 20, 8, generator=rng)) for _ in range(500)]
    spread = torch.tensor(drawn).std() / 500**0.5
    assert abs(sum(drawn) / 500) < 4 * spread < 0.1  # four standard errors
    assert kernel_distance(*(torch.randn(2, 20, 8, generator=rng) + torch.tensor([[[0.0]], [[2.0]]]))) > 1


@pytest.mark.parametrize("count", [3, 12, 40])
def test_the_frechet_distance_of_few_features_is_that_of_their_moments(count) -> None:
    rng = torch.Generator().manual_seed(count)
    few, many = (torch.randn(n, 12, generator=rng, dtype=torch.float64) for n in (count, 100))
    reference = moments(many + 1)
    # roots of the eigenvalues that are 0 where the covariance is singular: 1e-16 becomes 1e-8
    assert frechet_to(few, *reference) == pytest.approx(frechet_distance(*moments(few), *reference), abs=1e-6)


def test_precision_and_recall_tell_fidelity_from_variety() -> None:
    real = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    precision, recall = precision_recall(real[:30].repeat(10, 1) + 1e-4 * real, real)  # 30 modes of 300
    assert precision == 1 and recall < 0.2


def test_class_score_is_the_number_of_classes_seen() -> None:
    assert class_score(torch.zeros(100, 10)) == pytest.approx(1)
    assert class_score(100 * torch.eye(10)[torch.arange(100) % 10]) == pytest.approx(10)
    assert class_score(100 * torch.eye(10)[torch.arange(100) % 4]) == pytest.approx(4)


def test_stored_features_are_those_of_the_stored_classifier() -> None:
    features = load_classifier().features(REAL)
    # half a unit in the last place of float16 is 2^-11; 1e-3 absolute for values near zero
    torch.testing.assert_close(features, REFERENCE.features[: len(REAL)].float(), rtol=2**-11, atol=1e-3)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2e6


def test_floor_falls_with_the_number_of_samples() -> None:
    heldout = REFERENCE.heldout_features
    floors = [
        frechet_distance(*moments(heldout[:n]), REFERENCE.mean, REFERENCE.covariance) for n in (65, 200, 1000, 5000)
    ]
    assert floors == sorted(floors, reverse=True) and floors[-1] > 0


def test_real_images_are_near_the_floor() -> None:
    metrics = fashion_metrics(REAL, LABELS)
    assert metrics.num_samples == 200
    assert metrics.accuracy >= 0.88
    assert metrics.fd64 <= 1.5 * metrics.fd64_floor  # two sets of 200 differ by chance
    assert metrics.precision == metrics.recall == 1  # these very images are the first 200 rows of the reference
    assert metrics.precision_floor >= 0.7 and metrics.recall_floor >= 0.7
    assert 5 < metrics.class_score <= 10


@pytest.mark.parametrize("harm", [lambda x: noisy(x, 0.1), blurred], ids=["5 % noise", "blur"])
def test_harm_raises_fd64_far_above_the_floor(harm) -> None:
    metrics = fashion_metrics(harm(REAL), LABELS)
    assert metrics.fd64 > 2 * metrics.fd64_floor
    assert metrics.precision < metrics.precision_floor


def test_half_the_classes_raise_fd64_and_halve_the_class_score() -> None:
    half = LABELS < 5
    metrics = fashion_metrics(REAL[half], LABELS[half])
    assert metrics.fd64 > 2 * metrics.fd64_floor
    assert metrics.recall < metrics.recall_floor
    assert metrics.class_score <= 5.5  # five classes, and the few images taken for another
    assert metrics.accuracy >= 0.8


def test_wrong_labels_are_seen() -> None:
    assert fashion_metrics(REAL, LABELS.roll(1)).accuracy < 0.2


def test_images_are_judged_as_they_would_be_saved() -> None:
    assert fashion_metrics(REAL + 0.001, LABELS) == fashion_metrics(REAL, LABELS)  # under half a level of 2 / 255
    assert fashion_metrics(torch.where(REAL == -1, -3.0, REAL), LABELS) == fashion_metrics(REAL, LABELS)


def test_two_thousand_samples_take_seconds() -> None:
    started = time.monotonic()
    metrics = fashion_metrics(REAL.repeat(10, 1, 1, 1), LABELS.repeat(10))
    assert time.monotonic() - started < 60  # about 2 s when nothing else runs
    assert metrics.precision_floor >= 0.7 and metrics.recall_floor >= 0.7


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (REAL[: MIN_SAMPLES - 1], LABELS[: MIN_SAMPLES - 1], "65 to 5000"),
        (torch.zeros(MAX_SAMPLES + 1, 1, 28, 28), torch.zeros(MAX_SAMPLES + 1, dtype=torch.long), "65 to 5000"),
        (REAL.squeeze(1), LABELS, "28, 28"),
        (REAL, LABELS[1:], "N labels"),
        (REAL.where(REAL < 0.99, math.nan), LABELS, "NaN"),
        (REAL, LABELS + 1, "0 to 9"),
        (REAL, LABELS.float(), "whole numbers"),
    ],
)
def test_refusals_are_one_clear_line(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        fashion_metrics(images, labels)
    assert "\n" not in str(error.value)


def test_absent_files_are_named(tmp_path) -> None:
    for load in (load_classifier, load_reference):
        with pytest.raises(DataError, match=r"no .*safetensors; reinstall"):
            load(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}; apt-get install dataset-fashion-mnist")
def test_the_whole_test_set_is_what_the_card_says() -> None:
    pixels, classes = load_fashion("t10k")
    images, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
    features = torch.cat([load_classifier().features(batch) for batch in images.split(1000)])
    accuracy = float((load_classifier().head(features).argmax(dim=1) == labels).double().mean())
    assert f"{accuracy:.4f}" in (FOLDER / "README.md").read_text("utf-8")
    # not bit for bit: another CPU may sum in another order
    assert frechet_distance(*moments(features), REFERENCE.mean, REFERENCE.covariance) == pytest.approx(0, abs=1e-4)
