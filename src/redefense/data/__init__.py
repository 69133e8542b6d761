"""Data sets from any source: recognised by their content, checked, and held as bytes."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from redefense.data import cache as disk
from redefense.data import cifar, digits, folder, given, hub, npz, parquet, tiny_imagenet
from redefense.data.dataset import Dataset, Split, test_indices, train_validation
from redefense.data.loader import Augment, Loader
from redefense.data.source import Refuse, Source, materialise, strict
from redefense.errors import ConfigError, DataError, suggestion
from redefense.plugins import Registry, summary_of
from redefense.runtime.files import locked

__all__ = [
    "DATASETS", "Augment", "Dataset", "Loader", "Published", "Reader", "Split", "find",
    "load_dataset", "published", "test_indices", "train_validation",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Properties of a data set that are known before it is read.

    Attributes:
        images: number of training images.
        num_classes: number of classes.
        shape: shape of an image.
    """

    images: int
    num_classes: int
    shape: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """How one kind of data set is read.

    Attributes:
        summary: one-line description.
        read: maps a path, a handler of faults and options to a `Source`.
        place: whether a path is needed.
        options: names of options that may follow the path.
        origin: where to download the data, if known.
        published: sizes, for standard data sets.
        cached: whether decoded copies are cached.
    """

    summary: str
    read: Callable[..., Source]
    place: bool = True
    options: tuple[str, ...] = ()
    origin: str = ""
    published: Published | None = None
    cached: bool = True


def _reader(name: str, value: Any) -> Reader:
    """How a user's data set is read: a function, see `given.as_source`."""
    if isinstance(value, Reader):
        return value
    if not callable(value):
        raise ConfigError(
            f"the data set {name} must be a function that returns it, got a {type(value).__name__}"
        )
    return Reader(
        summary=summary_of(value),
        read=given.reader(name, value),
        place=given.needs_path(value),
        cached=False,  # a change of the function cannot be detected
    )


DATASETS: Final[Registry[Reader]] = Registry(
    "datasets",
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
            summary="images as split/class/file, packed or not: folder:PATH, or of several sizes "
            "folder:PATH?resize=256&crop=224",
            read=folder.read,
            options=("resize", "crop"),
        ),
        "parquet": Reader(
            summary="any image set in the layout of the Hugging Face hub: parquet:PATH, "
            "or parquet:PATH?config=NAME&label=COLUMN&image=COLUMN&resize=N&crop=N",
            read=parquet.read,
            options=("config", "label", "image", "resize", "crop"),
        ),
        "npz": Reader(
            summary="arrays x_train y_train x_test y_test in one file: npz:FILE", read=npz.read
        ),
    },
    _reader,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A parsed data specification."""

    kind: str
    path: Path
    options: Mapping[str, str]

    def copy_in(self, folder: Path) -> Path:
        """Path of the decoded copy in the cache."""
        # no path contains \0, so that options cannot be mistaken for a part of it
        options = "\0" + urlencode(sorted(self.options.items())) if self.options else ""
        return disk.entry(folder, self.kind, self.path, options)

    def check_place(self) -> None:
        """Check that the path exists.

        Raises:
            DataError: with the place to download the data, if known.
        """
        try:
            there = self.path.exists()
        except OSError as error:  # no permission, or the name is too long
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        if not there:
            origin = DATASETS[self.kind].origin
            raise DataError(f"{self.path}: no such file or folder" + f" ({origin})" * bool(origin))


def parse(spec: str) -> Spec:
    """A specification such as `digits`, `cifar10:PATH` or `parquet:PATH?label=COLUMN`.

    Raises:
        DataError: if the kind or an option is unknown, or a path is missing or needless.
    """
    kind, _, place = spec.partition(":")
    if kind not in DATASETS:
        hint = _as_a_path(spec) or suggestion(kind, list(DATASETS))
        raise DataError(f"unknown data set {kind!r}{hint}; choose from {', '.join(DATASETS)}")
    if DATASETS[kind].place != bool(place):
        raise DataError(f"{kind} needs a path: {kind}:PATH" if not place else f"{kind} has no path")
    known, options = DATASETS[kind].options, {}
    before, mark, after = place.rpartition("?")
    # a question mark may be part of the name of an existing file
    if known and mark and not os.path.exists(os.path.expanduser(place)):
        try:
            pairs = parse_qsl(after, keep_blank_values=True, strict_parsing=True)
        except ValueError:
            raise DataError(f"{spec}: options are written ?NAME=VALUE&NAME=VALUE") from None
        place, options = before, dict(pairs)
        if len(options) < len(pairs) or not options.keys() <= set(known):
            raise DataError(f"{spec}: the options are {', '.join(known)}, each once")
    return Spec(kind=kind, path=Path(os.path.expanduser(place)), options=options)


def _as_a_path(spec: str) -> str:
    """The specification of a path that lacks its kind, for an error; empty if it is no path."""
    if ":" in spec:
        return ""
    path = Path(os.path.expanduser(spec))
    kind = path.suffix.removeprefix(".")
    if kind not in ("npz", "parquet"):
        # archives and folders as published, such as `cifar-10-python.tar.gz`
        name = path.name.lower().replace("-", "")
        kinds = [k for k in DATASETS if DATASETS[k].origin and name.startswith(k.replace("-", ""))]
        # the longest: a name of CIFAR-100 begins with that of CIFAR-10
        kind = max(kinds, key=len, default="folder")
    named = len(path.parts) > 1 or path.suffix or spec in (".", "..")
    # names of files may be longer than the system allows
    return f" (of a path, write {kind}:{spec})" if named or os.path.exists(path) else ""


def find(spec: str, refuse: Refuse = strict) -> Source:
    """The source that a specification names, before images are decoded.

    Raises:
        DataError: naming the file and the rule, unless `refuse` handles it.
    """
    parsed = parse(spec)
    parsed.check_place()
    return DATASETS[parsed.kind].read(parsed.path, refuse, **parsed.options)


def published(spec: str) -> Published | None:
    """Known properties of the data set of a specification; None for users' data."""
    reader = DATASETS.get(spec.partition(":")[0])
    return None if reader is None else reader.published


def load_dataset(
    spec: str, *, cache: Path | None = None, download: bool = False, progress: bool = False
) -> Dataset:
    """Load a data set, from its decoded, memory-mapped copy if there is one.

    Args:
        spec: e.g. `digits`, `cifar10:PATH`, `folder:PATH`, `parquet:PATH?label=COLUMN`.
        cache: folder for decoded copies; `$REDEFENSE_CACHE` or the user's cache folder by default.
        download: download the set from the hub into PATH if it is missing.
        progress: show a progress bar on stderr.

    Raises:
        DataError: one line that names the file and the rule.
    """
    parsed = parse(spec)
    if not (DATASETS[parsed.kind].place and DATASETS[parsed.kind].cached):
        return materialise(find(spec), _silent)
    if download:
        hub.fetch(parsed.kind, parsed.path)
    parsed.check_place()
    at = parsed.copy_in(cache or disk.default_folder())
    if (kept := disk.load(at)) is not None:
        return kept
    try:
        # one process decodes, the others wait and map its copy
        with locked(at / "lock", wait=True):
            if (kept := disk.load(at)) is not None:  # another process was faster
                return kept
            source = find(spec)
            with _ticking(source, progress=progress) as tick:
                return disk.store(at, source, tick)
    except OSError:  # training does not need a writable cache
        source = find(spec)
        with _ticking(source, progress=progress) as tick:
            return materialise(source, tick)


def _silent(count: int) -> None:
    """Report no progress."""


@contextlib.contextmanager
def _ticking(source: Source, *, progress: bool) -> Iterator[Callable[[int], None]]:
    """A function that advances a progress bar on stderr by decoded images."""
    if not progress:
        yield _silent
        return
    from redefense.runtime.progress import Counter, note

    total = len(source.train.labels) + len(source.test.labels)
    counter = Counter(f"decoding {source.name}", total, unit="images", log=note)
    with contextlib.closing(counter):
        yield counter.advance


def __getattr__(name: str) -> Any:
    # imported on first use, since it builds on this package
    if name == "check":
        return import_module("redefense.data.check")
    raise AttributeError(f"module 'redefense.data' has no attribute {name!r}")
