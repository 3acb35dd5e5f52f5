"""CLIP score: how well pictures show what was asked for, by a CLIP of transformers.

    100 max(cos(image, text), 0), the mean over pictures         (Hessel et al. 2021, whose factor is 2.5)

Which CLIP it was belongs to the figure: `openai/clip-vit-base-patch16`, `-large-patch14`, ... differ by points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from hcompress.device import checked_device
from hcompress.errors import DataError, ModelError, missing
from hcompress.metrics.image_sets import ImageSet


@final
class Clip:
    """A CLIP with its tokenizer and preprocessor, float32, on `device`.

    model: a local folder or a hub id

    Raises ModelError where it cannot be loaded, InputError for a device that is not there, MissingExtra.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        if find_spec("transformers") is None:
            raise missing("transformers", "train")
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # of reading weights: it would be drawn across ours
        self.device = checked_device(device)
        try:
            self.network: Any = CLIPModel.from_pretrained(model, dtype=torch.float32).to(self.device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self.processor: Any = CLIPImageProcessorPil.from_pretrained(model)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"no CLIP can be loaded from {model} ({reason}); pass --clip a downloaded folder of one, such as "
                "openai/clip-vit-large-patch14, with its tokenizer and preprocessor_config.json"
            ) from error

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of uint8[B, 3, H, W], each by its prompt; a prompt is cut where CLIP's context ends."""
        rows = list(pictures.cpu().numpy())
        pixels = self.processor(images=rows, return_tensors="pt", input_data_format="channels_first")
        longest = self.network.config.text_config.max_position_embeddings
        text = self.tokenizer([*prompts], padding=True, truncation=True, max_length=longest, return_tensors="pt")
        told = {name: text[name].to(self.device) for name in ("input_ids", "attention_mask")}
        output = self.network(pixel_values=pixels["pixel_values"].to(self.device), **told)
        cosines: Tensor = (output.image_embeds * output.text_embeds).sum(dim=1)  # of unit length both
        return 100 * cosines.clamp(min=0).cpu()


def clip_score(
    images: ImageSet,
    prompts: Sequence[str],
    network: Clip,
    batch: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> float:
    """The mean over all pictures of a set that can be read; prompts[i] is that of picture i."""
    scores: list[Tensor] = []
    for numbers, pictures in images.batches(batch):
        scores.append(network(pictures, [prompts[number] for number in numbers]))
        progress(sum(map(len, scores)))
    return float(torch.cat(scores).double().mean())


def read_prompts(file: Path, count: int) -> list[str]:
    """The lines of a text file, one for each of `count` pictures in order. Raises DataError for another number."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a text file of prompts ({error})") from error
    if len(lines) != count:
        raise DataError(f"{file} holds {len(lines)} prompts for {count} pictures; it should have one line for each")
    return lines
