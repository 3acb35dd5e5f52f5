"""Distances between two sets of features, of which images make one: Fréchet, kernel; N, M samples, D features."""

from __future__ import annotations

import torch
from torch import Tensor


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


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD of features [N, D] and [M, D] under the kernel (x.y / D + 1)^3, over all pairs at once.

    Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, section 4, whose KID it is with another network. Its expectation
    is 0 for two samples of one distribution, at any N and M, so it can come out below.
    """
    x, y = first.double(), second.double()
    within = sum(_off_diagonal_mean(kernel) for kernel in (_cubic(x, x), _cubic(y, y)))
    return float(within - 2 * _cubic(x, y).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))
