"""Intervals for accuracies: Wilson for counts, bootstrap for expectations, paired for comparisons.

Every function is deterministic. Accuracies are fractions in [0, 1].
"""

from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from redefense.errors import InputError

_MAX_DRAWS = 2_000_000  # multinomial counts held in memory at once


class Estimate(NamedTuple):
    """A figure and its interval; `low` and `high` are None if the interval is unknown."""

    value: float
    low: float | None = None
    high: float | None = None


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise InputError(f"level must lie in (0, 1), got {level}")
    return level


def _z(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + _level(level) / 2)


def _vector(values: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise InputError(f"{what} must be a non-empty finite vector, got shape {array.shape}")
    return array


@lru_cache(maxsize=4096)
def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a share of k successes in n independent trials (Wilson, 1927).

    Never empty and never outside [0, 1]: with k = 0 it is [0, z^2 / (n + z^2)].
    """
    from scipy.stats import binomtest  # takes half a second to load

    if n < 1 or not 0 <= k <= n:
        raise InputError(f"need 0 <= k <= n and n >= 1, got k = {k}, n = {n}")
    low, high = binomtest(k, n).proportion_ci(_level(level), method="wilson")
    return float(low), float(high)


def bootstrap_mean(
    values: ArrayLike, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (n,), e.g. of expected correctness.

    A resample is the multinomial count of each *distinct* value: equal in distribution to drawing n
    images with replacement, and the M + 1 levels of an ensemble of M make it cheap for any n.
    """
    array = _vector(values, "values")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    tail = NormalDist().cdf(-_z(level))
    distinct, counts = np.unique(array, return_counts=True)
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_DRAWS // len(distinct))
    means = np.concatenate(
        [
            rng.multinomial(len(array), counts / len(array), min(rows, resamples - start))
            @ distinct
            / len(array)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def accuracy_interval(values: ArrayLike, seed: int = 0, level: float = 0.95) -> Estimate:
    """Mean of per-image correctness (n,) in [0, 1] and its interval over images.

    Wilson if every value is 0 or 1 (a bootstrap of all zeros would have width 0), otherwise the
    bootstrap, widened to at least the interval of n all-wrong or all-correct images.
    """
    array = _vector(values, "correctness")
    if array.min() < 0 or array.max() > 1:
        raise InputError(f"correctness must lie in [0, 1], found {array.min()}, {array.max()}")
    # counts have an exact theory; the bootstrap of nearly equal values is too narrow
    if np.isin(array, (0.0, 1.0)).all():
        interval = wilson(int(array.sum()), len(array), level)
    else:
        low, high = bootstrap_mean(array, seed, level)
        n = len(array)
        interval = min(low, wilson(n, n, level)[0]), max(high, wilson(0, n, level)[1])
    return Estimate(float(array.mean()), *interval)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of a - b over the same images and its interval; a and b (n,) lie in [0, 1].

    One pseudo-image in favour of each is added before the normal interval is taken: for 0/1 values
    this is the interval of Bonett and Price (2012) for paired proportions, which keeps its coverage
    when few images differ and never has width zero.
    """
    first, second = _vector(a, "a"), _vector(b, "b")
    if len(first) != len(second):
        raise InputError(f"paired values need the same images, got {len(first)} and {len(second)}")
    difference = first - second
    n = len(difference) + 2
    centre = float(difference.sum()) / n
    # the two pseudo-images differ by +1 and -1: each adds 1 to the sum of squares
    variance = (float(difference @ difference) + 2) / n - centre**2
    half = _z(level) * (variance / n) ** 0.5
    return Estimate(float(difference.mean()), max(-1.0, centre - half), min(1.0, centre + half))


def over_seeds(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of per-image correctness over trainings with several seeds, and its interval over both.

    Seeds and images are crossed random effects. Student's interval over seeds (of their means over
    images, S - 1 degrees of freedom) and the one over images are added in quadrature, which is at
    least as wide as the approximation of Cochran and Cox (1957). Two seeds of different accuracy
    therefore give a wide interval. It is never narrower than over images alone.

    Args:
        values: (S, n), each in [0, 1]; with one seed the interval is `accuracy_interval`.
        level: of confidence.
    """
    seeds = np.atleast_2d(np.asarray(values, dtype=np.float64))
    images = accuracy_interval(seeds.mean(0), level=level)
    if len(seeds) == 1 or images.low is None or images.high is None:
        return images
    value, half = images.value, _crossed(seeds.mean(0), [seeds.mean(1)], level)
    low, high = max(0.0, value - half), min(1.0, value + half)
    return Estimate(value, min(low, images.low), max(high, images.high))


def difference_over_seeds(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean of a - b, both (seeds, n) over the same images, and its interval over images and seeds.

    The seeds of both are independent, the images are paired. Computed as in `over_seeds`, and never
    narrower than `paired_difference` of the means over seeds.
    """
    one, other = (np.atleast_2d(np.asarray(it, dtype=np.float64)) for it in (a, b))
    images = paired_difference(one.mean(0), other.mean(0), level)
    several = [it.mean(1) for it in (one, other) if len(it) > 1]
    if not several or images.low is None or images.high is None:
        return images
    value, half = images.value, _crossed(one.mean(0) - other.mean(0), several, level)
    low, high = max(-1.0, value - half), min(1.0, value + half)
    return Estimate(value, min(low, images.low), max(high, images.high))


def _crossed(
    images: NDArray[np.float64], seeds: Sequence[NDArray[np.float64]], level: float
) -> float:
    """Half width of a mean's interval, from (n,) means over seeds and (S,) means over images."""
    from scipy.special import stdtrit  # imported here, since scipy is slow to load

    squares = [
        float(stdtrit(len(it) - 1, 0.5 + level / 2)) ** 2 * float(it.var(ddof=1)) / len(it)
        for it in (images, *seeds)
    ]
    return float(np.sqrt(sum(squares)))


def exact_expectation(
    correct: NDArray[np.bool_], mixture: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n,) probability of a correct prediction, from correctness (M, n) and the mixture (M,)."""
    q: NDArray[np.float64] = mixture @ correct.astype(np.float64)
    # rounding of the mixture's sum must not give probabilities above 1
    return np.where(q > 1 - 1e-12, 1.0, q)


def fooled_histogram(correct: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(M + 1,) number of images that fool 0, 1, ... M members, from correctness (M, n)."""
    histogram: NDArray[Any] = np.bincount((~correct).sum(0), minlength=len(correct) + 1)
    return histogram.astype(np.int64)


def success_within(q: NDArray[np.float64], tries: int) -> NDArray[np.float64]:
    """(tries,) probability that an attack succeeds within K = 1, ..., `tries` independent draws.

    1 - mean_i q_i^K for expected correctness q (n,): the same image is queried K times.
    """
    exponents = np.arange(1, tries + 1)
    success: NDArray[np.float64] = 1 - (q[None, :] ** exponents[:, None]).mean(1)
    return success
