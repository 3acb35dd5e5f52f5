"""CLIP score: how well pictures show what was asked for, by a CLIP of transformers.

    100 max(cos(image, text), 0), the mean over pictures         (Hessel et al. 2021, whose factor is 2.5)

Which CLIP it was belongs to the figure: `openai/clip-vit-base-patch16`, `-large-patch14`, ... differ by points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from hcompress.device import checked_device
from hcompress.errors import DataError, ModelError


@final
class ClipScore:
    """The mean over all pictures that were added.

    model: a local folder or a hub id of a CLIP with its tokenizer and preprocessor

    Raises ModelError where it cannot be loaded, InputError for a device that is not there.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self.device = checked_device(device)
        try:
            self.network: Any = CLIPModel.from_pretrained(model).to(self.device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self.processor: Any = CLIPImageProcessorPil.from_pretrained(model)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"no CLIP can be loaded from {model} ({reason}); pass --clip a downloaded folder of one, such as "
                "openai/clip-vit-large-patch14, with its tokenizer and preprocessor_config.json"
            ) from error
        self.total, self.count = 0.0, 0

    @torch.no_grad()
    def add(self, pictures: Tensor, prompts: list[str]) -> None:
        """Judge uint8[B, 3, H, W], each by its prompt; a prompt is cut where CLIP's context ends."""
        pixels = self.processor(images=list(pictures.numpy()), return_tensors="pt", input_data_format="channels_first")
        longest = self.network.config.text_config.max_position_embeddings
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        told = {name: text[name].to(self.device) for name in ("input_ids", "attention_mask")}
        output = self.network(pixel_values=pixels["pixel_values"].to(self.device), **told)
        cosines = (output.image_embeds * output.text_embeds).sum(dim=1)  # of unit length both
        self.total += 100 * float(cosines.clamp(min=0).sum())
        self.count += len(prompts)

    @property
    def mean(self) -> float:
        """Of all pictures so far."""
        return self.total / self.count


def read_prompts(file: Path, count: int) -> list[str]:
    """The lines of a text file, one for each of `count` pictures in order. Raises DataError for another number."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a text file of prompts ({error})") from error
    if len(lines) != count:
        raise DataError(f"{file} holds {len(lines)} prompts for {count} pictures; it should have one line for each")
    return lines
