"""Rules that labels and classes of every kind of data set must keep."""

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
    """Refuse fewer than two classes and names that occur twice (also up to case).

    Raises:
        DataError: through `refuse`, naming the class.
    """
    if len(classes) < 2:
        refuse(f"{where}: needs at least two classes, found {list(classes)}")
    seen: dict[str, str] = {}
    for name in classes:
        if (key := name.casefold()) in seen:
            refuse(f"{where}: duplicate class {name!r} (the same as {seen[key]!r})")
        seen.setdefault(key, name)
