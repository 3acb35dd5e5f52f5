"""From MODEL on the command line to an adapter.

`zoo:NAME`, `random:NAME`, a local diffusers folder, a hub id, or a run folder of `hcompress quantize` or `prune`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hcompress.adapter import Adapter
from hcompress.errors import AbsentModel, ModelError
from hcompress.lowbit.artefact import FILE as QUANTIZED
from hcompress.lowbit.artefact import load_quantized, read_origin
from hcompress.models import LEGACY, MODELS
from hcompress.models.random import PREFIX, make_random, random_scheduler
from hcompress.pruned import FILE as PRUNED
from hcompress.pruned import load_pruned, read_base

ZOO = Path(__file__).parent.parent / "zoo"
WANTED = ["transformer/*", "scheduler/*", "vae/*", "model_index.json", "prompts.*"]  # of the hub


@dataclass(frozen=True)
class Model:
    """A loaded model.

    name:             as the user wrote it
    adapter:          the denoiser, float32 or with layers in few bits, frozen
    scheduler_config: the configuration of the scheduler that the model came with, as its pipeline runs it
    folder:           where its files lie (VAE and text encoder, where it has them); a random model has none
    """

    name: str
    adapter: Adapter
    scheduler_config: dict[str, Any]
    folder: Path

    @property
    def zoo(self) -> str | None:
        """zoo:NAME where that is what the model is or was made from; its data and metrics are then the zoo's."""
        return f"zoo:{self.folder.name}" if self.folder.parent == ZOO else None


def zoo_names() -> list[str]:
    """The models that ship with the package."""
    return sorted(path.parent.name for path in ZOO.glob("*/transformer"))


def is_model(name: str) -> bool:
    """Whether a local file or folder is a MODEL: a pipeline's folder, or a run that left a network."""
    return any((Path(name) / file).is_file() for file in (QUANTIZED, PRUNED, "transformer/config.json"))


def load_model(name: str) -> Model:
    """Load MODEL, its float weights as float32. Raises ModelError where it is absent, broken or without an adapter."""
    import torch

    if (Path(name) / QUANTIZED).is_file():
        return _load_quantized(name)
    if (Path(name) / PRUNED).is_file():
        return _load_pruned(name)
    if name.startswith(PREFIX):
        return Model(name, make_random(name), random_scheduler(name), Path(os.devnull))
    folder = _find(name)
    config = _read_json(folder / "transformer" / "config.json")
    family = config.get("_class_name")
    if family == "Transformer2DModel":
        family = LEGACY.get(str(config.get("norm_type")), family)
    if family not in MODELS:
        raise ModelError(f"{name} is a {family}, which has no adapter yet; families that have one: {', '.join(MODELS)}")
    try:
        adapter = MODELS[family](str(folder / "transformer"), torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the weights of {name} cannot be read ({reason}); download or copy them again") from error
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    return Model(name, adapter, adapter.scheduler_config(scheduler), folder)


def _load_quantized(name: str) -> Model:
    """The model that was quantized, with layers in few bits; all but the network is its own."""
    file = Path(name) / QUANTIZED
    origin = read_origin(file)
    try:
        base = load_model(origin.base.model)
    except ModelError as error:
        raise ModelError(f"{name} was quantized from {origin.base.model}, which it needs: {error}") from error
    return replace(base, name=name, adapter=load_quantized(file, base.adapter))


def _load_pruned(name: str) -> Model:
    """The model that was pruned, with the network that is left; all but the network is its own."""
    file = Path(name) / PRUNED
    base_name = read_base(file)
    try:
        base = load_model(base_name)
    except ModelError as error:
        raise ModelError(f"{name} was pruned from {base_name}, which it needs: {error}") from error
    return replace(base, name=name, adapter=load_pruned(file, base.adapter))


def _find(name: str) -> Path:
    """The folder of MODEL, downloaded first where it is a hub id."""
    if name.startswith("zoo:"):
        folder = ZOO / name.removeprefix("zoo:")
        if not (folder / "transformer").is_dir():
            raise ModelError(f"no zoo model {name!r}; there are: {', '.join('zoo:' + n for n in zoo_names())}")
        return folder
    if (Path(name) / "transformer" / "config.json").is_file():
        return Path(name)
    if Path(name).exists():
        raise ModelError(
            f"{name} is no diffusers folder: transformer/config.json is missing; pass the pipeline's folder"
        )
    if not is_hub_id(name):
        raise ModelError(
            f"no model folder {name}; pass zoo:NAME, a local diffusers folder or a hub id ORGANISATION/NAME"
        )
    return _download(name)


def is_hub_id(name: str) -> bool:
    """Whether MODEL is neither a local path nor one of ours, but ORGANISATION/NAME."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def fetch_text_encoder(name: str) -> Path:
    """The folder of a hub id, with its text encoder too, which samples from embeddings do not need.

    Raises AbsentModel.
    """
    return _download(name, ["text_encoder/*", "tokenizer/*"])


def _download(name: str, wanted: list[str] = WANTED) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # HTTP, proxy, offline, disk, a name that the hub does not allow: no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AbsentModel(
            f"{name} is no local folder and cannot be fetched from the hub ({reason}); "
            "pass the path of a downloaded diffusers folder instead"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is missing or not JSON ({error}); download or copy the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, no configuration; download or copy the model again")
    return config
