"""Checks that compare attacks: a stronger kind of attack must not be weaker than another."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.checks.check import Check, Records
from redefense.results.accuracy import worst_case

# the other attacks that use scores only are not bounded
BLACK_BOX = frozenset({"square"})


def _pairs(
    cells: Sequence[Mapping[str, Any]], weak: Collection[str]
) -> Iterator[tuple[str, list[str]]]:
    """Each bounded cell of one kind of attack, and the other bounded cells at its threat."""
    bounded = [c for c in cells if c["bounded"]]
    for cell in bounded:
        others = [
            c["id"] for c in bounded if c["attack"] not in weak and c["threat"] == cell["threat"]
        ]
        if cell["attack"] in weak and others:
            yield cell["id"], others


def black_box_is_weaker(
    cells: Sequence[Mapping[str, Any]],
    records: Mapping[str, Records],
    q: Mapping[str, NDArray[np.float64]],
) -> Check:
    """S17, per image: images that only a black-box attack fools indicate masked gradients."""
    pairs = list(_pairs(cells, BLACK_BOX))
    if not pairs:
        return Check("S17", None, "no black-box attack at the threat of a white-box one")
    # black-box attacks run last: images that the others skipped were fooled by the others
    only = sum(
        int(((q[n] < worst_case([q[o] for o in others]) - 1e-9) & records[n].met).sum())
        for n, others in pairs
    )
    return Check("S17", only == 0, f"{only} images fooled more often by a black box alone")


def transfer_is_weaker(
    cells: Sequence[Mapping[str, Any]],
    records: Mapping[str, Records],
    q: Mapping[str, NDArray[np.float64]],
) -> Check:
    pairs = list(_pairs(cells, {"transfer"}))
    if not pairs:
        return Check("S18", None, "no transfer attack to compare with")
    gaps = []
    for name, others in pairs:
        own = records[name].met
        met = np.logical_and.reduce([own, *(records[o].met for o in others)])
        if met.any():
            white, transfer = worst_case([q[o][met] for o in others]), q[name][met]
            gaps.append(float(white.mean() - transfer.mean()) - _tolerance(white, transfer))
        # images that earlier attacks left correct are hard: compare only beyond chance
        before = [o for o in others if records[o].met[own].all()]
        if before and own.any() and not own.all():
            lost = worst_case([q[o] for o in before])[q["clean"] > 0] == 0
            taken = (q[name][own] == 0).astype(float)
            # not paired, since the two sets of images differ
            error = 2 * (taken.std() / len(taken) ** 0.5 + lost.std() / len(lost) ** 0.5)
            gaps.append(float(taken.mean() - lost.mean() - error))
    if not gaps:
        return Check("S18", None, "no image was attacked by both transfer and white-box attacks")
    return Check("S18", max(gaps) <= 0, f"transfer is {100 * max(gaps):+.1f} points stronger than "
                 "white-box attacks, beyond chance" if max(gaps) > 0 else
                 "white-box attacks are at least as strong as transfer")  # fmt: skip


def _mean(q: Mapping[str, NDArray[np.float64]], name: str) -> float:
    return float(q[name].mean())


def _tolerance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Two paired standard errors."""
    # paired: both attacks met the same images
    # the spread of a single image is unknown: no difference is significant
    return 2 * float(np.std(a - b, ddof=1)) / len(a) ** 0.5 if len(a) > 1 else 1.0


def fgsm_is_weaker(
    cells: Sequence[Mapping[str, Any]],
    records: Mapping[str, Records],
    q: Mapping[str, NDArray[np.float64]],
) -> Check:
    single = [c for c in cells if c["attack"] == "fgsm"]
    iterated = [c for c in cells if c["attack"] in ("pgd", "apgd")]
    pairs = [
        (a["id"], b["id"])
        for a in single
        for b in iterated
        if a["threat"] == b["threat"] and a["view"] == b["view"]
    ]
    if not pairs:
        return Check("S16", None, "no single-step attack to compare with")
    bad = []
    for a, b in pairs:
        met = records[a].met & records[b].met
        one, more = q[a][met], q[b][met]
        if met.any() and more.mean() > one.mean() + _tolerance(one, more):
            bad.append(f"{b} > {a}")
    return Check("S16", not bad, "; ".join(bad) or "iterated attacks are not weaker than FGSM")


def aware_is_stronger(
    headline: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    q: Mapping[str, NDArray[np.float64]],
) -> Check:
    threats = [c["threat"] for c in cells if c["aware"] and c["bounded"]]
    aware = [_mean(q, c["id"]) for c in cells if c["aware"] and c["bounded"]]
    unaware = [
        _mean(q, c["id"])
        for c in cells
        if not c["aware"] and c["bounded"] and c["threat"] in threats
    ]
    if not aware or not unaware:
        return Check("S20", None, "needs attacks of both kinds")
    worst = headline["aware"]
    if worst is None:
        return Check("S20", None, "no common threat")
    return Check(
        "S20",
        worst <= min(unaware) + 1e-9,
        f"worst case {100 * worst:.1f} %, strongest unaware attack {100 * min(unaware):.1f} %",
    )
