"""`hcompress encode`: text to the prompts file that `generate` and `train` take.

A step of its own, and not a flag of `generate`: a bundle runs without torch, and a text encoder does not. The file is
the boundary between the two, and encoded once it serves every schedule, device and backend that is to be compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def encode(
    source: Annotated[str, typer.Argument(help="The bundle or MODEL that is to be asked.", show_default=False)],
    prompts: Annotated[list[str], typer.Argument(help="One sample each.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Prompts file to write.", show_default=False)],
    negative: Annotated[str, typer.Option(help="What guidance leads away from.")] = "",
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of a transformers text encoder; the model's own if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Encode prompts for a text-conditional model, as embeddings that `hcompress generate --prompts` takes.

    Example: hcompress encode zoo:emoji-pixart "red apple, noto style" --out apple.safetensors
    """
    from rich.console import Console
    from safetensors.numpy import save

    from hcompress.prompts import encode_for
    from hcompress_runtime.files import write_atomically

    with Console(stderr=True).status("encoding"):
        tensors = encode_for(source, prompts, negative=negative, encoder=encoder)
    write_atomically(out, save(tensors))
    if as_json:
        print(json.dumps({"out": str(out), "prompts": len(prompts), "tokens": tensors["prompt_mask"].shape[1]}))
    else:
        print(out)
