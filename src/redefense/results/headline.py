"""Both headlines of the suites of a run: from records of images, from draws, or as stored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.results.draws import pair
from redefense.results.intervals import Estimate, accuracy_interval, fooled_histogram
from redefense.results.records import AGREE, Scored, Stored
from redefense.results.schema import Headline

TRIES = 10
"""The largest K of the success within K draws."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pair:
    """The unaware and the aware accuracy, and the records from which they were computed.

    Attributes:
        q_aware, q_unaware: (n,) expected correctness of each image.
        fooled: (M + 1,) number of images by the number of members fooled in the worst case.
        tries: (TRIES,) stored success of an aware attack within K draws.
    """

    unaware: Estimate | None = None
    unaware_label: str | None = None
    aware: Estimate | None = None
    q_aware: NDArray[np.float64] | None = None
    q_unaware: NDArray[np.float64] | None = None
    fooled: NDArray[np.int64] | None = None
    tries: NDArray[np.float64] | None = None


def joined_headline(
    suites: Sequence[Stored],
    at_threat: Sequence[Stored],
    cells: Sequence[Scored],
    further: Sequence[Scored],
) -> Pair:
    """Both headlines at one threat.

    Args:
        suites: those with cells at this threat.
        at_threat: those whose own threat it is.
        cells: attacks at this threat.
        further: attacks at this threat besides the cells.
    """
    # draws first: a minimum over their records, as for members, would be biased down
    return (
        _drawn_headline(at_threat, cells, further)
        or _recorded_headline(suites, cells, further)
        or _stored_headline(suites, at_threat, cells)
    )


def estimated_headline(suites: Sequence[Stored]) -> Headline | None:
    """The lowest headline among suites whose figures are estimates from draws."""
    found = [s.evaluation.headline for s in suites if s.evaluation.stochastic]
    known = [headline for headline in found if headline is not None]
    return min(known, key=lambda h: math.inf if h.aware is None else h.aware, default=None)


def _drawn_headline(
    suites: Sequence[Stored], cells: Sequence[Scored], further: Sequence[Scored]
) -> Pair | None:
    """The stored estimates of a suite, or joined estimates of several suites.

    For suites that cannot be joined the lowest figures are returned.
    """
    headline = estimated_headline(suites)
    if headline is None:
        return None
    if (joined := _joined_draws(suites, cells, further)) is not None and (
        headline.aware is None or joined["aware"] <= headline.aware
    ):
        headline = Headline.model_validate(joined)
    tries = headline.success_within
    return Pair(
        unaware=estimate_of(headline.unaware, headline.unaware_interval),
        aware=estimate_of(headline.aware, headline.aware_interval),
        tries=None if tries is None else np.array(tries),
    )


def _joined_draws(
    suites: Sequence[Stored], cells: Sequence[Scored], further: Sequence[Scored]
) -> dict[str, Any] | None:
    """Both figures over the attacks of all suites; None unless all were scored by the same draws.

    The draws are derived from the seed of the evaluation. Older versions did not store attacks
    besides the cells, so their evaluations cannot be joined.
    """
    bounded = [c for c in cells if c.cell.bounded]
    every = [*bounded, *further]
    # as text: a damaged record may hold anything
    same = {(repr(s.evaluation.provenance.get("seed")), s.evaluation.stochastic) for s in suites}
    clean = suites[0].clean.correct
    if len(suites) < 2 or len(same) > 1 or clean is None or not all(s.further for s in suites):
        return None
    # draws are paired by their row, so all need the same number of them
    known = [c.correct for c in every if c.correct is not None]
    if len(known) < len(every) or {len(c) for c in known} != {len(clean)}:
        return None
    corrects = {f"{c.suite} {c.cell.id}": k for c, k in zip(every, known, strict=True)}
    unaware = [f"{c.suite} {c.cell.id}" for c in bounded if not c.cell.aware]
    seed = suites[0].evaluation.provenance.get("seed")
    return pair(corrects | {"clean": clean}, unaware, TRIES, seed if isinstance(seed, int) else 0)


def _recorded_headline(
    suites: Sequence[Stored], cells: Sequence[Scored], further: Sequence[Scored]
) -> Pair | None:
    """Both headlines from per-image records; None if records of a bounded attack are missing.

    Images that an attack skipped have their earlier worst case in its records, so that the minimum
    over all records is the worst case.
    """
    bounded = [c for c in cells if c.cell.bounded]
    if not bounded or any(c.q is None for c in (*bounded, *further)):
        return None
    # unaware attacks alone are no claim of robustness for a randomized defence
    if not any(c.cell.aware for c in bounded):
        return Pair()
    clean = [s.clean for s in suites if s.clean.q is not None][:1]
    scored = [(c, c.q, c.correct) for c in [*bounded, *further, *clean]]
    qs = np.stack([q for _, q, _ in scored if q is not None])
    worst = qs.argmin(0)
    # (M, n): the members' correctness under each image's worst attack
    correct = np.stack([c for _, _, c in scored if c is not None])[worst, :, np.arange(len(worst))]
    unaware = [i for i, c in enumerate(bounded) if not c.cell.aware]
    known = Pair(
        aware=accuracy_interval(qs.min(0)), q_aware=qs.min(0), fooled=fooled_histogram(correct.T)
    )
    if not unaware:
        return known
    lowest = min(unaware, key=lambda i: float(qs[i].mean()))
    return replace(
        known,
        unaware=accuracy_interval(qs[lowest]),
        unaware_label=bounded[lowest].label,
        q_unaware=qs[lowest],
    )


def estimate_of(value: float | None, interval: tuple[float, float] | None) -> Estimate | None:
    if value is None:
        return None
    return Estimate(value, *interval) if interval is not None else Estimate(value)


def _stored_headline(
    suites: Sequence[Stored], at_threat: Sequence[Stored], cells: Sequence[Scored]
) -> Pair:
    """The stored headline of a single suite, used without per-image records."""
    # headlines of several suites cannot be joined: a worst case per image needs records
    headline = at_threat[0].evaluation.headline if len(suites) == len(at_threat) == 1 else None
    if headline is None:
        return Pair()
    unaware = headline.unaware
    # it is the accuracy of one cell and has that cell's interval
    found = [
        (c.expected, c.label)
        for c in cells
        if c.cell.bounded and not c.cell.aware and c.expected is not None
        if unaware is not None and abs(c.expected.value - unaware) <= AGREE
    ]
    estimate, label = next(iter(found), (estimate_of(unaware, None), None))
    return Pair(
        unaware=estimate,
        unaware_label=label,
        aware=estimate_of(headline.aware, headline.aware_interval),
    )
