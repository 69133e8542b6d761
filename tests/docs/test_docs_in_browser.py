"""The built documentation in Chromium: it fits a phone, is dark on request, turns pages, finds."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import redefense
from browser import CONTRAST, opened
from redefense.runtime.files import locked

ROOT = Path(redefense.__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
    for page in (ROOT / "docs").rglob("*.md")
)
WIDTH = "document.documentElement.scrollWidth"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site() -> Path:
    """What `make docs` builds, built here only if a page or the package is newer."""
    folder = ROOT / "build" / "docs"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for top in ("docs", "src") for path in (ROOT / top).rglob("*.*")]
    sources = [path for path in sources if path.suffix != ".pyc"]
    with locked(folder.with_suffix(".lock"), wait=True):
        last = folder / "searchindex.js"  # the last file that is written
        if not last.exists() or any(
            path.stat().st_mtime > last.stat().st_mtime for path in sources
        ):
            words = ["-m", "sphinx", "-q", str(ROOT / "docs"), str(folder)]
            subprocess.run([sys.executable, *words], check=True)
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site on this machine's loopback: a browser lets no page from disk fetch another."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_next_leads_through_all_pages_and_none_scrolls_sideways(site: Path, browser: Any) -> None:
    met, wide = [(site / "index.html").as_uri()], {}
    with opened(browser, met[0], width=390) as page:
        while True:
            if (width := page.evaluate(WIDTH)) > 390:
                wide[page.url] = width
            following = page.locator("a.next-page")
            if not following.count():
                break
            met.append(following.evaluate("link => link.href"))
            following.click()
            page.wait_for_url(met[-1])
        assert wide == {}
        assert sorted(met) == sorted((site / name).as_uri() for name in PAGES)
        page.locator("a.prev-page").click()
        page.wait_for_url(met[-2])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_first_page_can_be_read(site: Path, browser: Any, width: int, dark: bool) -> None:
    with opened(browser, (site / "index.html").as_uri(), width=width, dark=dark) as page:
        assert page.evaluate(WIDTH) <= width
        assert page.evaluate(CONTRAST) == []
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(","))) < 3 * 128) is dark
        assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth)")
        cards = page.locator(".sd-card")
        links = [link.get_attribute("href") or "" for link in cards.locator("a").all()]
        assert len(links) == 6
        assert {link.partition("#")[0] for link in links} <= set(PAGES)
        cards.first.click()
        page.wait_for_url("**/quickstart.html")


def test_a_search_finds_the_page_of_a_word(address: str, browser: Any) -> None:
    with opened(browser, f"{address}/index.html") as page:
        page.locator("input[name=q]").first.fill("unlock")
        page.keyboard.press("Enter")
        page.locator("#search-results li a").first.wait_for()
        links = page.locator("#search-results li a").all()
        assert any((link.get_attribute("href") or "").startswith("study.html") for link in links)
        page.wait_for_load_state("networkidle")  # the lines that show the word
