"""Accuracies of a randomized ensemble from the (M, n) matrix of its members' correctness.

c[j, i] is the correctness of member j on image i and p are the sampling probabilities. The exact
expected correctness of image i is q_i = sum_j p_j c[j, i], which is enumerated, not sampled.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from redefense.results.intervals import exact_expectation

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def protocol(correct: Bools, drawn: Ints) -> tuple[float, float]:
    """Mean and sd of accuracy over fresh draws of a member per image: the published protocol.

    Args:
        correct: (M, n) of the members; the adversarial images stay the same.
        drawn: (K, n) member that answers each image, in each of K draws; see `rng.protocol_draws`.
    """
    each = correct[drawn, np.arange(correct.shape[1])].mean(1)
    return float(each.mean()), float(each.std(ddof=1))


def accuracies(correct: Bools, averaged: Bools, mixture: Floats, drawn: Ints) -> dict[str, float]:
    """Every accuracy that one cell reports, as fractions; `drawn` as in `protocol`."""
    mean, sd = protocol(correct, drawn)
    # a member that is never drawn must be neither the worst nor the best
    answering = correct[mixture > 0]
    members = answering.mean(1)
    return {
        "protocol": mean,
        "protocol_sd": sd,
        "expected": float(exact_expectation(correct, mixture).mean()),
        "averaged": float(averaged.mean()),
        "worst_member": float(members.min()),
        "best_member": float(members.max()),
        "any": float(answering.any(0).mean()),
        "all": float(answering.all(0).mean()),
    }


def worst_case(per_attack: Sequence[Floats]) -> Floats:
    """(n,) lowest expected correctness of each image over all attacks: the minimum per image."""
    lowest: Floats = np.minimum.reduce(list(per_attack))
    return lowest


def pair_statistics(correct: Bools) -> dict[str, float | None]:
    """Means over member pairs, from correctness (M, n); None for a single member.

    disagreement: share of images on which exactly one of two is correct. double_fault: both wrong.
    q_statistic: Yule's Q, from -1 (errors exclude each other) to 1 (same errors); None where it is
    0 / 0 for every pair. overlap: Jaccard index of the images each gets wrong.
    """
    keys = ("disagreement", "double_fault", "q_statistic", "overlap")
    values: dict[str, list[float]] = {key: [] for key in keys}
    for i in range(len(correct)):
        for j in range(i + 1, len(correct)):
            a, b = correct[i], correct[j]
            both, neither = float((a & b).mean()), float((~a & ~b).mean())
            only_a, only_b = float((a & ~b).mean()), float((~a & b).mean())
            values["disagreement"].append(only_a + only_b)
            values["double_fault"].append(neither)
            same, other = both * neither, only_a * only_b
            if same + other > 0:
                values["q_statistic"].append((same - other) / (same + other))
            if both < 1:  # otherwise neither has an error that could overlap
                values["overlap"].append(neither / (neither + only_a + only_b))
    return {key: float(np.mean(v)) if v else None for key, v in values.items()}


def degenerate_members(
    accuracies: Sequence[float], mixture: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Members with positive probability and less than half the accuracy of the best member.

    Args:
        accuracies: of every member, on the same clean images.
        mixture: (M,) sampling probabilities; None counts all members.
    """
    # penalties on input gradients can make a member constant, which has a gradient of zero
    weak = [m for m, value in enumerate(accuracies) if 2 * value < max(accuracies)]
    return tuple(m for m in weak if not mixture or mixture[m] > 0)
