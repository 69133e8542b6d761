"""A few attacked images for display, stored with every evaluation. Needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from redefense.errors import DataError

SHOWN: Final = 8
"""Number of images that are shown."""

CANDIDATES: Final = 16
"""Number of first images from which examples are selected: those that are correct when clean."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Examples:
    """The worst point of each of the first images that some member classifies correctly when clean.

    Attributes:
        index: (k,) index of each image in the evaluation, from 0.
        label: (k,) the true class.
        attack: (k,) name of the attack that found the point; "clean" if no attack lowered the
            accuracy.
        clean: (k, C, H, W) the clean images; `attacked`, the points.
        correct: (M, k) correctness of each member (of a stochastic network, each draw) on them.
        predicted: (M, k) class predicted by each member; (0, k) for a stochastic network.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    attack: NDArray[Any]
    clean: NDArray[np.floating]
    attacked: NDArray[np.floating]
    correct: NDArray[np.bool_]
    predicted: NDArray[np.int64]

    def arrays(self) -> dict[str, Any]:
        """The arrays to store."""
        return asdict(self)

    @classmethod
    def read(cls, arrays: Mapping[str, NDArray[Any]], where: str) -> "Examples | None":
        """The examples in a file's arrays; None if there are none.

        Raises:
            DataError: if arrays are missing or their shapes do not match.
        """
        if not arrays:  # none were stored, as by older versions
            return None
        names = cls.__dataclass_fields__
        if missing := [name for name in names if name not in arrays]:
            raise DataError(f"{where} is damaged: missing {', '.join(missing)}")
        found = cls(**{name: arrays[name] for name in names})
        # the page indexes all by one number, and files may be damaged or made elsewhere
        k = len(found.index)
        fits = (
            found.clean.ndim == 4
            and found.clean.shape == found.attacked.shape
            and found.correct.ndim == found.predicted.ndim == 2
            and {len(found.clean), len(found.label), len(found.attack)} == {k}
            and {found.correct.shape[1], found.predicted.shape[1]} == {k}
        )
        if not fits:
            raise DataError(f"{where} is damaged: not all its arrays have {k} images")
        return found
