"""The 1,797 small digits shipped with the package (`digits-notice.txt` names their origin)."""

from importlib import resources
from pathlib import Path

import numpy as np

from redefense.data.source import Part, Refuse, Source


def read(path: Path, refuse: Refuse) -> Source:
    """1x8x8 digits in 10 classes; the 360 test images are fixed and stratified by class."""
    file = resources.files("redefense.data.digits") / "digits.npz"
    with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
        images, labels, test = stored["images"], stored["labels"], stored["test"]

    def part(rows: np.ndarray) -> Part:
        return Part(
            labels=labels[rows].astype(np.int64), blocks=lambda: iter([images[rows][:, None]])
        )

    return Source(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        shape=(1, 8, 8),
        train=part(~test),
        test=part(test),
        found="1797 8x8 digits shipped with the package",
    )
