"""Figures of a stochastic network, from the correctness of its fresh draws.

`correct` (S, n) is the correctness of draw s on image i. All attacks are scored by equally many
draws. The worst attack is selected on one half of the draws and scored on the other, then the
halves are swapped and both results averaged. Selection and scoring on the same draws would bias the
accuracy down. Needs neither torch nor a model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import gammaln, stdtrit

from redefense.results.accuracy import Bools, Floats
from redefense.results.intervals import wilson

FIGURES = (
    "unaware", "unaware_interval", "unaware_interval_draws",
    "aware", "aware_interval", "aware_interval_draws", "success_within",
)  # fmt: skip
"""Keys of the result of `pair`."""
LEVEL = 0.95
RESAMPLES = 2000


def worst_per_image(corrects: Bools) -> Bools:
    """(S, n) correctness under each image's worst attack, selected on the other half of the draws.

    Ties are resolved in favour of the first attack.

    Args:
        corrects: (A, S, n) of every attack, S even.
    """
    found = np.empty(corrects.shape[1:], dtype=bool)
    images = np.arange(corrects.shape[2])
    for scored, chosen_on in _halves(corrects.shape[1]):
        worst = corrects[:, chosen_on].mean(1).argmin(0)
        found[scored] = corrects[:, scored][worst, :, images].T
    return found


def lowest_cell(corrects: Bools) -> Bools:
    """(S, n) correctness under the attack of lowest accuracy, selected on the other half."""
    found = np.empty(corrects.shape[1:], dtype=bool)
    for scored, chosen_on in _halves(corrects.shape[1]):
        found[scored] = corrects[corrects[:, chosen_on].mean((1, 2)).argmin(), scored]
    return found


def _halves(draws: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    first, second = slice(0, draws // 2), slice(draws // 2, draws)
    return (first, second), (second, first)


def draws_interval(correct: Bools, *, folded: bool = False) -> list[float]:
    """95 % interval of the accuracy over the draws, for fixed images.

    Student's interval of the draws' accuracies. If the attack was selected on the other half, the
    halves are treated as fully dependent, which can only widen it. If all draws agree on every
    image, outcomes with a probability up to 3.7 / S are not excluded.

    Args:
        correct: (S, n).
        folded: an attack was selected on each half of the draws and scored on the other.
    """
    each = correct.mean(1)
    value, draws = float(each.mean()), len(each)
    if (correct == correct[0]).all():
        # the largest probability of an outcome that S draws miss with probability 2.5 %
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / draws)
        return [max(0.0, value * (1 - unseen)), min(1.0, value + (1 - value) * unseen)]
    halves = np.split(each, 2) if folded else [each]
    error = float(np.mean([half.std(ddof=1) / len(half) ** 0.5 for half in halves]))
    reach = float(stdtrit(len(halves[0]) - 1, 0.5 + LEVEL / 2)) * error
    return [max(0.0, value - reach), min(1.0, value + reach)]


def interval(correct: Bools, *, folded: bool = False, seed: int = 0) -> list[float]:
    """95 % interval of the accuracy over images and draws, both resampled.

    Images and draws are resampled with replacement (Owen, 2007), each image together with all its
    draws. Halves that select for each other are treated as fully dependent. The interval is at
    least as wide as that of n images that are all wrong or all correct.

    Args:
        correct: (S, n).
        folded: as in `draws_interval`.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    draws, images = correct.shape
    # sums of so few ones are exact in single precision, in which products are faster
    values = correct.astype(np.float32)
    stretch = 2**0.5 if folded else 1.0
    means = []
    for _ in range(0, RESAMPLES, 250):  # in parts, which bounds the memory
        # how often each image is in a resample: a product of matrices takes the place of indexing
        rows = rng.multinomial(images, np.full(images, 1 / images), 250).astype(np.float32)
        each = (values @ rows.T) / images
        halves = np.split(np.arange(draws), 2) if folded else [np.arange(draws)]
        weights = np.zeros((draws, 250))
        for half in halves:
            drawn = rng.multinomial(len(half), np.full(len(half), 1 / len(half)), 250).T
            # deviations of the resample, widened as if the halves were one
            weights[half] = 1 + stretch * (drawn - 1)
        means.append((each * weights).sum(0) / draws)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    outer = draws_interval(correct, folded=folded)
    return [
        max(0.0, min(float(low), outer[0], wilson(images, images)[0])),
        min(1.0, max(float(high), outer[1], wilson(0, images)[1])),
    ]


def success_within(correct: Bools, tries: int) -> Floats:
    """(tries,) probability that an attack succeeds within K = 1, ..., `tries` queries of one image.

    For an image with k correct answers among S draws, C(k, K) / C(S, K) is the unbiased estimate of
    the probability that K draws are all correct; (k / S)^K would be biased upwards. NaN for more
    tries than draws.

    Args:
        correct: (S, n) correctness.
        tries: the largest K.
    """
    right = correct.sum(0).astype(np.float64)
    draws = len(correct)
    found = []
    for k in range(1, tries + 1):
        if k > draws:
            found.append(float("nan"))
            continue
        enough = right >= k
        # logarithms, since binomial coefficients of 512 draws overflow
        logs = gammaln(right[enough] + 1) - gammaln(right[enough] - k + 1)
        logs -= gammaln(draws + 1) - gammaln(draws - k + 1)
        found.append(1 - float(np.exp(logs).sum()) / len(right))
    return np.array(found)


def folded_success_within(correct: Bools, tries: int) -> Floats:
    """`success_within` for attacks selected on each half and scored on the other."""
    halves = [success_within(correct[scored], tries) for scored, _ in _halves(len(correct))]
    found: Floats = np.mean(halves, axis=0)
    return found


def pair(
    corrects: Mapping[str, Bools], unaware: Sequence[str], tries: int, seed: int = 0
) -> dict[str, Any]:
    """Unaware and aware accuracy at one threat with intervals, and attack success within K tries.

    Args:
        corrects: (S, n) of every bounded attack and of the clean images, in a fixed order.
        unaware: names of the unaware attacks.
        tries: the largest K.
        seed: of the resamples.
    """
    worst = worst_per_image(np.stack(list(corrects.values())))
    found: dict[str, Any] = dict.fromkeys(FIGURES) | {
        "aware": float(worst.mean()),
        # each half selected the attack by which the other is scored
        "aware_interval": interval(worst, folded=True, seed=seed),
        "aware_interval_draws": draws_interval(worst, folded=True),
        "success_within": folded_success_within(worst, tries).tolist(),
    }
    if unaware:
        lowest = lowest_cell(np.stack([corrects[name] for name in unaware]))
        found |= {
            "unaware": float(lowest.mean()),
            "unaware_interval": interval(lowest, folded=True, seed=seed),
            "unaware_interval_draws": draws_interval(lowest, folded=True),
        }
    return found
