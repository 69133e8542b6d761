"""A few attacked images to look at, stored with every evaluation. Needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from redefense.errors import DataError

SHOWN: Final = 8
"""Images that are shown."""

CANDIDATES: Final = 16
"""The first images of the evaluation, from which those are taken that are right untouched."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Examples:
    """Of the first images that some member gets right untouched, the point that leaves the least.

    Attributes:
        index: (k,) which image of the evaluation each is, from 0.
        label: (k,) the true class.
        attack: (k,) as text, the name of the attack that found the point; "clean" where none hurt.
        clean: (k, C, H, W) the image as it is; `attacked`, the point.
        correct: (M, k) whether each member (of a network that draws, each draw) is right on it.
        predicted: (M, k) what each member says; of a network that draws, (0, k).
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    attack: NDArray[Any]
    clean: NDArray[np.floating]
    attacked: NDArray[np.floating]
    correct: NDArray[np.bool_]
    predicted: NDArray[np.int64]

    def arrays(self) -> dict[str, Any]:
        """What is stored."""
        return asdict(self)

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]], where: str) -> "Examples | None":
        """The examples that a file holds; None where there is none.

        Raises:
            DataError: if arrays are missing or their shapes do not fit.
        """
        if not arrays:
            return None
        names = cls.__dataclass_fields__
        if missing := [name for name in names if name not in arrays]:
            raise DataError(f"{where} is damaged: it lacks {', '.join(missing)}")
        found = cls(**{name: arrays[name] for name in names})
        k = len(found.index)
        fits = (
            found.clean.ndim == 4
            and found.clean.shape == found.attacked.shape
            and found.correct.ndim == found.predicted.ndim == 2
            and {len(found.clean), len(found.label), len(found.attack)} == {k}
            and {found.correct.shape[1], found.predicted.shape[1]} == {k}
        )
        if not fits:
            raise DataError(f"{where} is damaged: its arrays are not of the same {k} images")
        return found
