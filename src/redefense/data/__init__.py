"""Every source of images a user has: found by looking, checked, and held as bytes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from redefense.data import (
    cache as disk,
)
from redefense.data import (
    cifar,
    digits,
    folder,
    hub,
    npz,
    parquet,
    tiny_imagenet,
)
from redefense.data.dataset import Dataset, Split, test_indices, train_validation
from redefense.data.loader import Augment, Loader
from redefense.data.source import Refuse, Source, materialise, strict
from redefense.errors import DataError

__all__ = [
    "DATASETS", "Augment", "Dataset", "Loader", "Published", "Reader", "Split", "find",
    "load_dataset", "published", "test_indices", "train_validation",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What is known of a data set before it is read.

    Attributes:
        images: of its training split.
        num_classes: that its labels name.
        shape: of an image.
    """

    images: int
    num_classes: int
    shape: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """How one kind of data set is found.

    Attributes:
        summary: a line for the user.
        read: from a path, and what to do with faults, to what was found.
        place: the data need a path.
        origin: where to get them, if there is one place.
        published: its size, of data that are the same everywhere.
    """

    summary: str
    read: Callable[[Path, Refuse], Source]
    place: bool = True
    origin: str = ""
    published: Published | None = None


DATASETS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "digits": Reader(
            summary="1,797 8x8 digits, shipped with the package",
            read=digits.read,
            place=False,
            published=Published(images=1437, num_classes=10, shape=(1, 8, 8)),
        ),
        "cifar10": Reader(
            summary="CIFAR-10 as official batches, packed or not, or hub parquet: cifar10:PATH",
            read=cifar.read_cifar10,
            origin="add --download, or get cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz",
            published=Published(images=50_000, num_classes=10, shape=(3, 32, 32)),
        ),
        "cifar100": Reader(
            summary="CIFAR-100 with fine labels, in the same layouts: cifar100:PATH",
            read=cifar.read_cifar100,
            origin="add --download, or get cifar-100-python.tar.gz from www.cs.toronto.edu/~kriz",
            published=Published(images=50_000, num_classes=100, shape=(3, 32, 32)),
        ),
        "tiny-imagenet": Reader(
            summary="TinyImageNet as its zip or folder, or hub parquet: tiny-imagenet:PATH",
            read=tiny_imagenet.read,
            origin="get tiny-imagenet-200.zip from cs231n.stanford.edu",
            published=Published(images=100_000, num_classes=200, shape=(3, 64, 64)),
        ),
        "folder": Reader(
            summary="images as split/class/file, packed or not: folder:PATH", read=folder.read
        ),
        "parquet": Reader(
            summary="any image set in the layout of the Hugging Face hub: parquet:PATH",
            read=parquet.read,
        ),
        "npz": Reader(
            summary="arrays x_train y_train x_test y_test in one file: npz:FILE", read=npz.read
        ),
    }
)


def parse(spec: str) -> tuple[str, Path]:
    """Kind and path of a spec such as `digits` or `cifar10:PATH`.

    Raises:
        DataError: if the kind is unknown, or a path is missing or needless.
    """
    kind, _, place = spec.partition(":")
    if kind not in DATASETS:
        raise DataError(f"unknown data set {kind!r}; choose from {', '.join(DATASETS)}")
    if DATASETS[kind].place != bool(place):
        raise DataError(f"{kind} needs a path: {kind}:PATH" if not place else f"{kind} has no path")
    return kind, Path(place).expanduser()


def find(spec: str, refuse: Refuse = strict) -> Source:
    """What a spec names, before images are decoded.

    Raises:
        DataError: one line that names the file and the rule, unless `refuse` takes it.
    """
    kind, path = parse(spec)
    if not path.exists():
        origin = DATASETS[kind].origin
        raise DataError(f"{path}: no such file or folder" + f" ({origin})" * bool(origin))
    return DATASETS[kind].read(path, refuse)


def published(spec: str) -> Published | None:
    """What is known of the data set that a specification names; None of the user's own data."""
    reader = DATASETS.get(spec.partition(":")[0])
    return None if reader is None else reader.published


def load_dataset(
    spec: str, *, cache: Path | None = None, download: bool = False, progress: bool = False
) -> Dataset:
    """Load a data set; the second time from its decoded, memory-mapped copy.

    Args:
        spec: e.g. `digits`, `cifar10:PATH`, `folder:PATH`.
        cache: folder for decoded copies; `$REDEFENSE_CACHE` or the user's cache folder by default.
        download: fetch the set from the hub into PATH if nothing is there.
        progress: show on stderr how far decoding is.

    Raises:
        DataError: one line that names the file and the rule.
    """
    kind, path = parse(spec)
    if not DATASETS[kind].place:
        return materialise(find(spec), _silent)
    if download:
        hub.fetch(kind, path)
    at = disk.entry(cache or disk.default_folder(), kind, path)
    if (kept := disk.load(at)) is not None:
        return kept
    try:
        with disk.locked(at):
            if (kept := disk.load(at)) is not None:  # another process was faster
                return kept
            source = find(spec)
            with _ticking(source, progress=progress) as tick:
                return disk.store(at, source, tick)
    except OSError:  # a cache that cannot be written is no reason not to train
        source = find(spec)
        with _ticking(source, progress=progress) as tick:
            return materialise(source, tick)


def _silent(count: int) -> None:
    """Tell nobody."""


@contextlib.contextmanager
def _ticking(source: Source, *, progress: bool) -> Iterator[Callable[[int], None]]:
    """A function that moves a bar on stderr by the images decoded."""
    if not progress:
        yield _silent
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(
            f"decoding {source.name}", total=len(source.train.labels) + len(source.test.labels)
        )
        yield lambda count: bar.advance(task, count)
