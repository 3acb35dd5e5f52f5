"""`hcompress encode`: text to the prompts file that `generate` takes, or to the prompts that a model is trained on.

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
    prompts: Annotated[list[str] | None, typer.Argument(help="One sample each.", show_default=False)] = None,
    captions: Annotated[Path | None, typer.Option("--from", help="Text file, a prompt a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="Prompts file to write.", show_default=False)] = None,
    for_training: Annotated[
        bool, typer.Option("--for-training", help="Keep them with MODEL: what train, quantize, eval draw from.")
    ] = False,
    negative: Annotated[str, typer.Option(help="What guidance leads away from.")] = "",
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of a transformers text encoder; the model's own if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the text encoder: cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Encode prompts for a text-conditional model, as embeddings.

    Example: hcompress encode zoo:emoji-pixart "red apple, noto style" --out apple.safetensors
    Example: hcompress encode my/pixart --from captions.txt --for-training --device cuda
    """
    from rich.console import Console
    from rich.progress import Progress

    from hcompress.errors import InputError
    from hcompress.prompts import encode_for, folder_for_own, keep_own, read_captions, write_prompts

    if bool(prompts) == (captions is not None):
        raise InputError("say what to encode: prompts as arguments, or --from FILE with one a line, not both")
    if (out is not None) == for_training:
        raise InputError("say where to: --out FILE for `generate`, or --for-training for MODEL's own, not both")
    asked = read_captions(captions) if captions else list(prompts or [])
    folder = folder_for_own(source) if for_training else Path()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("encoding", total=len(asked))
        encoded = encode_for(
            source,
            asked,
            negative=negative,
            encoder=encoder,
            device=device,
            dtype="float16" if for_training else "float32",  # there are many
            on_batch=lambda done: bars.update(task, completed=done),
        )
        if out is None:
            out = keep_own(folder, encoded)
        else:
            write_prompts(out, encoded)
    if as_json:
        print(json.dumps({"out": str(out), "prompts": len(asked), "tokens": encoded.tokens}))
    else:
        print(out)
