"""Certified L2 accuracy of Gaussian noise on the image, for one draw and for the majority vote.

Both use one theorem (Cohen et al., 2019; Salman et al., 2019): for any classifier with Gaussian
input noise of standard deviation sigma, Phi^-1 of the probability p(x) of a label is Lipschitz in x
with constant 1 / sigma. They certify two different defences: one answers with a single draw, the
other with the most probable label.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtr, ndtri

from redefense.errors import ConfigError
from redefense.limits import within


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """Certified accuracies of one set of images at one L2 radius, as fractions.

    Attributes:
        sigma: standard deviation of the noise, in units of the images.
        radius: largest L2 norm of a perturbation, in the same units.
        draws: number of noise samples per image.
        single: lower bound on the mean probability that one draw is correct, under any attack
            within the radius.
        vote: lower bound on the share of images whose most probable label is correct under any
            attack within the radius.
        confidence: of each bound, simultaneously for all images.
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
    """(n,) lower confidence bounds of probabilities from counts, at level 1 - `alpha`.

    One-sided bounds of Clopper and Pearson (1934).

    Args:
        right: (n,) numbers of successes.
        draws: number of trials.
        alpha: in (0, 1).
    """
    # the quantile is undefined for 0 successes, whose bound is 0
    low: NDArray[np.float64] = betaincinv(np.maximum(right, 1), draws - right + 1, alpha)
    return np.where(right > 0, low, 0.0)


def certificate(
    right: NDArray[np.int64], draws: int, *, sigma: float, radius: float, alpha: float = 0.001
) -> Certificate:
    """Both certificates, from the number of correct draws on each clean image.

    Args:
        right: (n,) numbers of correct draws.
        draws: number of draws per image.
        sigma: standard deviation of the noise, > 0.
        radius: in L2, >= 0.
        alpha: failure probability of the certificates, in (0, 1), divided among the images.

    Raises:
        ConfigError: for sigma, radius or alpha outside its range.
    """
    if not sigma > 0:
        raise ConfigError(f"a certificate needs noise: sigma must be positive, got {sigma}")
    if not radius >= 0:
        raise ConfigError(f"the radius must not be negative, got {radius}")
    within("(0, 1)", alpha=alpha)
    # Bonferroni over the images, so that all bounds hold at once
    low = least_chance(right, draws, alpha / len(right))
    # ndtri(0) is -inf, so that a probability of 0 stays 0 at every radius
    shifted = ndtri(low) - radius / sigma
    return Certificate(
        sigma=sigma,
        radius=radius,
        draws=draws,
        single=float(ndtr(shifted).mean()),
        # a label with more than half of the probability wins every vote
        vote=float((shifted > 0).mean()),
        confidence=1 - alpha,
    )
