"""The page in a real browser, without a network: Debian's Chromium, which draws WebGL on the processor."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from forcedrop.report import report_page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PATIENCE = 180_000  # ms; a busy machine without a GPU is slow to draw


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("NO BROWSER: nobody has looked at the page; install Debian's package `chromium` to check it")
    api = pytest.importorskip(
        "playwright.sync_api", reason="NO PLAYWRIGHT: nobody has looked at the page; pip install playwright"
    )
    flags = ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-angle=swiftshader"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


class Witness:
    """An offline tab that notes what goes wrong and what is asked for."""

    def __init__(self, browser, path: Path) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.tab = browser.new_page(viewport={"width": 640, "height": 400}, offline=True)
        self.tab.set_default_timeout(PATIENCE)
        self.tab.on("pageerror", lambda error: self.problems.append(str(error)))
        self.tab.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.url = path.resolve().as_uri()
        self.tab.goto(self.url)

    @property
    def asked_for(self) -> list[str]:
        """Everything but the page itself and what is embedded in it."""
        return [url for url in self.requests if url != self.url and not url.startswith(("data:", "blob:"))]

    def pixels(self, selector: str) -> np.ndarray:
        picture = self.tab.locator(selector).first.screenshot(timeout=PATIENCE)
        return matplotlib.image.imread(io.BytesIO(picture))[..., :3]


def test_the_witness_can_see(browser, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<img src='https://example.org/a.png'><script>throw Error('broken')</script>")
    witness = Witness(browser, tmp_path / "bad.html")
    assert witness.asked_for == ["https://example.org/a.png"]
    assert any("broken" in problem for problem in witness.problems)
    witness.tab.close()


def test_a_page_of_dynamics(browser, dynamics_folder: Path, tmp_path: Path) -> None:
    witness = Witness(browser, report_page(dynamics_folder, tmp_path / "p.html", most=3))
    tab = witness.tab
    tab.wait_for_selector(".viewer[data-state=ready]")
    assert tab.locator(".viewer .status").text_content() == ""

    before = witness.pixels(".viewer canvas")
    drawn = before.min(axis=2) < 0.7  # not the white of the background
    assert 0.01 < drawn.mean() < 0.9
    blue = (
        before[..., 2] - before[..., 1]
    )  # σ has the colours of plasma, blue to yellow; that of copper, brown, has no blue
    assert (blue[drawn] > 0.2).mean() > 0.1
    slider = tab.locator(".viewer input[type=range]").first
    first = slider.input_value()
    slider.press("Home")
    tab.wait_for_timeout(500)
    assert slider.input_value() == "0" != first
    assert np.abs(witness.pixels(".viewer canvas") - before).max() > 0.2

    widths = tab.eval_on_selector_all("body > img", "pictures => pictures.map(p => p.naturalWidth)")
    assert len(widths) == 1
    assert widths[0] > 500
    assert tab.locator("body > .wide > table").count() == 3  # summary, events, last steps
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll on their own
    assert witness.problems == []
    assert witness.asked_for == []
    tab.close()
