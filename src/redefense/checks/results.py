"""Sanity checks of an evaluation's records, each with a pass or a fail and its figure.

A failed check means that a figure of this evaluation may be wrong or may favour the defence.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.checks.check import Check, Records
from redefense.checks.comparisons import (
    aware_is_stronger,
    black_box_is_weaker,
    fgsm_is_weaker,
    transfer_is_weaker,
)
from redefense.results.accuracy import protocol, worst_case
from redefense.results.intervals import exact_expectation, paired_difference
from redefense.rng import PROTOCOL_DRAWS, protocol_draws

GAP_POINTS = 5.0


def after_run(
    data: Mapping[str, Any],
    records: Mapping[str, Records],
    mixture: NDArray[np.float64],
    *,
    worst: NDArray[np.float64] | None = None,
    single: NDArray[np.bool_] | None = None,
    log: float | None = None,
) -> list[Check]:
    """Checks of the records.

    Two attacks are compared on the images that both attacked.

    Args:
        data: the evaluation so far.
        records: of every cell, of all further attacks, and "clean".
        mixture: (M,) sampling probabilities.
        worst: (n,) expected correctness in each image's worst case; None without a headline.
        single: (n,) correctness of the chosen single member in its own worst case.
        log: clean validation accuracy minus the one in the training log.
    """
    cells: Sequence[Mapping[str, Any]] = data["cells"]
    q = {name: exact_expectation(record.correct, mixture) for name, record in records.items()}
    return [
        inside_ball(cells, records),
        _as_logged(log),
        _curve_falls(data.get("curve")),
        fgsm_is_weaker(cells, records, q),
        black_box_is_weaker(cells, records, q),
        transfer_is_weaker(cells, records, q),
        aware_is_stronger(data["headline"], cells, q),
        _worst_is_lowest(data, q),
        inert(cells),
        _draws_agree(cells, len(q["clean"])),
        _draws_repeat(cells, records, mixture),
        _ordering(cells),
        unchanged(cells, records, q["clean"]),
        gap_of_headlines(data["headline"], len(mixture)),
        _no_better_than_clean(cells, q),
        _helps(worst, single, mixture, data["headline"].get("single_members")),
        _bounds(data["headline"], cells, q, mixture),
    ]


def _as_logged(log: float | None) -> Check:
    if log is None:
        return Check("S03", None, "no training log to compare with")
    # 0.1 points, for rounding in another precision or on another device
    return Check("S03", abs(log) <= 1e-3, f"clean accuracy differs by {100 * log:+.2f} points")


def _curve_falls(curve: Sequence[Sequence[float]] | None) -> Check:
    if not curve:
        return Check("S11", None, "accuracy against eps was not measured")
    values = [row[1] for row in curve]
    falls = all(a >= b for a, b in itertools.pairwise(values))
    end = f"{100 * values[-1]:.1f} % at eps {curve[-1][0]:.3g}"
    return Check(
        "S11", falls and values[-1] == 0, f"{'falls to' if falls else 'rises, then'} {end}"
    )


def inert(cells: Sequence[Mapping[str, Any]]) -> Check:
    """S07b: the published CW margin is constant on outputs that are all <= 0."""
    bad = [
        cell["id"]
        for cell in cells
        # only this view returns log-probabilities, which are never positive
        if (cell["attack"], cell["view"]) == ("cw", "averaged")
        and "preset=None" not in cell["repr"]
    ]
    detail = "the published CW margin is always 0 on log-probabilities: " + ", ".join(bad)
    return Check("S07b", not bad, detail if bad else "no CW margin is always 0")


def _draws_repeat(
    cells: Sequence[Mapping[str, Any]], records: Mapping[str, Records], mixture: NDArray[np.float64]
) -> Check:
    """S32: draws of two seeds differ by no more than independent draws of a member."""
    bad = []
    for cell in cells:
        correct = records[cell["id"]].correct
        q = exact_expectation(correct, mixture)
        draws = (protocol_draws(mixture, len(q), seed, f"S32 {cell['id']}") for seed in (0, 1))
        one, other = (protocol(correct, drawn)[0] for drawn in draws)
        # means of five draws each; plus one image, since the normal approximation needs many
        bound = 3 * float((q * (1 - q)).sum() * 2 / PROTOCOL_DRAWS) ** 0.5 / len(q) + 1 / len(q)
        if abs(one - other) > bound + 1e-9:
            bad.append(f"{cell['id']} {100 * abs(one - other):.2f} points")
    return Check("S32", not bad, "; ".join(bad) or "two seeds of draws agree within chance")


def _no_better_than_clean(
    cells: Sequence[Mapping[str, Any]], q: Mapping[str, NDArray[np.float64]]
) -> Check:
    bad = {
        c["id"]: int((q[c["id"]] > q["clean"] + 1e-9).sum())
        for c in cells
        # attacks that are given all members return the clean image if no point is better
        if c["aware"] and c["bounded"] and c["view"] == "members"
    }
    if not bad:
        return Check("S37", None, "no attack that returns its best point")
    return Check(
        "S37", not any(bad.values()),
        f"{sum(bad.values())} images are more often correct after an aware attack than before",
    )  # fmt: skip


SEARCH_LUCK = 0.01
"""Share of images by which equal attacks from other starts differed (copies, trained on digits)."""


def _bounds(
    headline: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    q: Mapping[str, NDArray[np.float64]],
    mixture: NDArray[np.float64],
) -> Check:
    """B1, bounds by single members: sum_m p_m A_m <= aware <= 1 - max_m p_m (1 - A_m).

    A_m is the accuracy of member m in its own worst case. Every point counts for the ensemble and
    for each member, so this holds exactly. The suite's cells alone may exceed the upper bound by
    chance; if they exceed it by more, an attack on one member is stronger than those on all.
    """
    alone, aware = headline.get("single_members"), headline["aware"]
    if aware is None or alone is None or len(mixture) == 1:
        why = "nothing is drawn" if len(mixture) == 1 else "this suite attacks no single member"
        return Check("B1", None, why if aware is not None else "no headline")
    low = float(mixture @ np.array(alone))
    high = 1 - float((mixture * (1 - np.array(alone))).max())
    message = (
        f"aware {100 * aware:.1f} %, single members allow {100 * low:.1f} to {100 * high:.1f} %"
    )
    own = float(worst_case([q["clean"], *(q[name] for name in _of_headline(cells))]).mean())
    # one image, or what equal attacks differ by through their starts
    slack = max(1 / len(q["clean"]), SEARCH_LUCK)
    if own > high + slack:
        message += f"; the suite's own cells give {100 * own:.1f} %: an attack on one member "
        message += "is stronger than those on all"
    return Check("B1", low - 1e-9 <= aware <= high + 1e-9 and own <= high + slack, message)


def _of_headline(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The bounded cells at the threat of the aware ones."""
    threats = [c["threat"] for c in cells if c["aware"] and c["bounded"]]
    return [c["id"] for c in cells if c["bounded"] and c["threat"] in threats]


def _worst_is_lowest(data: Mapping[str, Any], q: Mapping[str, NDArray[np.float64]]) -> Check:
    """S21: the stated worst case equals the mean of per-image minima in the records.

    Images that an attack skipped count in its records as fooled, or with their earlier worst case.
    """
    stated, cells = data["headline"]["aware"], data["cells"]
    if stated is None:
        return Check("S21", None, "no headline")
    same = [*_of_headline(cells), *(c["id"] for c in data.get("further_cells", ()))]
    worst = float(worst_case([q["clean"], *(q[name] for name in same)]).mean())
    return Check(
        "S21",
        abs(worst - stated) < 1e-9,
        f"minimum per image over {len(same)} attacks: {100 * worst:.1f} %",
    )


def inside_ball(cells: Sequence[Mapping[str, Any]], records: Mapping[str, Records]) -> Check:
    """S01: stored norms lie within the budget; box and ball were verified after each attack."""
    bounded = [c for c in cells if c["bounded"]]
    outside = [
        c["id"]
        for c in bounded
        if getattr(records[c["id"]], "linf" if c["threat"]["norm"] == "inf" else "l2").max()
        > c["threat"]["eps"] + 1e-5
    ]
    return Check("S01", not outside, ", ".join(outside) or f"{len(bounded)} cells inside the ball")


def _draws_agree(cells: Sequence[Mapping[str, Any]], count: int) -> Check:
    """S31: five protocol draws of n images agree with the expectation to three standard errors."""
    bad = []
    for cell in cells:
        accuracy = cell["accuracy"]
        # a draw is correct with probability q_i: its variance is at most 1/4
        bound = 3 * 0.5 / (5 * count) ** 0.5
        if abs(accuracy["protocol"] - accuracy["expected"]) > bound:
            bad.append(cell["id"])
    return Check("S31", not bad, "protocol draws agree with exact expectations" if not bad else
                 f"draws and expectation differ in {', '.join(bad)}")  # fmt: skip


def _ordering(cells: Sequence[Mapping[str, Any]]) -> Check:
    bad = []
    for cell in cells:
        a = cell["accuracy"]
        chain = [a["all"], a["worst_member"], a["expected"], a["best_member"], a["any"]]
        if any(low > high + 1e-9 for low, high in itertools.pairwise(chain)):
            bad.append(cell["id"])
    return Check("S33", not bad, ", ".join(bad) or "all <= worst <= expected <= best <= any")


def unchanged(
    cells: Sequence[Mapping[str, Any]], records: Mapping[str, Records], clean: NDArray[np.float64]
) -> Check:
    shares = {}
    for c in cells:
        if c["bounded"] and c["threat"]["eps"] > 0:
            # an image that all members misclassify needs no perturbation
            record = records[c["id"]]
            worth = (clean > 0) & record.met
            shares[c["id"]] = float((record.linf[worth] <= 1e-6).mean()) if worth.any() else 0.0
    bad = [f"{name} {100 * share:.0f} %" for name, share in shares.items() if share > 0]
    return Check("S34", not bad, "returned unchanged: " + (", ".join(bad) or "none"))


def gap_of_headlines(headline: Mapping[str, Any], num_members: int) -> Check:
    unaware, aware = headline["unaware"], headline["aware"]
    if unaware is None or aware is None or num_members == 1:
        return Check("S36", None, "no pair of headlines" if num_members > 1 else "nothing is drawn")
    gap = 100 * (unaware - aware)
    return Check(
        "S36",
        gap <= GAP_POINTS,
        f"accuracy under all aware attacks is {gap:.1f} points below that under the strongest "
        f"unaware attack (flag above {GAP_POINTS:g})",
    )


def _helps(
    worst: NDArray[np.float64] | None,
    single: NDArray[np.bool_] | None,
    mixture: NDArray[np.float64],
    members: Sequence[float] | None,
) -> Check:
    """S38: sampled ensemble above each single member, each in its own worst case, paired."""
    if worst is None or single is None or len(mixture) == 1:
        why = "nothing is drawn" if len(mixture) == 1 else "no single member to compare with"
        return Check("S38", None, why)
    gain = paired_difference(worst, single.astype(np.float64))
    assert gain.low is not None
    assert gain.high is not None
    lowest = float(worst.mean())
    strongest = max(members or [float(single.mean())])
    return Check(
        "S38",
        gain.low > 0 and lowest > strongest,
        f"each in its own worst case: sampled {100 * lowest:.1f} %, chosen single member "
        f"{100 * single.mean():.1f} %; gain {100 * gain.value:+.1f} points, 95 % interval "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]; best single member "
        f"{100 * strongest:.1f} %",
    )
