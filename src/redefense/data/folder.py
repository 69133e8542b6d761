"""A folder (or zip or tar archive) of images sorted as split/class/file."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from redefense.data.framing import framing_of
from redefense.data.labels import SPLITS, check_classes, check_labels, one_form, refuse_twins
from redefense.data.source import Refuse, Source, common_shape, encoded, spread
from redefense.data.tree import Tree, open_tree
from redefense.errors import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif")


def read(
    path: Path, refuse: Refuse, *, resize: str | None = None, crop: str | None = None
) -> Source:
    """Images in `train/CLASS/FILE` and `test/CLASS/FILE` (or `val/...`), of one size when framed.

    Classes are the folders of the training split in sorted order. Hidden files and folders are
    skipped. The EXIF orientation is applied, and transparent pixels become white. Grey images are
    converted to RGB if one of 64 images, evenly spaced over the set, is in colour; otherwise all
    must be grey.

    Args:
        path: a folder, or a zip or tar archive of one.
        refuse: handler of faults.
        resize: see `Framing`.
        crop: likewise.

    Raises:
        DataError: naming the file or folder that breaks a rule.
    """
    framing = framing_of(resize, crop)
    tree = open_tree(path, refuse)
    at, train_folder, test_folder = _splits(tree)
    train = _images(tree, f"{at}{train_folder}/", refuse)
    test = _images(tree, f"{at}{test_folder}/", refuse)
    found, tested = (sorted({label for _, label in images}) for images in (train, test))
    where = str(tree.root)
    check_classes(found, f"{where}: {at}{train_folder}", refuse)
    refuse_twins(tested, f"{where}: {at}{test_folder}", refuse)
    classes = tuple(dict.fromkeys(sorted(map(one_form, found))))
    number = {label: place for place, label in enumerate(classes)}
    for label in tested:
        if one_form(label) not in number:
            refuse(
                f"{where}: {at}{test_folder}/{label}: unknown class, not among the training ones"
            )
    _refuse_empty(tree, at, (train_folder, test_folder), refuse)
    # the others were reported above
    test = [(name, label) for name, label in test if one_form(label) in number]
    for what, listing in ((train_folder, train), (test_folder, test)):
        if not listing:
            raise DataError(f"{where}: no images below {at}{what}")
    names = [name for name, _ in (*train, *test)]
    shape = common_shape(tree.items(spread(names)), refuse, where, framing)

    def labels(listing: Sequence[tuple[str, str]]) -> np.ndarray:
        return np.array([number[one_form(label)] for _, label in listing], np.int64)

    check_labels(labels(train), classes, where, refuse, full=True)
    return Source(
        name="folder",
        classes=classes,
        shape=shape,
        train=encoded(labels(train), lambda: tree.items(names[: len(train)]), shape, framing),
        test=encoded(labels(test), lambda: tree.items(names[len(train) :]), shape, framing),
        found=f"images as split/class/file in {tree.kind} {tree.root}, test from {test_folder!r}"
        + f"; {framing}" * bool(framing),
        files=tree.files(names),
    )


def _splits(tree: Tree) -> tuple[str, str, str]:
    """Prefix of names, and the names of the two folders of splits.

    Raises:
        DataError: if there are none, or several.
    """
    folders = {
        "/".join(PurePosixPath(name).parts[:depth])
        for name in (*tree.names, *tree.empty)
        for depth in (1, 2)
    }
    sets = []
    # the root first: only if it has no splits, one folder in it may have them
    for at in ("", *sorted(f"{folder}/" for folder in folders if "/" not in folder)):
        found = {
            split: [word for word in words if f"{at}{word}" in folders]
            for split, words in SPLITS.items()
        }
        train, test = found["train"], found["test"] or found["validation"]
        if not (train and test):
            continue
        for names in (train, test):
            if len(names) > 1:
                raise DataError(
                    f"{tree.root}: the folders {at}{names[0]} and {at}{names[1]} name one split: "
                    "keep one of them"
                )
        sets.append((at, train[0], test[0]))
        if not at:
            break
    if len(sets) > 1:
        some = ", ".join(at for at, *_ in sets[:3])
        raise DataError(
            f"{tree.root}: {len(sets)} folders hold a data set each ({some}): give one of them"
        )
    if sets:
        return sets[0]
    raise DataError(
        f"{tree.root}: needs folders train/CLASS/FILE and test/CLASS/FILE (or val/CLASS/FILE)"
    )


def _images(tree: Tree, at: str, refuse: Refuse) -> list[tuple[str, str]]:
    """Name and class of each image of a split."""
    found = []
    for name in tree.names:
        if not name.startswith(at):
            continue
        parts = name.removeprefix(at).split("/")
        if not parts[-1].lower().endswith(ENDINGS):
            refuse(f"{tree.root}: {name}: not an image by its name ({', '.join(ENDINGS[:3])} ...)")
        elif len(parts) != 2:
            refuse(f"{tree.root}: {name}: not at {at}CLASS/FILE")
        else:
            found.append((name, parts[0]))
    return found


def _refuse_empty(tree: Tree, at: str, splits: Sequence[str], refuse: Refuse) -> None:
    for folder in tree.empty:
        parent = str(PurePosixPath(folder).parent) + "/"
        if parent in {f"{at}{split}/" for split in splits}:
            refuse(f"{tree.root}: {folder}: empty class")
