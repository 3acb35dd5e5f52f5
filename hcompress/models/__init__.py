"""Model families. One file and one line in MODELS for each; the key is the diffusers class name in config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hcompress.adapter import Adapter


def _dit(folder: str, **source: Any) -> Adapter:
    from diffusers import DiTTransformer2DModel

    from hcompress.models.dit import DiT

    return DiT(DiTTransformer2DModel.from_pretrained(folder, **source))


def _pixart(folder: str, **source: Any) -> Adapter:
    from hcompress.models.pixart import load_pixart

    return load_pixart(Path(folder), **source)


def _sd3(folder: str, **source: Any) -> Adapter:
    from hcompress.models.sd3 import load_sd3

    return load_sd3(Path(folder), **source)


def _flux(folder: str, **source: Any) -> Adapter:
    from hcompress.models.flux import load_flux

    return load_flux(Path(folder), **source)


MODELS: dict[str, Callable[..., Adapter]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}

LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What `Transformer2DModel` is called now, by its `norm_type`: the published DiT and PixArt have the old name."""
