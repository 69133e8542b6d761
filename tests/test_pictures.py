"""One picture is the same pixels in a data set, at the server and in a bundle's run.py."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from starlette.exceptions import HTTPException

from data_files import Pixels, some_pixels, write_parquet
from redefense.data import load_dataset
from redefense.data.source import decode, measure
from redefense.errors import DataError
from redefense.export import runner
from redefense.export.runner import BundleError
from redefense.serve.images import read_image

SHAPE = (3, 6, 10)


def saved(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    picture.save(buffer := io.BytesIO(), kind, **settings)
    return buffer.getvalue()


def as_bytes(images: runner.Floats) -> Pixels:
    levels: Pixels = np.rint(images[0] * 255).astype(np.uint8)
    return levels


def in_a_set(raw: bytes, shape: tuple[int, int, int]) -> Pixels:
    return decode(raw, "x", shape)


def at_the_server(raw: bytes, shape: tuple[int, int, int]) -> Pixels:
    return as_bytes(read_image(raw, shape, 10**6))


def in_run_py(raw: bytes, shape: tuple[int, int, int]) -> Pixels:
    Path("picture").write_bytes(raw)
    return as_bytes(runner.read_image(Path("picture"), shape))


READERS: tuple[Callable[[bytes, tuple[int, int, int]], Pixels], ...] = (
    in_a_set,
    at_the_server,
    in_run_py,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def everywhere(raw: bytes, shape: tuple[int, int, int] = SHAPE, *, served: bool = True) -> Pixels:
    """What all readers agree that a picture is; the server takes PNG and JPEG alone."""
    found = [read(raw, shape) for read in READERS if served or read is not at_the_server]
    assert all(np.array_equal(found[0], other) for other in found)
    return found[0]


def colour() -> Image.Image:
    return Image.fromarray(some_pixels(1, 6, 10, 3)[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_as_their_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    raw = saved(colour(), kind, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    shape = (3, shown.height, shown.width)
    assert measure(raw, "x") == shape
    found = everywhere(raw, shape, served=kind in ("JPEG", "PNG"))
    assert np.array_equal(found, np.asarray(shown.convert("RGB")).transpose(2, 0, 1))
    assert (shape == (3, 10, 6)) == (orientation >= 5)


DAMAGED_EXIF = b"Exif\0\0II*\0\xff\xff\xff\xff"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's, where nobody silences it
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", DAMAGED_EXIF, b"x"])
def test_exif_that_cannot_be_read_turns_nothing(exif: bytes) -> None:
    assert np.array_equal(
        everywhere(saved(colour(), "JPEG", exif=exif)), everywhere(saved(colour(), "JPEG"))
    )


def on_white(channels: Pixels, alpha: Pixels) -> Pixels:
    """The closed form: alpha * colour + (1 - alpha) * white, in the nearest of 256 levels."""
    a = alpha.astype(np.float64) / 255
    return np.rint(a * channels + (1 - a) * 255).astype(np.uint8)


def test_transparent_pixels_are_blended_with_white() -> None:
    pixels = some_pixels(1, 6, 10, 4)[0]
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    expected = on_white(pixels[..., :3], pixels[..., 3:]).transpose(2, 0, 1)
    for kind in ("PNG", "TIFF", "WEBP"):
        raw = saved(Image.fromarray(pixels), kind, lossless=True, exact=True)
        assert np.array_equal(everywhere(raw, served=kind == "PNG"), expected)
    assert (expected[:, 0] == 255).all()
    assert np.array_equal(expected[:, 1], pixels[1, :, :3].T)
    grey = on_white(pixels[..., 0], pixels[..., 3])
    raw = saved(Image.fromarray(pixels[..., [0, 3]], "LA"), "PNG")
    assert measure(raw, "x") == (1, 6, 10)
    assert np.array_equal(everywhere(raw, (1, 6, 10)), grey[None])
    assert np.array_equal(everywhere(raw), np.broadcast_to(grey, SHAPE))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_one_colour_that_stands_for_nothing_is_white(mode: str) -> None:
    picture = Image.new(mode, (10, 6), 0)
    for x in range(5):
        picture.putpixel((x, 0), (9, 9, 9) if mode == "RGB" else 1)
    if mode == "P":
        picture.putpalette([50, 60, 70, 9, 9, 9])
    raw = saved(picture, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    found = everywhere(raw)
    assert (found[:, 1:] == 255).all()
    assert (found[:, 0, 5:] == 255).all()
    drawn = {"1": 255, "L": 1}.get(mode, 9)
    assert (found[:, 0, :5] == drawn).all()


def test_a_palette_may_hold_alpha_and_turn_with_its_picture() -> None:
    picture = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(6, 10) % 3)
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    exif = Image.Exif()
    exif[274] = 3
    found = everywhere(saved(picture, "PNG", transparency=bytes([255, 128, 0]), exif=exif))
    levels = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)[np.asarray(picture)]
    alpha = np.array([255, 128, 0], np.uint8)[np.asarray(picture)][..., None]
    assert np.array_equal(found, on_white(levels, alpha)[::-1, ::-1].transpose(2, 0, 1))


def frames(kind: str) -> bytes:
    several = [Image.new("RGB", (10, 6), colour) for colour in ("red", "green", "blue")]
    return saved(several[0], kind, save_all=True, append_images=several[1:])


def sixteen_bits(channels: int) -> bytes:
    """A PNG of 16 bits a channel, written by hand: Pillow writes such ones in grey alone."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = (b"\0" + bytes(2 * channels * 10)) * 6
    header = struct.pack(">IIBBBBB", 10, 6, 16, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


DEEP = {
    **{f"png of {channels} channels": sixteen_bits(channels) for channels in (1, 2, 3, 4)},
    "ppm": b"P6 10 6 65535\n" + bytes(360),
    "plain ppm": b"P3 10 6 1000\n" + b"0 " * 180,
    "pgm": b"P5 10 6 65535\n" + bytes(120),
    "float": saved(Image.new("F", (10, 6)), "TIFF"),
    "whole": saved(Image.new("I", (10, 6)), "TIFF"),
}


@pytest.mark.parametrize(
    ("raw", "rule"),
    [(raw, "has more than 8 bits a channel") for raw in DEEP.values()]
    + [(frames(kind), "has 3 frames") for kind in ("GIF", "PNG", "WEBP", "TIFF")],
)
def test_what_is_not_one_image_of_8_bits_is_refused(raw: bytes, rule: str) -> None:
    for refused in (lambda: in_a_set(raw, SHAPE), lambda: measure(raw, "x")):
        with pytest.raises(DataError, match=f"x: {rule}"):
            refused()
    with pytest.raises(BundleError, match=f"picture {rule}"):
        in_run_py(raw, SHAPE)
    if raw.startswith(b"\x89PNG"):
        with pytest.raises(HTTPException, match=rule):
            at_the_server(raw, SHAPE)


def test_a_stereo_photograph_is_its_first_picture() -> None:
    first, second = colour(), Image.new("RGB", (10, 6), "red")
    raw = saved(first, "MPO", save_all=True, append_images=[second])
    shown = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(everywhere(raw, served=False), shown)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_without_transparency_are_converted_as_pillow_does(mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    raw = saved(colour().convert(mode), kind)
    shown = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(everywhere(raw), shown)


def test_folders_and_tables_hold_pictures_as_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    pixels = some_pixels(1, 6, 10, 4)[0]
    raw = saved(Image.fromarray(pixels), "PNG", exif=exif)
    expected = on_white(pixels[..., :3], pixels[..., 3:])[::-1, ::-1].transpose(2, 0, 1)
    other = saved(colour(), "JPEG", exif=DAMAGED_EXIF)
    for split in ("train", "test"):
        for label, content in (("cat", raw), ("dog", other)):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            (tmp_path / "set" / split / label / "0.png").write_bytes(content)
    rows = [(raw, 0), (other, 1)]
    write_parquet(tmp_path / "hub", rows, rows, ["cat", "dog"])
    for spec in (f"folder:{tmp_path / 'set'}", f"parquet:{tmp_path / 'hub'}"):
        found = load_dataset(spec, cache=tmp_path / "cache")
        assert np.array_equal(found.train.images[0].numpy(), expected)
