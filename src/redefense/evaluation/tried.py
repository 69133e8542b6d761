"""Points that measurements and checks try on the first images: they count as those of cells do."""

from copy import copy

import numpy as np
from torch import Tensor

from redefense.evaluation.cells import Cell, judge, verify_ball
from redefense.evaluation.store import Arrays
from redefense.evaluation.worst import WorstCase
from redefense.threat import Threat
from redefense.types import Bool, Ensemble, Images, Labels


class Tried:
    """Keeps what the members say to the worst point of each image, and who errs at any point.

    Args:
        ensemble: who is asked.
        x: (k, C, H, W) the first images of the evaluation.
        y: their labels.
        threat: that of the headline.
    """

    def __init__(self, ensemble: Ensemble, x: Images, y: Labels, threat: Threat) -> None:
        self._ensemble, self._x, self._y, self._threat = ensemble, x, y, threat
        self._mixture = ensemble.mixture.detach().double().cpu().numpy()
        clean = judge(ensemble, x, x, y)
        self.arrays: Arrays = {
            "correct": clean["correct"], "averaged": clean["averaged"], "alone": clean["correct"],
        }  # fmt: skip

    def fork(self) -> "Tried":
        """Another one that starts from what is known here, for a part of the work."""
        other = copy(self)
        other.arrays = dict(self.arrays)
        return other

    def offer(self, points: Images, rows: Bool[Tensor, " k"] | None = None) -> Arrays:
        """Put points within the threat to all members.

        Args:
            points: one for each image, or for those of `rows`.
            rows: the images that have a point.

        Returns:
            "correct" (M, K) and "averaged" (K,) of the points.

        Raises:
            InputError: if a point lies outside the box or the ball.
        """
        chosen = slice(None) if rows is None else rows
        x, y = self._x[chosen], self._y[chosen]
        if len(x) == 0:
            return {key: values[..., :0] for key, values in self.arrays.items()}
        verify_ball(points, x, self._threat, "a measurement")
        found = judge(self._ensemble, points, x, y)
        at = chosen if rows is None else rows.cpu().numpy()
        every = {key: values.copy() for key, values in self.arrays.items()}
        for key, source in (("correct", "correct"), ("averaged", "averaged"), ("alone", "correct")):
            every[key][..., at] = found[source]
        self.add(every)
        return found

    def add(self, arrays: Arrays) -> None:
        """Count what was found on the same images elsewhere."""
        old = self.arrays
        better = self._mixture @ arrays["correct"] < self._mixture @ old["correct"] - 1e-9
        self.arrays = {
            "correct": np.where(better, arrays["correct"], old["correct"]),
            "averaged": old["averaged"] & arrays["averaged"],
            "alone": old["alone"] & arrays["alone"],
        }


def record_of(arrays: Arrays, worst: WorstCase) -> Cell:
    """What was tried on the first images as the record of all of them."""
    n, k = len(worst.q), len(arrays["averaged"])
    full = {key: np.zeros((*values.shape[:-1], n), dtype=bool) for key, values in arrays.items()}
    for key, values in arrays.items():
        full[key][..., :k] = values
    nothing = {key: np.zeros(n) for key in ("linf", "l2", "l0")}
    return worst.filled(Cell(**full, **nothing, met=np.arange(n) < k))
