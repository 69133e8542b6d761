"""The report in Chromium: it loads nothing, fits a phone, sorts, prints, and can be read aloud."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_page_parts import with_examples

from browser import CONTRAST, opened
from report_tools import full_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over two runs, with examples."""
    folder = tmp_path_factory.mktemp("report")
    full_report(folder)
    with_examples(folder / "digits-extra")
    from redefense.report.page import write_report

    return write_report([folder], folder / "report.html")[0]


@pytest.fixture
def page(page_file: Path, browser: Any) -> Iterator[Any]:
    with opened(browser, page_file.as_uri()) as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_can_be_read(
    page_file: Path, browser: Any, width: int, dark: bool
) -> None:
    with opened(browser, page_file.as_uri(), width=width, dark=dark) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CONTRAST) == []
        summary = page.locator(".verdict").bounding_box() or {"y": 0, "height": 1e9}
        assert summary["y"] + summary["height"] < 900  # the verdict is on the first screen


def test_a_heading_sorts_by_keyboard(page: Any) -> None:
    table = page.locator("h2#every-attack + div table")
    head = table.locator("th[aria-sort]").nth(3)
    head.locator("button").focus()
    orders = []
    for order in ("descending", "ascending"):
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == order
        cells = table.locator("tbody tr td:nth-child(4)")
        orders.append([float(c.get_attribute("data-value")) for c in cells.all()])
    assert orders[0] == sorted(orders[0], reverse=True)
    assert orders[1] == sorted(orders[1])


def test_the_first_tab_skips_to_the_content(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#main"
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1


def test_what_is_read_aloud_has_names(page: Any) -> None:
    nameless = page.evaluate(
        """() => [
          ...[...document.querySelectorAll("img")].filter((n) => !n.alt),
          ...[...document.querySelectorAll("svg:not([aria-hidden])")].filter((n) => !n.ariaLabel),
          ...[...document.querySelectorAll("table")].filter((n) => !n.caption),
          ...[...document.querySelectorAll("table")].filter((n) => !n.querySelector("th[scope]")),
        ].map((n) => n.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    levels = [int(h.evaluate("n => n.tagName[1]")) for h in page.locator("h1, h2, h3").all()]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_images_of_the_examples_are_drawn(page: Any) -> None:
    images = page.locator(".examples img")
    assert images.count() == 6
    assert page.evaluate(
        "[...document.querySelectorAll('.examples img')].every((i) => i.complete && i.naturalWidth)"
    )


def test_printing_opens_what_is_folded(page: Any) -> None:
    assert page.evaluate("[...document.querySelectorAll('details')].some((d) => !d.open)")
    assert page.pdf().startswith(b"%PDF")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every((d) => d.open)")
