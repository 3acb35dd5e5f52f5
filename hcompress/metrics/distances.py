"""Measures of sets of features, each made of one set of images: Fréchet and kernel distance, precision and recall, and
how sure and how spread a classifier is.

Legend: N, M samples, D features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS = 4096  # of a matrix of distances at a time


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean float64[D] and covariance float64[D, D] of features [N, D]."""
    return features.double().mean(dim=0), features.double().T.cov()


def frechet_distance(mean: Tensor, covariance: Tensor, mean_ref: Tensor, covariance_ref: Tensor) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) between two Gaussians.

    Dowson and Landau 1982; Heusel et al. 2017, eq. 6.
    The eigenvalues of S S' are those of the symmetric S^(1/2) S' S^(1/2), so no root of a general matrix is needed.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ covariance_ref @ root).clamp(min=0).sqrt().sum()
    return float((mean - mean_ref).square().sum() + covariance.trace() + covariance_ref.trace() - 2 * overlap)


def frechet_to(features: Tensor, mean_ref: Tensor, covariance_ref: Tensor) -> float:
    """`frechet_distance` of features [N, D] to a reference; where N is below D, in N x N instead of D x D.

    The eigenvalues of S S' are those of A S' A^T for any A with S = A^T A: the centred features, as well as the root.
    """
    n, (mean, covariance) = len(features), moments(features)
    if n > features.shape[1]:
        return frechet_distance(mean, covariance, mean_ref, covariance_ref)
    centred = (features.double() - mean) / math.sqrt(n - 1)
    overlap = torch.linalg.eigvalsh(centred @ covariance_ref @ centred.T).clamp(min=0).sqrt().sum()
    return float((mean - mean_ref).square().sum() + covariance.trace() + covariance_ref.trace() - 2 * overlap)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of features [N, D] and [M, D] under the kernel (x.y / D + 1)^3, over all pairs at once.

    Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, section 4, whose KID it is with another network. Its expectation
    is 0 for two samples of one distribution, at any N and M, so it can come out below.
    """
    x, y = first.double(), second.double()
    within = sum(_off_diagonal_mean(kernel) for kernel in (_cubic(x, x), _cubic(y, y)))
    return float(within - 2 * _cubic(x, y).mean())


def precision_recall(generated: Tensor, real: Tensor, k: int = 3, *, exact: bool = True) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2) of features [N, D] against [M, D].

    The manifold of a set is the union of the balls around its points that reach to the k-th nearest neighbour.
    Both values depend on the sizes of both sets: compare at the same N and M only. exact: distances by differences;
    otherwise by products, which are many times faster and round like them.
    """
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"

    def inside(points: Tensor, centres: Tensor) -> float:
        radii = torch.cat(
            [
                torch.cdist(rows, centres, compute_mode=mode).kthvalue(k + 1, dim=1).values  # the nearest is itself
                for rows in centres.split(ROWS)
            ]
        )
        hits = [(torch.cdist(rows, centres, compute_mode=mode) <= radii).any(dim=1) for rows in points.split(ROWS)]
        return float(torch.cat(hits).double().mean())

    return inside(generated, real), inside(real, generated)


def class_score(logits: Tensor) -> float:
    """exp E_x KL(p(y|x) || p(y)) of logits [N, C], over all N at once: from 1 to C. Salimans et al. 2016."""
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - math.log(len(logits))
    return float((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))
