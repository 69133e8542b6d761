"""The server in Chromium: drop a picture, see the answer; research mode shows the members."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import opened
from redefense.serve.model import Model
from redefense.serve.settings import Settings
from serve_tools import make_bundle, pictures, serving

pytestmark = pytest.mark.browser

DROP = """
([content, type, name]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const how = { dataTransfer: data, bubbles: true, cancelable: true };
  document.dispatchEvent(new DragEvent("drop", how));
}
"""
"""Drops a file on the page, as a hand would."""


def picture(label: int) -> bytes:
    """A PNG whose bright pixel has the number `label`."""
    pixels = (pictures(np.array([label]))[0, 0] * 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def drop(page: Any, content: bytes, kind: str = "image/png", name: str = "two.png") -> None:
    page.wait_for_function("document.title !== 'redefense'")  # it knows whom to ask
    page.evaluate(DROP, [base64.b64encode(content).decode(), kind, name])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Members 0, 1 and 2 answer picture k with class k, k + 1 and k + 2."""
    return Model(make_bundle(tmp_path_factory.mktemp("bundle") / "served"))


def test_a_dropped_picture_is_answered_and_no_member_is_shown(model: Model, browser: Any) -> None:
    with serving(model, Settings()) as url, opened(browser, url, width=390) as page:
        drop(page, picture(2))
        page.locator("#answer").wait_for()
        assert page.locator("#label").text_content() in {"class 2", "class 3", "class 4"}
        assert page.locator("#preview").get_attribute("alt") == "two.png"
        assert not page.locator("#members").is_visible()
        assert "kept secret" in page.locator("#promise").inner_text()
        for asked in (2, 3):
            page.locator("#again").click()
            page.get_by_text(f"Asked {asked} times").wait_for()
        # what the browser was sent says nothing of members either
        assert "member" not in page.locator("#result").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_file_is_chosen_by_keyboard_and_what_is_no_picture_is_refused(
    model: Model, browser: Any, tmp_path: Path
) -> None:
    (tmp_path / "five.png").write_bytes(picture(5))
    with serving(model, Settings()) as url, opened(browser, url) as page:
        drop(page, b"no picture", "text/plain", "notes.txt")
        page.get_by_role("alert").wait_for()
        assert "notes.txt is not a PNG or JPEG" in page.get_by_role("alert").inner_text()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        page.locator("#file").set_input_files(str(tmp_path / "five.png"))
        page.locator("#answer").wait_for()
        assert page.locator("#label").text_content() in {"class 5", "class 6", "class 7"}
        assert not page.get_by_role("alert").is_visible()


def test_research_mode_shows_what_every_member_says(model: Model, browser: Any) -> None:
    settings = Settings(research=True, seed=0)
    with serving(model, settings) as url, opened(browser, url) as page:
        drop(page, picture(2))
        page.locator("#members").wait_for()
        rows = page.locator("#rows tr")
        assert [rows.nth(m).locator("td").nth(1).text_content() for m in range(3)] == [
            "class 2", "class 3", "class 4",
        ]  # fmt: skip
        (answered,) = page.locator("#rows tr.drawn").all()
        assert answered.locator("td").nth(1).text_content() == (
            page.locator("#label").text_content()
        )
        assert "Research mode" in page.locator("#promise").inner_text()
