"""Text for a named model or bundle: which text encoder reads it, and whether it fits.

A model's encoder is the one in its own folder, where diffusers puts it. `zoo:emoji-pixart` reads with MiniLM, which is
ten times its size and does not ship: `hcompress zoo fetch-data minilm` fetches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hcompress.errors import InputError, ModelError
from hcompress.models.loading import load_model
from hcompress.text_encoder import TextEncoder, encode
from hcompress.zoo import data_folder
from hcompress_runtime.conditions import Input

MINILM_MODELS = ("zoo:emoji-pixart",)


def encode_for(
    source: str, prompts: Sequence[str], *, negative: str = "", encoder: Path | None = None
) -> dict[str, NDArray[Any]]:
    """The tensors of a prompts file for SOURCE, a bundle or a model.

    Raises InputError for a model that takes no text, an encoder of another width and a prompt that is too long;
    ModelError where there is no encoder.
    """
    inputs, name, folder = _open(source)
    if "prompt_embeds" not in inputs:
        raise InputError(f"{source} takes no text; it is conditioned on {', '.join(inputs)}")
    tokens, width = inputs["prompt_embeds"].shape
    reader = TextEncoder(encoder or _encoder_of(name, folder))
    if reader.width != width:
        raise InputError(
            f"this text encoder gives {reader.width} numbers a token, but {source} takes {width}; "
            "pass the one that the model was trained with as --encoder FOLDER"
        )
    for prompt, length in zip((*prompts, negative), reader.lengths([*prompts, negative]), strict=True):
        if length > tokens:
            raise InputError(f"prompt {prompt!r} has {length} tokens, but {source} reads {tokens}; shorten it")
    return encode(reader, prompts, tokens, negative)


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
    """The folder of the model's own text encoder."""
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
