"""CIFAR-10 and CIFAR-100 in every published layout, recognised by their files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.data import parquet, pickles
from redefense.data.labels import check_classes, check_labels
from redefense.data.source import Block, Part, Refuse, Source
from redefense.data.tree import Tree, open_tree
from redefense.errors import DataError

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32

Images = tuple[Block, NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Files of one official form.

    Attributes:
        form: its name.
        train: names of the training files.
        test: name of the test file.
        names: name of the file of class names.
        read: maps the bytes of a file and its name to its images and labels.
        classes: maps the bytes of `names` and its name to the class names.
    """

    form: str
    train: tuple[str, ...]
    test: str
    names: str
    read: Callable[[bytes, str], Images]
    classes: Callable[[bytes, str], tuple[str, ...]]


def read_cifar10(path: Path, refuse: Refuse) -> Source:
    """CIFAR-10 from a folder or file."""
    return _read(path, refuse, "cifar10", CIFAR10, 10)


def read_cifar100(path: Path, refuse: Refuse) -> Source:
    """CIFAR-100 with its fine labels, from a folder or file."""
    return _read(path, refuse, "cifar100", CIFAR100, 100)


def _read(
    path: Path, refuse: Refuse, name: str, layouts: Sequence[Layout], num_classes: int
) -> Source:
    source = _from_batches(path, refuse, name, layouts)
    # the hub's layout, only where there are no official batches
    if source is None and path.is_dir() and next(path.rglob("*.parquet"), None):
        source = parquet.read(path, refuse, name)
    if source is None:
        raise DataError(
            f"{path}: contains no {name}: expected its batches "
            f"({', '.join(a.train[0] for a in layouts)} ...), their tar archive or *.parquet"
        )
    if source.shape != SHAPE or len(source.classes) != num_classes:
        raise DataError(
            f"{path}: not {name}: found {len(source.classes)} classes of images "
            f"{'x'.join(map(str, source.shape))}, expected {num_classes} of 3x32x32"
        )
    return replace(source, found=f"{name}, {source.found}")


def _from_batches(
    path: Path, refuse: Refuse, name: str, layouts: Sequence[Layout]
) -> Source | None:
    """Official batches in a folder, in an archive, or in an archive in a folder."""
    places = [path]
    if path.is_dir():
        places += sorted(path.glob(f"{name.replace('cifar', 'cifar-')}-*.tar*"))
    for place in places:
        tree = open_tree(place, refuse)
        present = set(tree.names)
        for layout in layouts:
            # a folder matches if it holds any of the files, so that a missing one is reported
            holders = [
                file.removesuffix(layout.names)
                for file in tree.names
                if PurePosixPath(file).name == layout.names
                and present & {_sibling(file, batch) for batch in (*layout.train, layout.test)}
            ]
            if holders:
                return _from_tree(tree, holders[0], layout, name, refuse)
    return None


def _sibling(file: str, name: str) -> str:
    return str(PurePosixPath(file).with_name(name))


def _from_tree(tree: Tree, prefix: str, layout: Layout, name: str, refuse: Refuse) -> Source:
    wanted = [prefix + file for file in (*layout.train, layout.test, layout.names)]
    for file in wanted:
        if file not in tree.names:
            raise DataError(f"{tree.root}: {file} is missing")
    *batches, names = tree.items(wanted)
    classes = layout.classes(names[1], names[0])
    parts = [layout.read(raw, where) for where, raw in batches]
    train = _joined(parts[:-1])
    check_classes(classes, names[0], refuse)
    check_labels(train.labels, classes, f"{tree.root} train", refuse, full=True)
    check_labels(parts[-1][1], classes, f"{tree.root} test", refuse, full=False)
    return Source(
        name=name,
        classes=classes,
        shape=SHAPE,
        train=train,
        test=_joined(parts[-1:]),
        found=f"{layout.form} in {tree.kind} {tree.root}",
        files=tree.files(wanted),
    )


def _joined(parts: Sequence[Images]) -> Part:
    return Part(
        labels=np.concatenate([labels for _, labels in parts]),
        blocks=lambda: iter([images for images, _ in parts]),
    )


def _python_batch(label: str) -> Callable[[bytes, str], Images]:
    def read(raw: bytes, where: str) -> Images:
        found = pickles.load(raw, where)
        data, labels = found.get("data"), found.get(label)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != PIXELS:
            raise DataError(f"{where}: no array `data` of rows of {PIXELS} bytes")
        if not isinstance(labels, list) or not all(isinstance(y, int) for y in labels):
            raise DataError(f"{where}: no list of numbers `{label}`")
        if len(labels) != len(data):
            raise DataError(f"{where}: {len(data)} images for {len(labels)} labels")
        return data.reshape(-1, *SHAPE), np.array(labels, np.int64)

    return read


def _binary_batch(labels: int) -> Callable[[bytes, str], Images]:
    """Records of some label bytes, the last of which counts, and the pixels."""

    def read(raw: bytes, where: str) -> Images:
        if not raw or len(raw) % (labels + PIXELS):
            raise DataError(f"{where}: {len(raw)} bytes are not records of {labels + PIXELS}")
        rows = np.frombuffer(raw, np.uint8).reshape(-1, labels + PIXELS)
        return rows[:, labels:].reshape(-1, *SHAPE), rows[:, labels - 1].astype(np.int64)

    return read


def _python_names(key: str) -> Callable[[bytes, str], tuple[str, ...]]:
    def read(raw: bytes, where: str) -> tuple[str, ...]:
        names: Any = pickles.load(raw, where).get(key)
        if not isinstance(names, list) or not all(isinstance(n, bytes | str) for n in names):
            raise DataError(f"{where}: no list of names `{key}`")
        return tuple(n.decode(errors="replace") if isinstance(n, bytes) else n for n in names)

    return read


def _text_names(raw: bytes, where: str) -> tuple[str, ...]:
    try:
        return tuple(raw.decode().split())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not a text file of names") from error


CIFAR10 = (
    Layout(
        form="python batches",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        names="batches.meta",
        read=_python_batch("labels"),
        classes=_python_names("label_names"),
    ),
    Layout(
        form="binary batches",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test="test_batch.bin",
        names="batches.meta.txt",
        read=_binary_batch(1),
        classes=_text_names,
    ),
)
CIFAR100 = (
    Layout(
        form="python batches",
        train=("train",),
        test="test",
        names="meta",
        read=_python_batch("fine_labels"),
        classes=_python_names("fine_label_names"),
    ),
    Layout(
        form="binary batches",
        train=("train.bin",),
        test="test.bin",
        names="fine_label_names.txt",
        # a coarse label precedes the fine one
        read=_binary_batch(2),
        classes=_text_names,
    ),
)
