"""Validation of labels and class names, for every kind of data set."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from redefense.data.source import Refuse

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val"),
}
"""Names under which splits are found; validation images serve as test where there are no others."""


def check_labels(
    labels: NDArray[np.int64], classes: Sequence[str], where: str, refuse: Refuse, *, full: bool
) -> None:
    """Refuse no labels at all, labels outside the classes and, if `full`, classes without images.

    Raises:
        DataError: through `refuse`, naming the place, label or class.
    """
    if not len(labels):
        refuse(f"{where}: no images")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        refuse(
            f"{where}: {len(wrong)} unknown labels outside [0, {len(classes)}), "
            f"the first is {labels[wrong[0]]} of image {wrong[0]}"
        )
    counts = np.bincount(np.delete(labels, wrong), minlength=len(classes))
    for number in np.flatnonzero(counts == 0) if full else ():
        refuse(f"{where}: class {classes[int(number)]!r} has no images")


def check_classes(classes: Sequence[str], where: str, refuse: Refuse) -> None:
    """Refuse fewer than two classes and names that occur twice.

    Names that differ in case, spaces at their ends or Unicode form alone are the same: readers
    cannot tell them apart, and some file systems do not.

    Raises:
        DataError: through `refuse`, naming the class.
    """
    if len(classes) < 2:
        refuse(f"{where}: needs at least two classes, found {list(classes)}")
    refuse_twins(classes, where, refuse)


def refuse_twins(names: Sequence[str], where: str, refuse: Refuse) -> None:
    """Refuse names of classes that are the same but for case, spaces or Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        key = one_form(one_form(name).casefold()).strip()
        if key in seen:
            alike = "" if name == seen[key] else " but for case, spaces or Unicode form"
            refuse(f"{where}: duplicate class {name!r} (the same as {seen[key]!r}{alike})")
        seen.setdefault(key, name)


def one_form(name: str) -> str:
    """A name in the composed Unicode form: macOS and Linux spell accents in two ways."""
    return unicodedata.normalize("NFC", name)
