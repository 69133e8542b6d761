"""Would chance alone look like this? Tail probabilities that need no scipy."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
_ROUNDS = 10_000


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees of freedom >= statistic).

    The regularised upper incomplete gamma function Q(freedom / 2, statistic / 2), by its series
    below the mean and by its continued fraction (Lentz) above.
    """
    if freedom < 1 or statistic <= 0:
        return 1.0
    a, x = freedom / 2, statistic / 2
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, _ROUNDS):
            term *= x / (a + n)
            total += term
            if term < total * 1e-15:
                break
        return max(0.0, 1 - scale * total)
    b = x + 1 - a
    c, d = 1e300, 1 / b
    fraction = d
    for n in range(1, _ROUNDS):
        step = -n * (n - a)
        b += 2
        d = 1 / (step * d + b)
        c = b + step / c
        fraction *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return scale * fraction


def fit(counts: Counts, shares: NDArray[np.float64]) -> float:
    """P-value of counts (K,) against shares (K,); 0.0 where the impossible happened."""
    possible = shares > 0
    if counts[~possible].any():
        return 0.0
    expected = counts.sum() * shares[possible]
    if expected.sum() == 0:
        return 1.0
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    return chi_square_tail(statistic, int(possible.sum()) - 1)


def independent(pairs: Sequence[tuple[int, int]], mixture: NDArray[np.float64]) -> float:
    """P-value that pairs of members are two independent draws from the mixture."""
    m = len(mixture)
    codes = [first * m + second for first, second in pairs]
    return fit(np.bincount(codes, minlength=m * m), np.outer(mixture, mixture).ravel())


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
