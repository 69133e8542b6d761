"""Images and labels that a reader found, and the decoding of images."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from redefense.data.dataset import Dataset, Split
from redefense.data.framing import WHOLE, Framing
from redefense.errors import DataError, one_line
from redefense.pictures import PictureError, as_shown

Block = NDArray[np.uint8]
"""Some images of one split, (n, ch, H, W), in order."""

Shape = tuple[int, int, int]
"""Channels, height and width."""

Refuse = Callable[[str], None]
"""Handler of faults: `strict` raises; a check records them and continues."""

Items = Callable[[], Iterator[tuple[str, bytes]]]
"""Iterates over pairs (name, encoded image) once, in order."""

T = TypeVar("T")

BLOCK = 1024  # images decoded at a time, and
BLOCK_BYTES = 2**28  # at most so many bytes, where the images are large
MAX_PIXELS = 2**24  # limit of one image: 16 megapixels
SAMPLED = 64  # images read to find the common shape
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF", "GIF")
"""Only these formats are tried: others may call external programs."""
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One split: the labels, and an iterator over the images, once, in order.

    Attributes:
        labels: (N,) class of each image.
        blocks: the decoded images.
        items: the encoded images, if each has a file.
        framing: how these are resized and cropped.
    """

    labels: NDArray[np.int64]
    blocks: Callable[[], Iterator[Block]]
    items: Items | None = None
    framing: Framing = WHOLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set before decoding, and the files it depends on."""

    name: str
    classes: tuple[str, ...]
    shape: Shape
    train: Part
    test: Part
    found: str
    files: tuple[Path, ...] = ()


def strict(message: str) -> NoReturn:
    """Refuse the whole set.

    Raises:
        DataError: always.
    """
    raise DataError(message)


def printable(text: str) -> str:
    """Untrusted text, such as file names, without control characters for terminals."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def encoded(
    labels: Sequence[int] | NDArray[np.int64], items: Items, shape: Shape, framing: Framing = WHOLE
) -> Part:
    """A split with one encoded file for each image."""
    return Part(
        labels=np.asarray(labels, np.int64), blocks=lambda: decoded(items(), shape, framing),
        items=items, framing=framing,
    )  # fmt: skip


def decode(raw: bytes, name: str, shape: Shape, framing: Framing = WHOLE) -> Block:
    """One encoded image as bytes (ch, H, W); grey becomes RGB if `shape` has three channels.

    Raises:
        DataError: naming the image, if it is damaged, too large or of another kind than `shape`.
    """
    channels, height, width = shape
    image = framing.apply(_shown(raw, name), name)
    if image.size != (width, height):
        raise DataError(
            f"{name}: is {image.size[0]}x{image.size[1]}, the others {width}x{height}; "
            "images of one set must have one size; for a folder or parquet add ?resize=N&crop=N "
            "to the specification"
        )
    if channels == 1 and image.mode != "L":
        raise DataError(f"{name}: a colour image among grey ones; save it as grey, or all as RGB")
    pixels = np.asarray(image if len(image.getbands()) == channels else image.convert("RGB"))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def measure(raw: bytes, name: str, framing: Framing = WHOLE) -> Shape:
    """Channels, height and width of one encoded image, framed.

    Raises:
        DataError: naming the image, if it is damaged, too large or not 8 bits deep.
    """
    image = framing.apply(_shown(raw, name), name)
    return len(image.getbands()), image.size[1], image.size[0]


def _shown(raw: bytes, name: str) -> Image.Image:
    """One encoded image with its EXIF orientation applied, grey (L) or RGB."""
    if not raw:
        raise DataError(f"{name}: empty file")
    try:
        image = Image.open(BytesIO(raw), formats=FORMATS)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name}: not an image of a known format") from error
    except BOMBS as error:
        raise DataError(f"{name}: decompression bomb, refused ({one_line(error)})") from error
    width, height = image.size
    # `open` has read the header only: nothing is decoded yet
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: decompression bomb, refused: {width}x{height} pixels, at most {MAX_PIXELS}"
        )
    try:
        shown: Image.Image = as_shown(image)
    except PictureError as error:
        raise DataError(f"{name}: {error}") from error
    except Exception as error:  # decoders raise many types on damaged files
        raise DataError(f"{name}: damaged image ({one_line(error)})") from error
    return shown


def common_shape(
    items: Iterable[tuple[str, bytes]], refuse: Refuse, what: str, framing: Framing = WHOLE
) -> Shape:
    """The most common shape of some images; three channels if any of them is in colour.

    Raises:
        DataError: if none is readable.
    """
    shapes: list[Shape] = []
    with _decoding():
        for name, raw in items:
            try:
                shapes.append(measure(raw, name, framing))
            except DataError as error:
                refuse(str(error))
    if not shapes:
        raise DataError(f"{what}: no readable image")
    sizes = [shape[1:] for shape in shapes]
    # the most common size: one odd image is then reported as the fault, not all the others
    height, width = max(sizes, key=sizes.count)
    return max(channels for channels, *_ in shapes), height, width


def spread(names: Sequence[T]) -> list[T]:
    """At most 64 of some names, evenly spaced."""
    places = np.linspace(0, len(names) - 1, min(len(names), SAMPLED)).round().astype(int)
    return [names[place] for place in places]


def decoded(
    items: Iterable[tuple[str, bytes]], shape: Shape, framing: Framing = WHOLE
) -> Iterator[Block]:
    """Blocks of decoded images from pairs (name, encoded bytes), by threads on all cores."""
    for some in by_threads(items, lambda name, raw: decode(raw, name, shape, framing), shape):
        yield np.stack(some)


@contextmanager
def _decoding() -> Iterator[None]:
    """Pillow's warnings: a bomb is an error; damaged EXIF data are read as far as possible."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def by_threads(
    items: Iterable[tuple[str, bytes]], work: Callable[[str, bytes], T], shape: Shape
) -> Iterator[list[T]]:
    """Results of `work` on each pair, in order, in blocks, by threads on all cores."""
    cores = os.cpu_count() or 1
    size = max(1, min(BLOCK, BLOCK_BYTES // math.prod(shape)))
    with _decoding(), ThreadPoolExecutor(cores) as pool:
        for some in batched(items, size):
            # one task for several images: a task costs as much as decoding a small image
            runs = batched(some, max(1, len(some) // (4 * cores)))
            done = pool.map(lambda run: [work(name, raw) for name, raw in run], runs)
            yield [result for run in done for result in run]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def all_blocks(part: Part, what: str, tick: Callable[[int], None]) -> Iterator[Block]:
    """The decoded images of a part, block by block; `tick` is called for each.

    Raises:
        DataError: if there are more or fewer images than labels.
    """
    done = 0
    for block in part.blocks():
        done += len(block)
        # of further blocks only the number is read, for the message
        if done <= len(part.labels):
            yield block
        tick(len(block))
    if done != len(part.labels):
        raise DataError(f"{what}: {done} images for {len(part.labels)} labels")


def materialise(source: Source, tick: Callable[[int], None]) -> Dataset:
    """Decode everything into memory."""

    def split(part: Part, what: str) -> Split:
        images = np.concatenate(list(all_blocks(part, f"{source.name} {what}", tick)))
        return Split(torch.from_numpy(images), torch.from_numpy(part.labels))

    return Dataset(
        name=source.name,
        classes=source.classes,
        train=split(source.train, "train"),
        test=split(source.test, "test"),
        found=source.found,
    )
