"""What a reader finds before any image is decoded, and how it becomes a data set."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from redefense.data.dataset import Dataset, Split
from redefense.errors import DataError

Block = NDArray[np.uint8]
"""Some images of one split, (n, ch, H, W), in order."""

T = TypeVar("T")

BLOCK = 1024  # images decoded between two looks at the clock
MAX_PIXELS = 2**24  # of one image; a photograph of 16 megapixels is no input for a classifier


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One split as found: the labels, and a way to go through the images once, in order."""

    labels: NDArray[np.int64]
    blocks: Callable[[], Iterator[Block]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A data set as found: everything but the images, and the files it depends on."""

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Part
    test: Part
    found: str
    files: tuple[Path, ...] = ()


def decode(raw: bytes, name: str, shape: tuple[int, int, int]) -> Block:
    """One encoded image as bytes (ch, H, W); grey becomes RGB where three channels are asked for.

    Raises:
        DataError: naming the image, if it is damaged, too large or of another size than `shape`.
    """
    channels, height, width = shape
    try:
        with Image.open(BytesIO(raw)) as image:
            if image.size != (width, height):
                raise DataError(
                    f"{name}: is {image.size[0]}x{image.size[1]}, the others {width}x{height}; "
                    "images of one set must have one size"
                )
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, *BOMBS) as error:
        raise DataError(f"{name}: not a readable image ({_reason(error)})") from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def _reason(error: Exception) -> str:
    if isinstance(error, BOMBS):
        return "decompression bomb"
    return "unknown format" if "cannot identify" in str(error) else str(error)


def measure(raw: bytes, name: str) -> tuple[int, int, int]:
    """Channels, height and width of one encoded image, from its header.

    Raises:
        DataError: naming the image, if it is damaged or larger than 2**24 pixels.
    """
    try:
        with Image.open(BytesIO(raw)) as image:
            width, height = image.size
            grey = image.mode in ("1", "L", "I", "F", "I;16", "LA")
    except (OSError, ValueError, SyntaxError, *BOMBS) as error:
        raise DataError(f"{name}: not a readable image ({_reason(error)})") from error
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width}x{height} is more than {MAX_PIXELS} pixels, refused")
    return 1 if grey else 3, height, width


def decoded(
    items: Iterable[tuple[str, bytes]], shape: tuple[int, int, int], block: int = BLOCK
) -> Iterator[Block]:
    """Blocks of decoded images from pairs (name, encoded bytes), by threads on all cores."""
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for some in batched(items, block):
            # a task per run of images: one per image costs as much as decoding a small one
            runs = batched(some, max(1, len(some) // (4 * (os.cpu_count() or 1))))
            yield np.concatenate(list(pool.map(lambda run: _decode_run(run, shape), runs)))


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def _decode_run(run: Sequence[tuple[str, bytes]], shape: tuple[int, int, int]) -> Block:
    return np.stack([decode(raw, name, shape) for name, raw in run])


def fill(target: Block, part: Part, what: str, tick: Callable[[int], None]) -> None:
    """Write all images of a part into `target` (N, ch, H, W); `tick` hears of each block.

    Raises:
        DataError: if there are more or fewer images than labels.
    """
    done = 0
    for block in part.blocks():
        if done + len(block) <= len(target):
            target[done : done + len(block)] = block
        done += len(block)
        tick(len(block))
    if done != len(target):
        raise DataError(f"{what}: {done} images for {len(target)} labels")


def materialise(source: Source, tick: Callable[[int], None] = lambda count: None) -> Dataset:
    """Decode everything into memory."""

    def split(part: Part, what: str) -> Split:
        images = np.empty((len(part.labels), *source.shape), np.uint8)
        fill(images, part, f"{source.name} {what}", tick)
        return Split(torch.from_numpy(images), torch.from_numpy(part.labels))

    return Dataset(
        name=source.name,
        classes=source.classes,
        train=split(source.train, "train"),
        test=split(source.test, "test"),
        found=source.found,
    )
