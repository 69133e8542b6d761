"""TinyImageNet as its official zip, read in place, or extracted, or with validation re-foldered."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from redefense.data import parquet
from redefense.data.labels import check_labels
from redefense.data.source import Part, Refuse, Source, encoded
from redefense.data.tree import Tree, open_tree, read_one
from redefense.errors import DataError

SHAPE = (3, 64, 64)
ENDINGS = (".jpeg", ".jpg", ".png")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """Image files of one split with their labels."""

    names: Sequence[str]
    labels: Sequence[int]

    def part(self, tree: Tree) -> Part:
        return encoded(self.labels, lambda: tree.items(self.names), SHAPE)


def read(path: Path, refuse: Refuse) -> Source:
    """200 classes of 64x64 images; the official validation images serve as test.

    Classes are numbered in the order of their sorted WordNet ids and named by their first word.
    Grey images become RGB.

    Raises:
        DataError: naming the file, if anything is missing, unknown, empty or there twice.
    """
    tree = open_tree(path, refuse)
    if path.is_dir() and not _ids_files(tree):
        if any(name.endswith(".parquet") for name in tree.names):
            return _from_parquet(path, refuse)
        if archives := sorted(path.glob("tiny-imagenet*.zip")):
            tree = open_tree(archives[0], refuse)
    at = _root(tree)
    ids = _ids(tree, f"{at}wnids.txt", refuse)
    train = _foldered(tree, f"{at}train/", ids, refuse)
    annotations = f"{at}val/val_annotations.txt"
    # many scripts move the validation images to one folder for each class
    official = annotations in set(tree.names)
    if official and any(name.startswith(f"{at}val/images/") for name in tree.names):
        test, form = _annotated(tree, annotations, ids, refuse), "official validation folder"
    else:
        test, form = _foldered(tree, f"{at}val/", ids, refuse), "re-foldered validation images"
    for what, listing in (("train", train), ("val", test)):
        labels = np.asarray(listing.labels, np.int64)
        # only training needs images of every class
        check_labels(labels, tuple(ids), f"{tree.root}: {at}{what}", refuse, full=what == "train")
    lists = [f"{at}wnids.txt", annotations, f"{at}words.txt"]
    used = [*train.names, *test.names, *(name for name in lists if name in set(tree.names))]
    return Source(
        name="tiny-imagenet",
        classes=_names(tree, f"{at}words.txt", tuple(ids)),
        shape=SHAPE,
        train=train.part(tree),
        test=test.part(tree),
        found=f"TinyImageNet, {tree.kind} {tree.root}, {form}",
        files=tree.files(used),
    )


def _from_parquet(path: Path, refuse: Refuse) -> Source:
    source = parquet.read(path, refuse, "tiny-imagenet")
    if source.shape != SHAPE:
        size = "x".join(map(str, source.shape))
        raise DataError(f"{path}: images are {size}, expected 3x64x64")
    return replace(source, found=f"TinyImageNet, {source.found}")


def _ids_files(tree: Tree) -> list[str]:
    return [name for name in tree.names if PurePosixPath(name).name == "wnids.txt"]


def _root(tree: Tree) -> str:
    """The folder that holds wnids.txt, as a prefix of names."""
    found = _ids_files(tree)
    if not found:
        raise DataError(
            f"{tree.root}: this {tree.kind} has no wnids.txt, so it is not TinyImageNet"
        )
    # the shortest path: copies of the set lie deeper
    return min(found, key=len).removesuffix("wnids.txt")


def _ids(tree: Tree, name: str, refuse: Refuse) -> dict[str, int]:
    """Label of each WordNet id, in sorted order."""
    listed = _text(tree, name).split()
    for one, count in Counter(listed).items():
        if count > 1:
            refuse(f"{tree.root}: {name}: class {one} is listed {count} times")
    if len(set(listed)) < 2:
        raise DataError(f"{tree.root}: {name}: needs at least two classes")
    return {one: number for number, one in enumerate(sorted(set(listed)))}


def _text(tree: Tree, name: str) -> str:
    try:
        return read_one(tree, name).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{tree.root}: {name}: not a text file") from error


def _foldered(tree: Tree, at: str, ids: Mapping[str, int], refuse: Refuse) -> _Listing:
    """Images in a folder a class, with or without a folder `images` inside."""
    names, labels, unknown = [], [], set()
    for name in tree.names:
        if not name.startswith(at) or not name.lower().endswith(ENDINGS):
            continue
        folder = name.removeprefix(at).split("/")[0]
        if folder in ids:
            names.append(name)
            labels.append(ids[folder])
        elif folder not in unknown:
            unknown.add(folder)
            refuse(f"{tree.root}: {at}{folder}: unknown class, not in wnids.txt")
    if not names:
        raise DataError(f"{tree.root}: no images below {at}")
    return _Listing(names=names, labels=labels)


def _annotated(tree: Tree, annotations: str, ids: Mapping[str, int], refuse: Refuse) -> _Listing:
    """Images in one folder, labelled by a table of file, WordNet id and box."""
    at = annotations.removesuffix("val_annotations.txt") + "images/"
    present = {name for name in tree.names if name.startswith(at)}
    found: dict[str, int] = {}
    for number, line in enumerate(_text(tree, annotations).splitlines(), 1):
        where = f"{tree.root}: {annotations} line {number}"
        file, _, rest = line.partition("\t")
        label, name = rest.split("\t")[0], at + file
        if label not in ids:
            refuse(f"{where}: unknown label {label!r} of {file!r}")
        elif name in found:
            refuse(f"{where}: duplicate label for {file}")
        elif name not in present:
            refuse(f"{where}: {file!r} is missing")
        else:
            found[name] = ids[label]
    for name in sorted(present - set(found)):
        refuse(f"{tree.root}: {name}: has no line in val_annotations.txt")
    if not found:
        raise DataError(f"{tree.root}: no images below {at}")
    return _Listing(names=list(found), labels=list(found.values()))


def _names(tree: Tree, name: str, ids: Sequence[str]) -> tuple[str, ...]:
    """The first word for each id; with the id where it is not unique, the id if it has none."""
    if name not in tree.names:
        return tuple(ids)
    wanted, words = set(ids), {}
    for line in _text(tree, name).splitlines():
        one, _, rest = line.partition("\t")
        if one in wanted:
            words[one] = rest.split(",")[0].strip()
    # one word may name two classes, as crane does, the bird and the machine
    counts = Counter(word.casefold() for word in words.values())
    return tuple(
        word if (word := words.get(one, "")) and counts[word.casefold()] == 1 else
        f"{word} ({one})" if word else one
        for one in ids
    )  # fmt: skip
