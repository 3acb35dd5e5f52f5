"""The `hcompress` command: the verbs in one list, and the one place where errors become lines.

Verb modules import what they need inside their function, so that help and completion stay instant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

import hcompress
from hcompress.cli import recipes, zoo
from hcompress.cli.bench import bench
from hcompress.cli.compare import compare
from hcompress.cli.convert import convert
from hcompress.cli.doctor import doctor
from hcompress.cli.encode import encode
from hcompress.cli.eval import evaluate
from hcompress.cli.export import export
from hcompress.cli.generate import generate
from hcompress.cli.import_ import import_
from hcompress.cli.inspect import inspect
from hcompress.cli.prune import prune
from hcompress.cli.quantize import quantize
from hcompress.cli.train import train
from hcompress.cli.verify import verify
from hcompress.errors import HcompressError, missing

VERBS: dict[str, Callable[..., None]] = {
    "train": train,
    "quantize": quantize,
    "prune": prune,
    "export": export,
    "verify": verify,
    "encode": encode,
    "generate": generate,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "inspect": inspect,
    "import": import_,
    "convert": convert,
    "doctor": doctor,
}

TRAIN_EXTRA = {"torch", "diffusers", "transformers", "accelerate", "matplotlib", "onnx_ir", "onnxscript"}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, verb in VERBS.items():
    app.command(name)(verb)
app.add_typer(recipes.app, name="recipes")
app.add_typer(zoo.app, name="zoo")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hcompress {hcompress.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Learn when a diffusion transformer may reuse its own activations; export and run it so.

    Example: hcompress train zoo:fashion-dit --target-cur 0.4 --out runs/first
    """


def main() -> None:
    """Run the command. An HcompressError is one line and exit code 1; any other escapes as a traceback, being a bug."""
    try:
        app()
    except HcompressError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in TRAIN_EXTRA:
            raise
        _fail(missing(library, "train"))


def _fail(error: HcompressError) -> NoReturn:
    message = " ".join(str(error).split())
    print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps({"error": {"kind": type(error).__name__, "message": message}}))
    sys.exit(1)


if __name__ == "__main__":
    main()
