"""One HTML page from headings, text, tables and pictures; opens from file://, pictures inside, no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from hcompress_runtime.files import write_atomically

STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows, `width` CSS pixels wide; `crisp` enlarges it without smoothing."""

    file: Path
    caption: str
    width: int | None = None
    crisp: bool = False

    def html(self) -> str:
        """The picture with its bytes inside."""
        data = base64.b64encode(self.file.read_bytes()).decode()
        caption = escape(self.caption)
        shown = f' width="{self.width}"' if self.width else ""
        shown += ' class="crisp"' if self.crisp else ""
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}"{shown}>'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class Section:
    """A heading with text, then a table (first row is its head), then pictures side by side."""

    heading: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = ()

    def html(self) -> str:
        """The section as HTML."""
        parts = [f"<h2>{escape(self.heading)}</h2>", f"<p>{escape(self.text)}</p>" if self.text else ""]
        if self.table:
            head, *body = self.table
            rows = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
            rows += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
            parts.append(f'<div class="scroll"><table>{"".join(rows)}</table></div>')
        if self.pictures:
            parts.append('<div class="row">' + "".join(picture.html() for picture in self.pictures) + "</div>")
        return "\n".join(part for part in parts if part)


class Part(Protocol):
    """Anything that can be put on a page."""

    def html(self) -> str:
        """As HTML."""


def write_page(path: Path, title: str, lead: str, parts: Sequence[Part], script: Path | None = None) -> None:
    """Write the page to `path`, with `script` at its end."""
    body = "\n".join(part.html() for part in parts)
    code = f"<script>{script.read_text()}</script>\n" if script else ""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text()}</style></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{body}\n{code}</body></html>\n'
    )
    write_atomically(path, page.encode())
