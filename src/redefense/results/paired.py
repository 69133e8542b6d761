"""Paired differences of two runs over the same images, under the attacks that both met."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redefense.results.intervals import Estimate, paired_difference
from redefense.results.join import Result
from redefense.results.records import Scored
from redefense.results.schema import suite_version

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
        lowest: (n,) expected correctness in each image's worst case over everything that was run,
            the repeats of attacks and the attacks of checks and baselines among it.
        protocol: name, version, seeds and checks of each suite: of runs with the same ones `lowest`
            is over the same kinds of further attacks. None if they are unknown.
    """

    clean: Values | None
    attacks: Mapping[Attack, Met]
    aware: Collection[Attack]
    lowest: Values | None
    protocol: Sequence[object] | None


class Gain(NamedTuple):
    """A paired difference in the worst case, over all images.

    Attributes:
        estimate: None if it is unknown.
        attacks: number of common attacks; None if neither run met any other.
        unknown: why there is no estimate, for a table.
    """

    estimate: Estimate | None
    attacks: int | None = None
    unknown: str = ""


NO_AWARE: Final = "no aware attack of both"
NO_RECORDS: Final = "no worst case of single images"


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


def alike(runs: Iterable[Records]) -> bool:
    """Whether runs met the same attacks under the same protocol, so that `lowest` is comparable."""
    first, *others = runs
    return first.protocol is not None and all(
        it.attacks.keys() == first.attacks.keys() and it.protocol == first.protocol for it in others
    )


def worst_case_gain(one: Records, other: Records) -> Gain:
    """One run minus another in the worst case over the attacks that both met.

    It is unknown if no common attack is aware, since the figure would be no claim of robustness; if
    records are missing or are those of draws; and if the worst case of some image is unknown. An
    image is not left out: it is one on which an attack of one run alone had fooled every member, so
    that without it this run would seem stronger.
    """
    common = one.attacks.keys() & other.attacks.keys()
    if not common & set(one.aware):
        return Gain(None, unknown=NO_AWARE)
    mine, theirs = one.lowest, other.lowest
    # of a network that draws `lowest` is None: a minimum over its estimates would be biased down
    if mine is None or theirs is None:
        return Gain(None, unknown=NO_RECORDS)
    if alike((one, other)):
        return Gain(paired_difference(mine, theirs))
    mine, theirs = (least(it.clean, [it.attacks[key] for key in common]) for it in (one, other))
    if mine is None or theirs is None:
        return Gain(None, unknown=NO_RECORDS)
    if skipped := int((np.isnan(mine) | np.isnan(theirs)).sum()):
        return Gain(None, unknown=f"unknown: an attack of both skipped {skipped} images")
    return Gain(paired_difference(mine, theirs), len(common))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Difference:
    """A run minus a reference on the same images.

    Attributes:
        worst: in the worst case over the attacks that both met.
        each: under every bounded attack that both met on all images.
    """

    run: Result
    reference: Result
    clean: Estimate
    worst: Gain
    each: Mapping[Attack, Estimate]


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
        each = {
            key: paired_difference(mine.q, theirs.q)
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


def attacks_of(found: Sequence[Difference]) -> dict[Attack, str]:
    """Distinct names of the attacks with a difference, in the order of the evaluations.

    The suite, and if needed the settings, are given for attacks with equal labels.
    """
    cells = {
        key: cell for it in found for cell in it.reference.bounded if (key := _key(cell)) in it.each
    }
    names = {key: cell.label for key, cell in cells.items()}
    words = (lambda c: f"suite {c.suite}", lambda c: c.cell.repr, lambda c: c.cell.view)
    for word in words:
        count = Counter(names.values())
        names = {
            key: name if count[name] == 1 else f"{name}, {word(cells[key])}"
            for key, name in names.items()
        }
    return names


def records_of(result: Result) -> Records:
    """The records of a joined result."""
    # of an attack of several suites the records over all images, if there are any
    cells = sorted(result.bounded, key=lambda c: c.whole)
    return Records(
        clean=next((s.clean.q for s in result.suites if s.clean.q is not None), None),
        attacks={_key(c): _met(c) for c in cells},
        aware={_key(c) for c in cells if c.cell.aware},
        lowest=result.q_aware,
        protocol=protocol(result),
    )


def protocol(result: Result) -> Sequence[object] | None:
    """Name, version, seeds and checks of each suite; None if one has no stored settings."""
    plans = [(stored.evaluation.suite, stored.plan) for stored in result.suites]
    known = [
        (name, suite_version(plan.suite), plan.seeds, plan.checks)
        for name, plan in plans
        if plan is not None
    ]
    return sorted(known) if len(known) == len(plans) else None


def _met(scored: Scored) -> Met:
    if scored.whole:
        return Met(scored.q)
    return Met(None if scored.met is None else scored.q, scored.met)


def _key(scored: Scored) -> Attack:
    return scored.cell.attack, scored.cell.view, scored.cell.repr
