"""The worst case of each image over all attacks at the headline's threat."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from redefense.evaluation.cells import Cell
from redefense.results.accuracy import Bools, Floats
from redefense.results.intervals import exact_expectation

EQUAL = 1e-9
"""Values of expected correctness that differ by less are equal."""


class WorstCase:
    """Per-image worst case over all points found so far within one threat.

    It depends only on the records and the order in which they were added, so that a resumed
    evaluation gives the same result as an uninterrupted one.

    Args:
        mixture: (M,) sampling probabilities.
        clean: the records of the clean images, which become the source "clean".

    Attributes:
        correct: (M, n) correctness of the members on each image's worst point.
        q: (n,) exact expected correctness on it.
        source: (n,) name of the record of this point.
        alone: (M, n) whether each member is correct on every point: its own worst case.
        averaged: (n,) the same of the averaged ensemble.
        corrects: (M, n) of every record.
    """

    def __init__(self, mixture: Floats, clean: Cell) -> None:
        self.mixture = mixture
        self.correct: Bools = clean.correct
        self.q: Floats = exact_expectation(clean.correct, mixture)
        self.source: Sequence[str] = ["clean"] * len(self.q)
        self.alone: Bools = clean.correct
        self.averaged: Bools = clean.averaged
        self.corrects: Sequence[Bools] = [clean.correct]

    @property
    def lost(self) -> Bools:
        """(n,) the images with one point that fools every member of positive probability."""
        lost: Bools = self.q <= EQUAL
        return lost

    def better(self, correct: Bools, rows: Sequence[int] | slice = slice(None)) -> Bools:
        """Whether points have lower expected correctness than all before, from (M, k)."""
        better: Bools = exact_expectation(correct, self.mixture) < self.q[rows] - EQUAL
        return better

    def filled(self, cell: Cell) -> Cell:
        """The records, with the current worst case for images that were not attacked."""
        # lost images count as fooled for every member, also those of probability zero
        met, before = cell.met, self.correct & ~self.lost
        correct = np.where(met, cell.correct, before)
        return replace(
            cell,
            correct=correct,
            averaged=np.where(met, cell.averaged, self.averaged & ~self.lost),
            alone=correct if cell.alone is cell.correct else np.where(met, cell.alone, before),
        )

    def add(self, name: str, cell: Cell) -> None:
        """Count the points of a record."""
        # records of images that were not attacked repeat earlier ones
        better = cell.met & self.better(cell.correct)
        self.correct = np.where(better, cell.correct, self.correct)
        self.q = np.where(better, exact_expectation(cell.correct, self.mixture), self.q)
        self.source = [name if b else s for b, s in zip(better, self.source, strict=True)]
        self.alone = self.alone & (cell.alone | ~cell.met)
        self.averaged = self.averaged & (cell.averaged | ~cell.met)
        self.corrects = [*self.corrects, cell.correct]
