"""Model families. One file and one line in MODELS for each; the key is the diffusers class name in config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hcompress.adapter import Adapter


def _dit(folder: str, **source: Any) -> Adapter:
    from diffusers import DiTTransformer2DModel

    from hcompress.models.dit import DiT

    return DiT(DiTTransformer2DModel.from_pretrained(folder, **source))


MODELS: dict[str, Callable[..., Adapter]] = {
    "DiTTransformer2DModel": _dit,
}
