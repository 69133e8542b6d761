"""The result of one check, and the records that checks read."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class Records(Protocol):
    """Per-image records of one cell."""

    @property
    def correct(self) -> NDArray[np.bool_]: ...

    @property
    def met(self) -> NDArray[np.bool_]: ...

    @property
    def linf(self) -> NDArray[np.float64]: ...


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check.

    Attributes:
        id: S01 to S44, or the name of a check of a bundle.
        passed: None if the check does not apply.
        detail: the figure behind the result.
    """

    id: str
    passed: bool | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "passed": self.passed, "detail": self.detail}
