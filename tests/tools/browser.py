"""Chromium for tests of pages: found by its usual names, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

CONTRAST: Final = """
() => {
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const channel = (v) => linear(v / 255);
  const parse = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const kinds = "p, li, th, td, dt, dd, a, small, summary, h1, h2, h3, figcaption, caption";
  for (const node of document.querySelectorAll(kinds)) {
    if (!node.checkVisibility() || !node.textContent.trim()) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const excerpt = node.textContent.trim().slice(0, 40);
    if (ratio < 4.5) low.push(`${node.tagName} ${ratio.toFixed(2)} ${excerpt}`);
  }
  return low;
}
"""
"""Texts whose contrast with what is behind them is below 4.5 to 1 (WCAG 2.1, level AA)."""


def chromium() -> str | None:
    """Where Chromium is; None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator["Browser"]:
    """A headless Chromium, for the fixture `browser`: one in a process of tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: "Browser", url: str, *, width: int = 1280, height: int = 900, dark: bool = False
) -> Iterator["Page"]:
    """A page of its own; an error of its script, or a refused request, fails the test.

    Args:
        browser: the fixture.
        url: e.g. `path.as_uri()`.
        width: of the window, in pixels.
        height: of the window, in pixels.
        dark: whether the reader prefers dark pages.
    """
    wrong: list[str] = []
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page.set_default_timeout(60_000)  # a busy machine
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.goto(url)
    yield page
    page.close()
    assert wrong == []
