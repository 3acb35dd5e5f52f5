"""Captions of pictures as what a text model is told of them: read once, by the model's own text encoder.

A picture's caption is the first line of the file beside it, `apple.txt` beside `apple.png`, as trainers of
text-to-image models have it. What the encoder makes of them is kept in `data_folder()`/captions as float16, and lies in
memory while a model trains: 15 kB a caption for zoo:emoji-pixart, 1 MB for PixArt-alpha with its 120 tokens of T5.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcompress.adapter import Adapter
from hcompress.errors import DataError, InputError
from hcompress.models.loading import Model
from hcompress.models.prompts import ENCODED
from hcompress.prompts import MINILM_MODELS, encode_for, write_prompts
from hcompress.zoo import data_folder
from hcompress_runtime.conditions import load_prompts, null_name

SUFFIX = ".txt"

Prompt = Mapping[str, NDArray[Any]]
"""One row of a prompts file's tensors, the null prompt's included."""


def reads_captions(adapter: Adapter) -> bool:
    """Whether a caption is all that a model has to be told of a picture."""
    return {name for name, one in adapter.conditions.items() if one.default is None} == ENCODED


def caption_of(picture: Path) -> str | None:
    """The caption beside a picture's file. Raises DataError where that is no text."""
    file = picture.with_suffix(SUFFIX)
    if not file.is_file():
        return None
    try:
        return file.read_text("utf-8-sig").strip().partition("\n")[0].strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the caption {file} cannot be read ({error}); store it as UTF-8, or take it away") from error


def encode_captions(
    model: Model, captions: Iterable[str], on_notice: Callable[[str], object] = lambda line: None
) -> dict[str | None, Prompt]:
    """What the model's text encoder makes of each caption, and of None, which is the null prompt; {} for no captions.

    Comes from `data_folder()` where that has been done before.

    Raises DataError for a model without an encoder and for a damaged file, InputError for a caption that is too long,
    ModelError where the encoder cannot be loaded.
    """
    texts = sorted(set(captions))
    if not texts:
        return {}
    file = data_folder() / "captions" / f"{_key(model, texts)}.safetensors"
    if not file.is_file():
        _encode(model, texts, file, on_notice)
    try:
        tensors = load_prompts(file)
    except InputError as error:
        raise DataError(f"{error}: delete it, and captions are encoded again") from error
    prompts: dict[str | None, Prompt] = {None: {name: tensors[null_name(name)][0] for name in tensors}}
    for number, text in enumerate(texts):
        prompts[text] = {name: rows[number % len(rows)] for name, rows in tensors.items()}
    return prompts


def _encode(model: Model, texts: list[str], file: Path, on_notice: Callable[[str], object]) -> None:
    """Write what the encoder makes of `texts` to `file`."""
    if model.zoo not in MINILM_MODELS and not (model.folder / "text_encoder").is_dir():
        raise DataError(
            f"{model.name} comes without a text encoder to read captions with; copy text_encoder and tokenizer into "
            f"{model.folder}, or take the {SUFFIX} files away to train with the null prompt"
        )
    on_notice(f"reading {len(texts)} captions with the text encoder, once: kept at {file}")
    encoded = encode_for(model.zoo or str(model.folder), texts, device=str(model.adapter.device), dtype=np.float16)
    own = file.with_name(f"{os.getpid()}-{file.name}")  # each process of a run writes one
    write_prompts(own, encoded)
    own.replace(file)


def _key(model: Model, texts: list[str]) -> str:
    """A name for `texts` as this model's encoder reads them: another file of it, or another length, is another name."""
    files = sorted(file for part in ("text_encoder", "tokenizer") for file in (model.folder / part).glob("*"))
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    shape = model.adapter.conditions["prompt_embeds"].shape
    return hashlib.sha256(json.dumps([model.zoo or str(model.folder), stamps, shape, texts]).encode()).hexdigest()[:32]
