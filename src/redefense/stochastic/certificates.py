"""What Gaussian noise on the image certifies in L2, for one draw and for the vote.

Both rest on one fact (Cohen et al., 2019; Salman et al., 2019): for any classifier, the probability
p(x) of an answer under Gaussian noise of deviation sigma changes so slowly with x that
Phi^-1(p(x)) moves by at most ||d|| / sigma when x moves by d. They are certificates of two
different defences: one answers with a draw, the other with the likeliest label of all draws.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri

from redefense.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Certified accuracies of one set of images at one L2 radius, as fractions.

    Attributes:
        sigma: deviation of the noise, in units of the images.
        radius: how far an image may be moved in L2, in the same units.
        draws: on which it rests, for each image.
        single: lower bound on the mean probability that one draw is right, whatever the attacker
            does to each image within the radius.
        vote: lower bound on the share of images on which the likeliest label is the right one, and
            stays it within the radius.
        confidence: with which each of the two holds, for all images at once.
    """

    sigma: float
    radius: float
    draws: int
    single: float
    vote: float
    confidence: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def least_chance(right: NDArray[np.int64], draws: int, alpha: float) -> NDArray[np.float64]:
    """(n,) lower bounds of probabilities from counts, each wrong with probability `alpha` at most.

    One-sided Clopper and Pearson (1934).

    Args:
        right: (n,) successes.
        draws: trials of each.
        alpha: in (0, 1).
    """
    low: NDArray[np.float64] = betaincinv(np.maximum(right, 1), draws - right + 1, alpha)
    return np.where(right > 0, low, 0.0)


def certificate(
    right: NDArray[np.int64], draws: int, *, sigma: float, radius: float, alpha: float = 0.001
) -> Certificate:
    """Both certificates from how many draws were right on each untouched image.

    Args:
        right: (n,) right answers.
        draws: on each image.
        sigma: deviation of the noise, > 0.
        radius: in L2, >= 0.
        alpha: the certificates may be wrong with this probability; each image gets its share of it.

    Raises:
        ConfigError: for a deviation, radius or alpha outside its range.
    """
    if not sigma > 0:
        raise ConfigError(f"a certificate needs noise: sigma must be positive, got {sigma}")
    if not radius >= 0:
        raise ConfigError(f"the radius must not be negative, got {radius}")
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must lie in (0, 1), got {alpha}")
    low = least_chance(right, draws, alpha / len(right))
    # ndtri(0) is -inf, and what lies below every radius stays at probability 0
    shifted = ndtri(low) - radius / sigma
    return Certificate(
        sigma=sigma,
        radius=radius,
        draws=draws,
        single=float(ndtr(shifted).mean()),
        vote=float((shifted > 0).mean()),
        confidence=1 - alpha,
    )
