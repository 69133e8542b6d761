"""Tail probabilities of statistical tests, without scipy."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from redefense.export.draws import chi_square_p


def independent(pairs: Sequence[tuple[int, int]], mixture: NDArray[np.float64]) -> float:
    """P-value that pairs of members are two independent draws from the mixture."""
    m = len(mixture)
    codes = [first * m + second for first, second in pairs]
    counts = np.bincount(codes, minlength=m * m)
    return chi_square_p(counts, np.outer(mixture, mixture).ravel())


def normal_tail(z: float) -> float:
    """P(|standard normal| >= |z|)."""
    return math.erfc(abs(z) / math.sqrt(2))


def agreement(matches: int, trials: int, chance: float) -> float:
    """P-value that `matches` of `trials` agree with this chance each."""
    spread = math.sqrt(trials * chance * (1 - chance))
    return normal_tail((matches - trials * chance) / spread) if spread > 0 else 1.0


def separation(own: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float]:
    """Share of pairs in which the first value is the larger (0.5: alike), and its p-value.

    Mann and Whitney's test; ties count half.
    """
    n, k = len(own), len(others)
    if n == 0 or k == 0:
        return 0.5, 1.0
    larger = (own[:, None] > others).sum() + 0.5 * (own[:, None] == others).sum()
    share = float(larger) / (n * k)
    return share, normal_tail((share - 0.5) / math.sqrt((n + k + 1) / (12 * n * k)))
