"""From latents to pictures, and back: the VAE that a latent model came with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hcompress.errors import ModelError

PIXELS = (1, 3)  # channels of a picture: gray, or RGB


class Decoder(nn.Module):
    """Pictures [B, 3, H, W], about [-1, 1], for latents [B, C, h, w] as the denoiser scales them.

    The scale is `scaling_factor` of the VAE's configuration (Rombach et al. 2022, section 4.3.2 of the appendix: unit
    variance), and its `shift_factor` where it has one.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def forward(self, latent: Tensor) -> Tensor:
        """One picture for each latent."""
        decoded: Tensor = self.vae.decode(latent / self.scale + self.shift, return_dict=False)[0]
        return decoded


class Encoder(nn.Module):
    """Latents as the denoiser scales them for pictures [B, 3, H, W] in [-1, 1], one draw of each one's distribution.

    scale_down: sides of a picture over those of its latent
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        self.scale_down = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def forward(self, pictures: Tensor, noise: Callable[[tuple[int, ...]], NDArray[np.float32]]) -> Tensor:
        """[B, C, h, w]; `noise` gives unit-variance noise for B latents of a shape [C, h, w]."""
        latents = self.vae.encode(pictures, return_dict=False)[0]
        drawn = torch.from_numpy(noise(tuple(latents.mean.shape[1:]))).to(latents.mean)
        encoded: Tensor = (latents.mean + latents.std * drawn - self.shift) * self.scale
        return encoded


def load_decoder(folder: Path) -> Decoder | None:
    """The decoder in `folder`/vae, float32; None for a model in pixel space. Raises ModelError where it is broken."""
    vae = _load(folder)
    return None if vae is None else Decoder(vae)


def load_viewer(folder: Path, channels: int) -> nn.Module | None:
    """What makes pictures [B, 1 or 3, H, W] of samples of so many channels; None for latents without a VAE.

    That is the decoder in `folder`/vae, or nothing to do for a model in pixel space. Raises ModelError as above.
    """
    return load_decoder(folder) or (nn.Identity() if channels in PIXELS else None)


def load_encoder(folder: Path) -> Encoder | None:
    """The encoder in `folder`/vae, likewise."""
    vae = _load(folder)
    return None if vae is None else Encoder(vae)


def _load(folder: Path) -> Any:
    if not (folder / "vae").is_dir():
        return None
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(str(folder / "vae"), torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the VAE in {folder / 'vae'} cannot be read ({reason}); download or copy it again") from error
