"""Image against image: what the compressed sampler made of a noise, against what the dense one made of the same noise.

The primary measure of the project: no network, no bias, meaningful from a handful of samples. Legend: B batch,
C channels, H height, W width. Images are in [-1, 1], so the data range is 2; nothing is clamped. Every function
computes in float64, takes one value per image and returns their mean. All raise DataError where the two batches
differ in shape, are empty or hold a value that is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hcompress.errors import DataError

DATA_RANGE = 2.0
PSNR_CEILING_DB = 100.0
WINDOW, WINDOW_SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004, section III.C


def psnr_db(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of [B, ...] images; higher is closer.

    An image counts for at most 100 dB (its error is then that of float32 rounding): equal images would be infinite,
    and one of them would make the mean infinite, which says nothing and is not JSON.
    """
    images, reference = _pair(images, reference)
    mse = (images - reference).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(DATA_RANGE**2 / mse)).clamp(max=PSNR_CEILING_DB).mean())


def relative_l2(images: Tensor, reference: Tensor) -> float:
    """||x - x_ref|| / ||x_ref|| of [B, ...] images or latents; 0 is equal. Infinite where a reference is all zero."""
    images, reference = _pair(images, reference)
    error, norm = (x.flatten(1).norm(dim=1) for x in (images - reference, reference))
    return float(torch.where(error == 0, 0.0, error / norm).mean())


def ssim(images: Tensor, reference: Tensor) -> float:
    """Structural similarity of [B, C, H, W] images, H and W at least 11, in [-1, 1]; 1 is equal.

    Wang et al. 2004, eq. 13: 11x11 Gaussian window of sigma 1.5, population moments, K1 = 0.01, K2 = 0.03, only
    windows that lie inside the image, each channel for itself.
    """
    x, y = _pair(images, reference)
    if x.ndim != 4 or min(x.shape[2:]) < WINDOW:
        raise DataError(f"SSIM needs images [B, C, H, W] of at least {WINDOW}x{WINDOW} pixels, got {list(x.shape)}")
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_blur(z) for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return float((luminance * structure).flatten(1).mean(dim=1).mean())


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over the windows of [B, C, H, W]: [B, C, H - 10, W - 10], one axis after the other."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.softmax(-(offsets**2) / (2 * WINDOW_SIGMA**2), dim=0)
    planes = x.flatten(0, 1).unsqueeze(1)  # [B * C, 1, H, W]
    planes = functional.conv2d(planes, window.view(1, 1, -1, 1))
    return functional.conv2d(planes, window.view(1, 1, 1, -1)).unflatten(0, x.shape[:2]).squeeze(2)


def _pair(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, checked."""
    if images.shape != reference.shape or images.numel() == 0:
        raise DataError(f"cannot compare images {list(images.shape)} with a reference {list(reference.shape)}")
    for name, x in (("images", images), ("reference", reference)):
        if not x.isfinite().all():
            raise DataError(f"the {name} hold NaN or infinity; the sampler that made them diverged")
    return images.double(), reference.double()
