"""Statistical tests of an auditor's observations: pairs of draws, matches and times."""

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


def agreement(matches: int, trials: int, chance: float) -> float:
    """P-value of `matches` in `trials` with the given probability."""
    from scipy.stats import binomtest  # slow import

    return float(binomtest(matches, trials, min(1.0, chance)).pvalue)


def separation(own: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float]:
    """Fraction of pairs in which the first value is larger (0.5: equal), and its p-value.

    Mann and Whitney's test; ties count half.
    """
    from scipy.stats import mannwhitneyu

    n, k = len(own), len(others)
    if n == 0 or k == 0:
        return 0.5, 1.0
    found = mannwhitneyu(own, others, use_continuity=False, method="asymptotic")
    share = float(found.statistic) / (n * k)
    return share, 1.0 if share == 0.5 else float(found.pvalue)
