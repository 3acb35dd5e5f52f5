"""Text for a named model or bundle: which text encoder reads it, whether it fits, and the prompts of a model's own.

A model's encoder is the one in its own folder, where diffusers puts it, or on the hub beside it. `zoo:emoji-pixart`
reads with MiniLM, which is ten times its size and does not ship: `hcompress zoo fetch-data minilm` fetches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save

from hcompress.errors import InputError, ModelError
from hcompress.models.loading import fetch_text_encoder, is_hub_id, load_model
from hcompress.models.prompts import FILE
from hcompress.text_encoder import TextEncoder, encode
from hcompress.zoo import data_folder
from hcompress_runtime.conditions import Input
from hcompress_runtime.files import write_atomically

MINILM_MODELS = ("zoo:emoji-pixart",)
TEXT = "prompts.txt"  # beside FILE: what its rows say, a line each
QUOTED = 60  # characters of a prompt, in an error


def encode_for(
    source: str,
    prompts: Sequence[str],
    *,
    negative: str = "",
    encoder: Path | None = None,
    device: str = "cpu",
    dtype: DTypeLike = np.float32,
    on_batch: Callable[[int], object] = lambda done: None,
) -> dict[str, NDArray[Any]]:
    """The tensors of a prompts file for SOURCE, a bundle or a model.

    device, dtype: where the encoder runs, in float32, and what its states are stored in
    on_batch:      told how many prompts are done

    Raises InputError for a model that takes no text, an encoder of another width and a prompt that is too long;
    ModelError where there is no encoder.
    """
    inputs, name, folder = _open(source)
    if "prompt_embeds" not in inputs:
        raise InputError(f"{source} takes no text; it is conditioned on {', '.join(inputs)}")
    tokens, width = inputs["prompt_embeds"].shape
    reader = TextEncoder(encoder or _encoder_of(name, folder), device)
    if reader.width != width:
        raise InputError(
            f"this text encoder gives {reader.width} numbers a token, but {source} takes {width}; "
            "pass the one that the model was trained with as --encoder FOLDER"
        )
    for prompt, length in zip((*prompts, negative), reader.lengths([*prompts, negative]), strict=True):
        if length > tokens:
            said = repr(prompt[:QUOTED]) + (" ..." if len(prompt) > QUOTED else "")
            raise InputError(f"prompt {said} has {length} tokens, but {source} reads {tokens}; shorten it")
    return encode(reader, prompts, tokens, negative, dtype, on_batch)


def read_captions(file: Path) -> list[str]:
    """The lines of a text file that are not blank, a prompt each. Raises InputError where there are none."""
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a text file of prompts ({error}); one a line, UTF-8") from error
    if not any(lines):
        raise InputError(f"{file} holds no prompts; write one a line")
    return [line for line in lines if line]


def folder_for_own(source: str) -> Path:
    """Where the prompts of SOURCE's own belong, which has none yet.

    Raises InputError for what has no folder that is the user's, and for one that has prompts.
    """
    if source.startswith(("zoo:", "random:")) or (Path(source) / "manifest.json").is_file():
        raise InputError(f"--for-training is for a MODEL of yours, and {source} is none; pass --out FILE")
    folder = load_model(source).folder
    if (folder / FILE).exists():
        raise InputError(f"{folder / FILE} is there already; delete it to have others")
    return folder


def keep_own(folder: Path, prompts: Sequence[str], tensors: Mapping[str, NDArray[Any]]) -> Path:
    """Make `prompts` those of the model in `folder`: FILE, which training and scoring draw from, and TEXT."""
    write_atomically(folder / TEXT, "".join(f"{prompt}\n" for prompt in prompts).encode())
    write_atomically(folder / FILE, save(dict(tensors)))
    return folder / FILE


def _open(source: str) -> tuple[Mapping[str, Input], str, Path]:
    """What SOURCE is told of a sample, the name of its model, and the model's folder."""
    if (Path(source) / "manifest.json").is_file():
        from hcompress_runtime.bundle import open_bundle

        bundle = open_bundle(Path(source))
        name = str(bundle.manifest["identity"]["model"])
        return bundle.conditions, name, Path(name)
    model = load_model(source)
    return model.adapter.conditions, source, model.folder


def _encoder_of(name: str, folder: Path) -> Path:
    """The folder of the model's own text encoder, fetched from the hub where the model came from there."""
    if (folder / "text_encoder").is_dir():
        return folder
    if is_hub_id(name):
        folder = fetch_text_encoder(name)
        if (folder / "text_encoder").is_dir():
            return folder
    if name not in MINILM_MODELS:
        raise ModelError(f"{name} comes without a text encoder; pass one as --encoder FOLDER (config.json, tokenizer)")
    minilm = data_folder() / "minilm"
    if not (minilm / "config.json").is_file():
        raise ModelError(
            f"{name} reads text with MiniLM, which is not at {minilm}; get it with `hcompress zoo fetch-data minilm`"
        )
    return minilm
