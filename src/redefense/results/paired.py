"""Paired differences of two runs over the same images, under the attacks that both met."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from redefense.results.intervals import Estimate, paired_difference
from redefense.results.join import Result
from redefense.results.records import Scored

Values = NDArray[np.float64]

Attack = tuple[str, str, str]
"""Name, view and repr: equal for equal attacks on different models."""


class Met(NamedTuple):
    """Expected correctness (n,) under an attack, and the images it met; None: unknown, or all."""

    q: Values | None
    met: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Records:
    """The per-image records of one run at one threat.

    Attributes:
        clean: (n,) expected correctness without an attack.
        attacks: the bounded attacks; `aware`, those that know how a member is drawn.
        lowest: (n,) expected correctness in each image's worst case over everything that was run.
    """

    clean: Values | None
    attacks: Mapping[Attack, Met]
    aware: Collection[Attack]
    lowest: Values | None


class Gain(NamedTuple):
    """A paired difference in the worst case.

    Attributes:
        attacks: number of common attacks; None if neither run met any other.
        images: number of images on which both worst cases are known; None for all.
    """

    estimate: Estimate
    attacks: int | None
    images: int | None


def least(clean: Values | None, attacks: Sequence[Met]) -> Values | None:
    """Per image, the lowest correctness over the clean image and some attacks.

    NaN where it is unknown: one of the attacks skipped the image, since an attack that is not among
    them had fooled it. None without attacks, or if the records of one are missing.
    """
    if not attacks or clean is None:
        return None
    lowest, known = clean, np.ones(len(clean), dtype=bool)
    for q, met in attacks:
        if q is None:
            return None
        reached = np.ones_like(known) if met is None else met
        lowest, known = np.where(reached, np.minimum(lowest, q), lowest), known & reached
    # no other attack can lower 0
    return np.where(known | (lowest == 0), lowest, np.nan)


def worst_case_gain(one: Records, other: Records) -> Gain | None:
    """One run minus another in the worst case over the attacks that both met.

    None if records are missing or no common attack is aware: without one the figure is no claim of
    robustness.
    """
    mine, theirs = one.lowest, other.lowest
    if mine is None or theirs is None:
        return None
    common = one.attacks.keys() & other.attacks.keys()
    if one.attacks.keys() == other.attacks.keys():
        return Gain(paired_difference(mine, theirs), None, None)
    if not common & set(one.aware):
        return None
    mine, theirs = (least(it.clean, [it.attacks[key] for key in common]) for it in (one, other))
    if mine is None or theirs is None:
        return None
    # images that only other attacks fooled were not attacked by all common ones
    known = ~np.isnan(mine) & ~np.isnan(theirs)
    if not known.any():
        return None
    images = None if known.all() else int(known.sum())
    return Gain(paired_difference(mine[known], theirs[known]), len(common), images)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Difference:
    """A run minus a reference on the same images.

    Attributes:
        worst: in the worst case over the attacks that both met.
        each: under every bounded attack that both met on all images, by its label.
    """

    run: Result
    reference: Result
    clean: Estimate
    worst: Gain | None
    each: Mapping[str, Estimate]


def differences(results: Iterable[Result]) -> list[Difference]:
    """Every run minus the first one at the same threat on the same images.

    Runs without per-image records have none.
    """
    first: dict[object, tuple[Result, Records]] = {}
    found = []
    for result in results:
        records = records_of(result)
        if records.clean is None:
            continue
        key = (result.suites[0].images, result.norm, result.eps)
        reference, base = first.setdefault(key, (result, records))
        if reference is result:
            continue
        labels = {_key(c): c.label for c in reference.bounded}
        each = {
            labels[key]: paired_difference(mine.q, theirs.q)
            for key, mine in records.attacks.items()
            if (theirs := base.attacks.get(key)) is not None
            and mine.q is not None
            and theirs.q is not None
            # an attack that skipped fooled images met other images of each run
            and mine.met is None
            and theirs.met is None
        }
        assert base.clean is not None
        found.append(
            Difference(
                run=result,
                reference=reference,
                clean=paired_difference(records.clean, base.clean),
                worst=worst_case_gain(records, base),
                each=each,
            )
        )
    return found


def records_of(result: Result) -> Records:
    """The records of a joined result."""
    # of an attack of several suites the records over all images, if there are any
    cells = sorted(result.bounded, key=lambda c: c.whole)
    return Records(
        clean=next((s.clean.q for s in result.suites if s.clean.q is not None), None),
        attacks={_key(c): _met(c) for c in cells},
        aware={_key(c) for c in cells if c.cell.aware},
        lowest=result.q_aware,
    )


def _met(scored: Scored) -> Met:
    if scored.whole:
        return Met(scored.q)
    return Met(None if scored.met is None else scored.q, scored.met)


def _key(scored: Scored) -> Attack:
    return scored.cell.attack, scored.cell.view, scored.cell.repr
