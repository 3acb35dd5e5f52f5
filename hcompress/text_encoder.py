"""Captions as token states: the tensors of a prompts file, by any text encoder that transformers knows.

T5 of PixArt as well as a small BERT: what a text-conditional model wants is the encoder's last hidden state and which
tokens count. Only local folders are read. This is the learning half's: the runtime takes prompts as embeddings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from hcompress.device import checked_device
from hcompress.errors import InputError, ModelError
from hcompress_runtime.conditions import STORED

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


@final
@dataclass(frozen=True)
class Encoded:
    """The tensors of a prompts file (hcompress_runtime.conditions), made when they are asked for.

    prompts:  N of them, of at most `tokens` tokens as `encoder` counts
    negative: what guidance leads away from
    dtype:    that states are stored in
    on_batch: told how many prompts are done

    Raises InputError for no prompts.
    """

    encoder: TextEncoder
    prompts: Sequence[str]
    tokens: int
    negative: str = ""
    dtype: DTypeLike = np.float32
    on_batch: Callable[[int], object] = lambda done: None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("no prompts to encode")

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All of them in memory."""
        null, empty = self._null()
        states, masks = zip(*self._batches(), strict=True)
        embeds, mask = np.concatenate(states), np.concatenate(masks)
        return {"null_embeds": null, "null_mask": empty, "prompt_embeds": embeds, "prompt_mask": mask}

    def write(self, file: BinaryIO, metadata: Mapping[str, str]) -> None:
        """The same to a file, a batch in memory: thirty thousand prompts of PixArt are 30 GB."""
        shape, states = (len(self.prompts), self.tokens), np.dtype(self.dtype)
        null, empty = self._null()
        layout = {  # in the order of the bytes
            "null_embeds": (states, null.shape),
            "prompt_embeds": (states, (*shape, self.encoder.width)),
            "null_mask": (np.dtype(bool), empty.shape),
            "prompt_mask": (np.dtype(bool), shape),
        }
        file.write(safetensors_header(layout, metadata))
        file.write(null.tobytes())
        masks = [empty]
        for batch, mask in self._batches():
            file.write(batch.tobytes())
            masks.append(mask)
        file.write(np.concatenate(masks).tobytes())

    def _null(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        states, mask = self.encoder.states([self.negative], self.tokens)
        return states.astype(self.dtype), mask

    def _batches(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        done = 0
        for states, mask in self.encoder.batches(self.prompts, self.tokens):
            yield states.astype(self.dtype), mask
            done += len(mask)
            self.on_batch(done)


def safetensors_header(layout: Mapping[str, tuple[np.dtype[Any], Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What precedes the bytes of tensors, dtype and shape of each by name, that follow each other in that order.

    The library writes only what is in memory as a whole.
    """
    codes = {np.dtype(stored): code for code, stored in STORED.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": codes[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text
