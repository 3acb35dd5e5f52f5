"""`hcompress recipes`: the recipes that ship, and whether one of your own is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def recipes() -> None:
    """List, show, copy and validate recipes and comparisons.

    Example: hcompress recipes list
    """


Name = Annotated[str, typer.Argument(help="A shipped recipe, or a file.", show_default=False)]


def _headline(file: Path) -> str:
    """What a recipe says it is: its first comment line."""
    return file.read_text("utf-8").partition("\n")[0].lstrip("# ")


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """List the recipes that ship with hcompress, and the comparisons.

    Example: hcompress recipes list
    """
    from hcompress.recipe import COMPARISONS, shipped

    kinds = {"recipes": shipped(), "comparisons": shipped(COMPARISONS)}
    listed = {kind: {name: _headline(file) for name, file in files.items()} for kind, files in kinds.items()}
    if as_json:
        print(json.dumps(listed))
        return
    width = max(len(name) for headlines in listed.values() for name in headlines)
    for kind, headlines in listed.items():
        print(*(f"{name:{width}}  {headline}" for name, headline in headlines.items()), sep="\n")
        if kind == "recipes":
            print("\nfor hcompress compare:")


@app.command()
def show(name: Name) -> None:
    """Print a recipe as it is written.

    Example: hcompress recipes show fashion-dit_ddim20_harmonica
    """
    from hcompress.recipe import find

    print(find(name).read_text("utf-8"), end="")


@app.command()
def copy(
    name: Name,
    dest: Annotated[Path, typer.Argument(help="File to make, or folder to put it into.")] = Path("."),
) -> None:
    """Copy a recipe, to change it. Never overwrites.

    Example: hcompress recipes copy fashion-dit_ddim20_harmonica mine.yaml
    """
    from hcompress.errors import RunError
    from hcompress.recipe import find
    from hcompress_runtime.files import write_atomically

    source = find(name)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists():
        raise RunError(f"{target} exists; pass another DEST")
    write_atomically(target, source.read_bytes())
    print(target)


@app.command()
def validate(file: Name) -> None:
    """Check a recipe and print it with every default spelled out.

    Example: hcompress recipes validate mine.yaml
    """
    from hcompress.comparison import cells_of, load_comparison
    from hcompress.recipe import dump, find, read, resolve_any

    found = find(file)
    if "recipes" not in read(found):
        print(dump(resolve_any(found)), end="")
        return
    comparison = load_comparison([found])
    cells, left_out = cells_of(comparison)
    print(f"{comparison.title}: {len(cells)} cells and fewer steps")
    for one in left_out:
        print(f"{one.name} {one.point} is left out: {one.reason}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    Example: hcompress recipes schema > recipe.schema.json
    """
    from hcompress.recipe import schema

    print(schema())
