"""Chromium for tests of pages: found by its usual names, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


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
