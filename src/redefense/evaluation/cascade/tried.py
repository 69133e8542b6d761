"""Adversarial points found by statistics and checks, which count for the headline."""

from copy import copy
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor

from redefense.ensembles import Ensemble
from redefense.evaluation.cascade.worst_case import WorstCase
from redefense.evaluation.cells import Cell, clean_cell, judge, verify_ball
from redefense.results.accuracy import Bools
from redefense.threat import Threat
from redefense.types import Bool, Images, Labels


class Tried:
    """Records the members' correctness on the worst point of each image and over all points.

    Args:
        ensemble: the ensemble that is queried.
        x: (k, C, H, W) the first images of the evaluation.
        y: their labels.
        threat: that of the headline.

    Attributes:
        clean: the record of the clean images.
    """

    def __init__(self, ensemble: Ensemble, x: Images, y: Labels, threat: Threat) -> None:
        self._ensemble, self._x, self._y, self._threat = ensemble, x, y, threat
        self.clean = clean_cell(ensemble, x, y)
        self._worst = WorstCase(ensemble.probabilities(), self.clean)

    @property
    def cell(self) -> Cell:
        """The record of the k images: correctness on the worst point, `alone` over all points."""
        worst = self._worst
        return replace(
            self.clean, correct=worst.correct, averaged=worst.averaged, alone=worst.alone
        )

    def fork(self) -> "Tried":
        """A copy of the current records, for one process."""
        # shallow copies: `WorstCase` replaces its arrays and changes none
        other = copy(self)
        other._worst = copy(self._worst)
        return other

    def offer(self, points: Images, rows: Bool[Tensor, " k"] | None = None) -> Cell:
        """Record the correctness of all members on points within the threat.

        Args:
            points: one for each image, or for those of `rows`.
            rows: the images that have a point.

        Returns:
            The record of the k images, of which `rows` have a point.

        Raises:
            InputError: if a point lies outside the box or the ball.
        """
        met = np.ones(len(self._x), dtype=bool) if rows is None else rows.cpu().numpy()
        chosen = slice(None) if rows is None else rows
        x, y = self._x[chosen], self._y[chosen]
        correct, averaged = self.clean.correct.copy(), self.clean.averaged.copy()
        if len(x):
            # a point outside would make the headline lower than it is
            verify_ball(points, x, self._threat, "a measurement")
            found = judge(self._ensemble, points, x, y)
            correct[:, met], averaged[met] = found["correct"], found["averaged"]
        cell = replace(self.clean, correct=correct, averaged=averaged, alone=correct, met=met)
        self.add(cell)
        return cell

    def judged(self, points: Images, rows: Bool[Tensor, " k"]) -> Bools:
        """(M, j) correctness of the members on one point for each image of `rows`; no record."""
        correct: Bools = judge(self._ensemble, points, self._x[rows], self._y[rows])["correct"]
        return correct

    def offer_rounds(self, points: Images) -> Bools:
        """Record R rounds of points within the threat, all judged in one pass.

        Args:
            points: (R k, C, H, W), one for each image in each round.

        Returns:
            (M, R k) correctness of the members.

        Raises:
            InputError: if a point lies outside the box or the ball.
        """
        rounds = len(points) // len(self._x)
        x = self._x.repeat(rounds, 1, 1, 1)
        verify_ball(points, x, self._threat, "a measurement")
        found = judge(self._ensemble, points, x, self._y.repeat(rounds))
        pairs = (np.split(found[key], rounds, axis=-1) for key in ("correct", "averaged"))
        for correct, averaged in zip(*pairs, strict=True):
            self.add(replace(self.clean, correct=correct, averaged=averaged, alone=correct))
        hits: Bools = found["correct"]
        return hits

    def add(self, cell: Cell) -> None:
        """Add a record of the same images."""
        self._worst.add("tried", cell)


def record_of(cell: Cell, worst: WorstCase) -> Cell:
    """A record of the first images, extended to all images; only the first count as attacked."""
    more = len(worst.q) - len(cell.met)
    # zeros also for `met`: the images behind the first ones were not attacked
    whole: dict[str, Any] = {
        key: np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, more)])
        for key, values in asdict(cell).items()
        if isinstance(values, np.ndarray)
    }
    return worst.filled(replace(cell, **whole))
