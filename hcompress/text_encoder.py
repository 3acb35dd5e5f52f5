"""Captions as token states, by any text encoder that transformers knows.

T5 of PixArt as well as a small BERT: what a text-conditional model wants is the encoder's last hidden state and which
tokens count. Only local folders are read. This is the learning half's: the runtime takes prompts as embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hcompress.device import checked_device
from hcompress.errors import ModelError

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
    def batches(self, prompts: Sequence[str], tokens: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """float32[B, tokens, width], zero where padded, and bool[B, tokens], in batches; longer prompts are cut."""
        for start in range(0, len(prompts), BATCH):
            batch: Any = self.tokenizer(
                list(prompts[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=tokens,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].to(self.device)
            hidden = self.model(input_ids=batch["input_ids"].to(self.device), attention_mask=mask).last_hidden_state
            yield (hidden * mask[..., None]).cpu().numpy(), mask.bool().cpu().numpy()

    def states(self, prompts: Sequence[str], tokens: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """float32[N, tokens, width] and bool[N, tokens], as `batches` has them."""
        states, masks = zip(*self.batches(prompts, tokens), strict=True)
        return np.concatenate(states), np.concatenate(masks)
