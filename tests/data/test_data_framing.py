"""Pictures of several sizes become images of one size as the specification states."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_files import Pixels, png, refused, some_pixels, write_parquet
from redefense.data import load_dataset
from redefense.data.check import check_dataset
from redefense.data.framing import Framing
from redefense.data.source import decode

SIZES = [(12, 20), (30, 16), (16, 16), (40, 41)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDEFENSE_CACHE", str(tmp_path / "cache"))


def pictures() -> list[Pixels]:
    return [some_pixels(1, 3, *size)[0] for size in SIZES]


def folder(root: Path) -> Path:
    for split in ("train", "test"):
        for number, pixels in enumerate(pictures()):
            place = root / split / "ab"[number % 2] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(pixels))
    return root


@pytest.mark.parametrize("size", [(20, 30), (31, 20), (21, 20)])
def test_a_crop_is_the_middle_of_the_picture(size: tuple[int, int]) -> None:
    (pixels,) = some_pixels(1, 3, *size)
    found = decode(png(pixels), "x", (3, 8, 8), Framing(crop=8))
    top, left = (round((side - 8) / 2) for side in size)
    assert np.array_equal(found, pixels[:, top : top + 8, left : left + 8])


@pytest.mark.parametrize(("size", "expected"), [((12, 20), (6, 10)), ((31, 10), (18, 6))])
def test_the_shorter_side_is_resized_and_the_longer_in_proportion(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    height, width = size
    # a ramp along the longer side stays a ramp: the picture is stretched evenly, not cut
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    grey = np.broadcast_to(ramp if width > height else ramp[:, None], size)
    found = decode(png(np.ascontiguousarray(grey)), "x", (1, *expected), Framing(resize=6))
    centres = (np.arange(max(expected)) + 0.5) * max(size) / max(expected) - 0.5
    line = found[0].mean(0 if width > height else 1)
    inner = slice(1, -1)  # at the border there is no neighbour to average with
    assert np.abs(line - np.interp(centres, np.arange(max(size)), ramp))[inner].max() < 4


def test_a_square_picture_of_the_asked_size_is_unchanged() -> None:
    (pixels,) = some_pixels(1, 3, 16, 16)
    assert np.array_equal(
        decode(png(pixels), "x", (3, 16, 16), Framing(resize=16, crop=16)), pixels
    )


def test_folder_and_parquet_give_the_same_images_of_several_sizes(tmp_path: Path) -> None:
    options = "?resize=12&crop=10"
    root = folder(tmp_path / "set")
    rows = [(png(pixels), number % 2) for number, pixels in enumerate(pictures())]
    ordered = [rows[number] for number in (0, 2, 1, 3)]  # as the folder: class by class
    table = write_parquet(tmp_path / "table", ordered, ordered, ["a", "b"])
    one, other = (
        load_dataset(f"{kind}{options}") for kind in (f"folder:{root}", f"parquet:{table}")
    )
    assert one.shape == (3, 10, 10)
    assert one.checksum() == other.checksum()
    report = check_dataset(f"folder:{root}{options}")
    assert (report.problems, report.checksum) == ((), one.checksum())
    assert "shorter side resized to 12 pixels, central 10 x 10 pixels" in report.found
    # another framing is another set, and is not read from the first one's cache
    assert load_dataset(f"folder:{root}?resize=12&crop=9").shape == (3, 9, 9)


def test_what_cannot_be_framed_is_refused_by_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    refused(f"folder:{root}", r"images of one set must have one size.*\?resize=N&crop=N")
    refused(f"folder:{root}?resize=12", "images of one set must have one size")
    refused(f"folder:{root}?crop=16", "0.png: 20x12 is smaller than the crop of 16")
    for value in ("0", "-1", "8.5", "", "x", "5000", "9" * 40, "²"):
        refused(f"folder:{root}?crop={value}", "crop must be a whole number of pixels from 1 to")
    refused(f"folder:{root}?size=8", "the options are resize, crop, each once")
    Image.new("L", (1, 9000)).save(root / "train" / "a" / "long.png")
    refused(f"folder:{root}?resize=64&crop=10", "would be resized to 64x576000, more than")
