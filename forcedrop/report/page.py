"""The page: one HTML file that needs nothing else, no network and no other file."""

from __future__ import annotations

import base64
import html
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from forcedrop.files import write_text

_LONGEST_LIST = 12


class Block(ABC):
    """Anything that a page can hold."""

    @abstractmethod
    def html(self) -> str:
        """Return the block as HTML, with everything foreign escaped."""

    def script(self) -> str:
        """Return the script that the block needs, if any; a page with several such blocks holds it once."""
        return ""


@dataclass(frozen=True)
class Text(Block):
    """Paragraphs of prose, parted by empty lines."""

    text: str

    def html(self) -> str:
        """Return one element a paragraph."""
        return "\n".join(f"<p>{html.escape(part)}</p>" for part in self.text.split("\n\n"))


@dataclass(frozen=True)
class Plain(Block):
    """Text whose columns matter, such as a table made for the terminal."""

    text: str

    def html(self) -> str:
        """Return it in a fixed-width font, to be scrolled where it is wider than the page."""
        return f"<pre>{html.escape(self.text)}</pre>"


@dataclass(frozen=True)
class Picture(Block):
    """A PNG file, embedded."""

    path: Path

    def html(self) -> str:
        """Return the picture with its bytes."""
        return _image(self.path.read_bytes(), self.path.stem)


@dataclass(frozen=True)
class Drawing(Block):
    """A figure that is drawn when the page is written.

    Attributes:
        figure: of matplotlib.
        name: read out where pictures are not shown.
    """

    figure: Figure
    name: str

    def html(self) -> str:
        """Return the figure as an embedded PNG."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=130)
        return _image(stream.getvalue(), self.name)


@dataclass(frozen=True)
class Table(Block):
    """A table whose first column names the row.

    Attributes:
        head: names of the columns, with units.
        rows: cells, as they shall be read.
        caption: a sentence on what is in it.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def html(self) -> str:
        """Return the table; one wider than the page scrolls on its own."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.head)
        body = "\n".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
        return f'<div class="wide">{table}</div>'


@dataclass(frozen=True)
class Settings(Block):
    """Nested settings, as YAML."""

    values: Mapping[str, Any]

    def html(self) -> str:
        """Return them with long lists cut short."""
        text = yaml.safe_dump(_shortened(self.values), sort_keys=False, allow_unicode=True, width=100)
        return Plain(text.rstrip()).html()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        heading: empty for a part without one.
        blocks: what is in it, from above to below.
    """

    heading: str
    blocks: Sequence[Block]


def results_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write one HTML file that needs nothing else.

    Args:
        path: the file; its folder is made if missing.
        title: of the page.
        sections: its parts, from above to below.
    """
    scripts = dict.fromkeys(block.script() for section in sections for block in section.blocks)
    parts = [f"<script>{script}</script>" for script in scripts if script]
    for section in sections:
        if section.heading:
            parts.append(f"<h2>{html.escape(section.heading)}</h2>")
        parts += [block.html() for block in section.blocks]
    path = Path(path)
    # assembled without str.format, which would stumble over the braces of the viewer's script
    page = "\n".join([_HEAD.replace("TITLE", html.escape(title)), *parts, "</body></html>\n"])
    write_text(path, page)
    return path


def _image(data: bytes, name: str) -> str:
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _shortened(value: Any) -> Any:
    """Return the value with six digits, and with what is left out of long lists said in words."""
    if isinstance(value, Mapping):
        return {str(key): _shortened(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > _LONGEST_LIST:
            return [*map(_shortened, value[:3]), f"… {len(value) - 4} more …", _shortened(value[-1])]
        return [_shortened(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if isinstance(value, str | int | None) else str(value)


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #222; background: #fff; }
p { max-width: 48rem; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 13px; line-height: 1.4; }
img { max-width: 100%; display: block; margin: 1rem auto; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; color: #555; }
th, td { padding: .25rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
thead th { vertical-align: bottom; border-bottom: 2px solid #999; }
th:first-child { text-align: left; }
tbody th { font-weight: normal; }
</style></head><body><h1>TITLE</h1>"""
