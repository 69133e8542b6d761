"""Validation of labels and class names, for every kind of data set."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from redefense.data.source import Refuse
from redefense.errors import DataError

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val"),
}
"""Names under which splits are found; validation images serve as test where there are no others."""


MAX_UNNAMED = 10_000
"""More classes without names are a mistake, such as a column of other numbers."""


def numbered_classes(where: str, *labels: NDArray[np.int64]) -> tuple[str, ...]:
    """The classes of labels without names: the numbers from 0.

    Raises:
        DataError: naming the place, if there are too many.
    """
    top = max(int(some.max(initial=-1)) for some in labels)
    if top >= MAX_UNNAMED:
        raise DataError(f"{where}: labels up to {top} without names of classes")
    return tuple(map(str, range(top + 1)))


def check_labels(
    labels: NDArray[np.int64], classes: Sequence[str], where: str, refuse: Refuse, *, full: bool
) -> None:
    """Check that there are labels, all within the classes, and, if `full`, none without images.

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
    # `bincount` refuses negative numbers
    counts = np.bincount(np.delete(labels, wrong), minlength=len(classes))
    for number in np.flatnonzero(counts == 0) if full else ():
        refuse(f"{where}: class {classes[int(number)]!r} has no images")


def check_classes(classes: Sequence[str], where: str, refuse: Refuse) -> None:
    """Check that there are at least two classes, with unique names.

    Names that differ only in case, surrounding spaces or Unicode form count as equal: readers and
    some file systems do not distinguish them.

    Raises:
        DataError: through `refuse`, naming the class.
    """
    if len(classes) < 2:
        refuse(f"{where}: needs at least two classes, found {list(classes)}")
    refuse_twins(classes, where, refuse)


def refuse_twins(names: Sequence[str], where: str, refuse: Refuse) -> None:
    """Refuse class names that differ only in case, spaces or Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        # once more, since folding the case may decompose letters
        key = one_form(one_form(name).casefold()).strip()
        if key in seen:
            alike = "" if name == seen[key] else " but for case, spaces or Unicode form"
            refuse(f"{where}: duplicate class {name!r} (the same as {seen[key]!r}{alike})")
        seen.setdefault(key, name)


def one_form(name: str) -> str:
    """A name in the composed Unicode form: macOS and Linux encode accents differently."""
    return unicodedata.normalize("NFC", name)
