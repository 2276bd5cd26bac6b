"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path


def results_page(path: str | Path, title: str, sections: Sequence[tuple[str, str, Sequence[Path]]]) -> Path:
    """Write one HTML file that needs nothing else: each section has a heading, a text and pictures, embedded."""
    parts = []
    for heading, text, pictures in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for paragraph in text.split("\n\n"):
            plain = paragraph.startswith(" ") or "  " in paragraph
            tag = "pre" if plain else "p"
            parts.append(f"<{tag}>{html.escape(paragraph)}</{tag}>")
        for picture in pictures:
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">')
    page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 13px; line-height: 1.4; }}
img {{ max-width: 100%; display: block; margin: 1rem auto; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""
