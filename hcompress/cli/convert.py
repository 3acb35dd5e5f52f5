"""`hcompress convert`: use a checkpoint as the authors of DiT or U-ViT published it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def convert(
    file: Annotated[Path, typer.Argument(help="A .pt of DiT or a .pth of U-ViT.")],
    out: Annotated[Path, typer.Option(help="Folder to write; a MODEL from then on.", show_default=False)],
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads, where not as published.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Turn the weights of DiT's or U-ViT's authors into a diffusers folder. No code in the file is run.

    Example: hcompress convert DiT-XL-2-256x256.pt --out models/dit-xl-2-256
    """
    from hcompress.models.convert import convert

    what = convert(file, out, heads)
    if as_json:
        print(json.dumps({"model": str(out), "network": what}))
    else:
        print(f"{out}: {what}")
