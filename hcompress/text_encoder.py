"""Captions as token states: the tensors of a prompts file, by any text encoder that transformers knows.

T5 of PixArt as well as a small BERT: what a text-conditional model wants is the encoder's last hidden state and which
tokens count. Only local folders are read. This is the learning half's: the runtime takes prompts as embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from hcompress.device import checked_device
from hcompress.errors import InputError, ModelError

BATCH = 64


class TextEncoder:
    """The encoder and tokenizer of `folder`, float32, on `device`.

    Either both lie in it side by side, as transformers saves them, or in its text_encoder/ and tokenizer/, as diffusers
    does. Raises ModelError where they do not, InputError for a device that is not there.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForTextEncoding, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # of reading weights: it would be drawn across ours
        self.device = checked_device(device)
        apart = (folder / "text_encoder").is_dir()
        model, tokenizer = (folder / "text_encoder", folder / "tokenizer") if apart else (folder, folder)
        if not (model / "config.json").is_file():
            raise ModelError(f"no text encoder in {folder}: it has neither text_encoder/config.json nor config.json")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
            self.model = AutoModelForTextEncoding.from_pretrained(
                str(model), local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"the text encoder in {folder} cannot be loaded ({reason}); copy it again") from error
        self.model.eval().requires_grad_(False).to(self.device)

    @property
    def width(self) -> int:
        """Of a token's state."""
        return int(self.model.config.hidden_size)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, with those that the tokenizer adds."""
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False)["input_ids"]]

    @torch.no_grad()
    def states(
        self,
        prompts: Sequence[str],
        tokens: int,
        dtype: DTypeLike = np.float32,
        on_batch: Callable[[int], object] = lambda done: None,
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """dtype[N, tokens, width], zero where padded, and bool[N, tokens]; longer prompts are cut.

        on_batch: told how many prompts are done
        """
        states = np.empty((len(prompts), tokens, self.width), dtype)
        masks = np.empty((len(prompts), tokens), np.bool_)
        for start in range(0, len(prompts), BATCH):
            rows = slice(start, start + BATCH)
            batch: Any = self.tokenizer(
                list(prompts[rows]), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
            )
            mask = batch["attention_mask"].to(self.device)
            hidden = self.model(input_ids=batch["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
            states[rows] = (hidden * mask[..., None]).cpu().numpy()
            masks[rows] = mask.bool().cpu().numpy()
            on_batch(min(start + BATCH, len(prompts)))
        return states, masks


def encode(
    encoder: TextEncoder,
    prompts: Sequence[str],
    tokens: int,
    negative: str = "",
    dtype: DTypeLike = np.float32,
    on_batch: Callable[[int], object] = lambda done: None,
) -> dict[str, NDArray[Any]]:
    """The tensors of a prompts file (hcompress_runtime.conditions) for `prompts`, led away from `negative`.

    Raises InputError for no prompts.
    """
    if not prompts:
        raise InputError("no prompts to encode")
    embeds, mask = encoder.states(prompts, tokens, dtype, on_batch)
    null_embeds, null_mask = encoder.states([negative], tokens, dtype)
    return {"prompt_embeds": embeds, "prompt_mask": mask, "null_embeds": null_embeds, "null_mask": null_mask}
