"""Blocks and the page: everything foreign is escaped, and nothing outside the file is asked for."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from forcedrop.report.page import Drawing, Picture, Plain, Section, Settings, Table, Text, results_page

EVIL = "</title><script>alert('x')</script>&"


class Elements(HTMLParser):
    """Counts the elements of a page and keeps what they point at and what is between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_offline(page: str) -> None:
    """Everything that the page points at is in the page; its styles fetch nothing either."""
    elements = Elements(page)
    assert all(target.startswith("data:") for target in elements.targets), elements.targets
    assert "@import" not in "".join(re.findall(r"<style>.*?</style>", page, flags=re.DOTALL))
    assert "url(" not in "".join(re.findall(r"<style>.*?</style>", page, flags=re.DOTALL))


def test_everything_foreign_is_escaped(tmp_path: Path) -> None:
    blocks = [Text(EVIL), Plain(EVIL), Table([EVIL], [[EVIL]], EVIL), Settings({EVIL: [EVIL]}), Drawing(Figure(), EVIL)]
    page = results_page(tmp_path / "new" / "p.html", EVIL, [Section(EVIL, blocks)]).read_text(encoding="utf-8")
    elements = Elements(page)
    assert "script" not in elements.tags
    assert elements.text.count(EVIL) >= 8  # title, heading, prose, plain, head, row, caption, key
    assert elements.tags.count("img") == 1
    assert_offline(page)


def test_the_offline_check_can_fail() -> None:
    for bad in (
        '<img src="https://x.org/a.png">',
        '<link href="a.css">',
        "<style>a { background: url(a.png) }</style>",
    ):
        with pytest.raises(AssertionError):
            assert_offline(bad)


def test_pictures_are_embedded_and_paragraphs_parted(tmp_path: Path) -> None:
    Figure().savefig(tmp_path / "a.png")
    page = results_page(tmp_path / "p.html", "t", [Section("", [Text("one\n\ntwo"), Picture(tmp_path / "a.png")])])
    text = page.read_text(encoding="utf-8")
    assert "<p>one</p>\n<p>two</p>" in text
    assert "data:image/png;base64,iVBOR" in text
    assert "<h2>" not in text


def test_settings_are_short_and_readable() -> None:
    text = Settings({"a": {"b": 0.1 + 0.2, "c": list(range(100))}, "d": None, "e": True}).html()
    assert "b: 0.3\n" in text
    assert "… 96 more …" in text
    assert text.count("\n") < 12
    assert "e: true" in text


def test_a_script_stands_on_the_page_once(tmp_path: Path) -> None:
    class Scripted(Text):
        def script(self) -> str:
            return "let once = 1;"

    page = results_page(tmp_path / "p.html", "t", [Section("a", [Scripted("x"), Scripted("y")])])
    assert page.read_text(encoding="utf-8").count("let once = 1;") == 1
