"""One HTML page from headings, text, tables and pictures; opens from file://, pictures inside, no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hcompress_runtime.files import write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1080px; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #dde4ea }
th:first-child, td:first-child { text-align: left } th { color: #52616f; font-weight: 600 }
.row { display: flex; gap: 1.5rem; flex-wrap: wrap; align-items: start } figure { margin: 0 }
figcaption { color: #52616f; font-size: .88rem } img { max-width: 100% } img.crisp { image-rendering: pixelated }
code { background: #f2f5f8; padding: .1rem .3rem; border-radius: 3px } p.lead { color: #52616f; margin-top: .2rem }
"""


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
            parts.append(f"<table>{''.join(rows)}</table>")
        if self.pictures:
            parts.append('<div class="row">' + "".join(picture.html() for picture in self.pictures) + "</div>")
        return "\n".join(part for part in parts if part)


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page to `path`."""
    body = "\n".join(section.html() for section in sections)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n'
    )
    write_atomically(path, page.encode())
