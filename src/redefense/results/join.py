"""Joins the suites of a run image by image: both headlines and the baselines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from redefense.errors import DataError
from redefense.radius import eps_text
from redefense.results.headline import TRIES, Pair, estimate_of, estimated_headline, joined_headline
from redefense.results.intervals import (
    Estimate,
    accuracy_interval,
    paired_difference,
    success_within,
    wilson,
)
from redefense.results.records import AGREE, Scored, Source, Stored, load_all
from redefense.results.schema import Check, Data, Evaluation, Headline

Budget = tuple[str, float | None]
"""Norm and eps of a threat."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Result:
    """One run at one threat on one set of images. Accuracies are fractions; None is unknown.

    Attributes:
        further: attacks that count for the headline, besides the cells of the suites.
        unaware: lowest exact expected accuracy over the bounded unaware cells.
        aware: mean over images of the lowest expected correctness over all attacks and the clean
            image; both headlines are None without a bounded aware cell.
        single, averaged: the chosen single member and the averaged ensemble, each in its own worst
            case.
        alone: every single member in its own worst case; the best of them may differ from `single`.
        over_single, over_averaged, over_alone: `aware` minus each, paired over images; `over_alone`
            is relative to the best of `alone`.
        q_aware: (n,) expected correctness in each image's worst case.
        fooled: (M + 1,) number of images by the number of members fooled in the worst case.
        tries_aware, tries_unaware: (TRIES,) attack success within K draws.
        notes: remarks on how the figures were obtained.
    """

    name: str
    norm: str
    eps: float | None
    suites: tuple[Stored, ...]
    cells: tuple[Scored, ...]
    further: tuple[Scored, ...]
    clean: Estimate | None
    clean_members: tuple[float, ...]
    unaware: Estimate | None
    unaware_label: str | None
    aware: Estimate | None
    single: Estimate | None
    single_index: int | None
    chosen_on: str | None
    averaged: Estimate | None
    alone: tuple[Estimate, ...]
    over_single: Estimate | None
    over_averaged: Estimate | None
    over_alone: Estimate | None
    q_aware: NDArray[np.float64] | None
    fooled: NDArray[np.int64] | None
    tries_aware: NDArray[np.float64] | None
    tries_unaware: NDArray[np.float64] | None
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        return tuple(stored.evaluation for stored in self.suites)

    @property
    def data(self) -> Data:
        return self.evaluations[0].data

    @property
    def num_images(self) -> int:
        return self.data.num_images

    @property
    def images(self) -> str:
        """The number of images in words, e.g. `500 images` or `500 validation images`."""
        kind = "validation " * (self.data.split == "validation")
        return f"{self.num_images} {kind}images"

    @property
    def stochastic(self) -> Headline | None:
        """The stored headline of a stochastic network; None for other models."""
        return estimated_headline(self.suites)

    @property
    def num_members(self) -> int | None:
        if self.stochastic is not None:
            return None  # draws are not enumerable
        # records first: the stored list of members may be empty
        counts = [len(c.correct) for c in self.cells if c.correct is not None]
        return (counts or [len(self.clean_members) or len(self.alone)])[0] or None

    @property
    def best_alone(self) -> Estimate | None:
        """Accuracy of the best single member, or of the chosen one if only that is known."""
        return max(self.alone, key=lambda estimate: estimate.value, default=self.single)

    @property
    def best_index(self) -> int | None:
        """Index of this member, from 0."""
        best = self.best_alone
        return self.alone.index(best) if self.alone and best is not None else self.single_index

    @property
    def bounded(self) -> tuple[Scored, ...]:
        return tuple(c for c in self.cells if c.cell.bounded)

    @property
    def threat(self) -> str:
        """The budget, e.g. `linf 0.03` or `linf 8/255`."""
        return "threat unknown" if self.eps is None else f"l{self.norm} {eps_text(self.eps)}"

    @property
    def transfer(self) -> tuple[tuple[float | None, ...], ...] | None:
        return next((e.transfer for e in self.evaluations if e.transfer), None)

    @property
    def curve(self) -> tuple[tuple[float, ...], ...] | None:
        return next((e.curve for e in self.evaluations if e.curve), None)

    @property
    def members(self) -> tuple[tuple[str, str], ...]:
        """Similarity of the members and better sampling probabilities, as (name, text)."""
        diversity = next((e.diversity for e in self.evaluations if e.diversity), {})
        best = next((e.best_mixture for e in self.evaluations if e.best_mixture), None)
        facts: list[tuple[str, str]] = []
        for key, value in diversity.items():
            group = value if isinstance(value, dict) else {key: value}
            prefix = f"{key}: " if isinstance(value, dict) else ""
            for name, v in group.items():
                # not defined for every ensemble, and of records that may be damaged
                text = f"{v:.3g}" if isinstance(v, int | float) else "unknown"
                facts.append((prefix + name.replace("_", " "), text))
        if best is not None:
            shares = ", ".join(f"{100 * p:.0f}" for p in best.mixture)
            gain = f"{100 * best.accuracy:.1f} % against {100 * best.present:.1f} %"
            text = f"{shares} % of the draws would give {gain} now; {best.caveat}"
            facts.append(("best sampling probabilities", text))
        return tuple(facts)


def join(sources: Iterable[Source]) -> list[Result]:
    """One result for each run, threat and set of images, in the order of the runs.

    Raises:
        DataError: if a run holds no evaluation or a file is damaged.
    """
    return [result for run in load_all(sources) for result in results_of(run)]


def _budget_of(scored: Scored, stored: Stored) -> tuple[str, float | None]:
    """The threat of a bounded cell; for an unbounded cell that of its suite."""
    threat = scored.cell.threat
    if not scored.cell.bounded or threat is None or threat.eps is None:
        return stored.budget
    # so that 8/255 and its decimal digits are one budget
    return threat.norm, round(threat.eps, 9)


def results_of(run: Sequence[Stored]) -> list[Result]:
    """One result for each threat and set of images of the suites of one run.

    Raises:
        DataError: if suites on the same images are of different weights.
    """
    groups: dict[tuple[object, ...], tuple[Budget, list[Stored], list[Scored]]] = {}
    for stored in run:
        # a suite may have cells at several threats, and one without cells has clean images
        own = {_budget_of(scored, stored): None for scored in stored.cells} or {stored.budget: None}
        for budget in own:
            _, suites, cells = groups.setdefault((stored.images, budget), (budget, [], []))
            suites.append(stored)
            cells.extend(c for c in stored.cells if _budget_of(c, stored) == budget)
    for _, suites, _ in groups.values():
        _check_weights(suites)
    return [_result(*group) for group in groups.values()]


def _check_weights(suites: Sequence[Stored]) -> None:
    # older evaluations did not record their weights
    of = {s.plan.weights: s for s in suites if s.plan is not None and s.plan.weights is not None}
    if len(of) > 1:
        one, other, *_ = of.values()
        raise DataError(
            f"{other.file or other.name} is an evaluation of other weights than "
            f"{one.file or one.name}: their worst cases cannot be joined; give one of them, or "
            "keep them in folders of their own"
        )


def _result(budget: Budget, suites: Sequence[Stored], cells: Sequence[Scored]) -> Result:
    first = suites[0]  # all have the same run and the same images
    at_threat = [stored for stored in suites if stored.budget == budget]
    further = [c for s in suites for c in s.further if _budget_of(c, s) == budget]
    # a suite with another threat of its own may have single cells at this one
    pair = joined_headline(suites, at_threat, cells, further)
    q_aware, q_unaware = pair.q_aware, pair.q_unaware
    points = [c for c in (*(s.clean for s in at_threat), *cells, *further) if c.cell.bounded]
    alone = _alone(at_threat, points)
    single, single_q, single_from = _baseline(at_threat, "single", alone, points)
    averaged, averaged_q, _ = _baseline(at_threat, "averaged", alone, points)
    clean = next((s.clean for s in suites if s.clean.expected is not None), first.clean)
    chosen = single_from.headline if single_from is not None else None
    return Result(
        name=first.name,
        norm=budget[0],
        eps=budget[1],
        suites=tuple(suites),
        cells=tuple(cells),
        further=tuple(further),
        clean=clean.expected,
        clean_members=first.evaluation.clean.per_member,
        unaware=pair.unaware,
        unaware_label=pair.unaware_label,
        aware=pair.aware,
        single=single,
        single_index=chosen.best_single_member_index if chosen is not None else None,
        chosen_on=chosen.chosen_on if chosen is not None else None,
        averaged=averaged,
        alone=_members(at_threat, alone),
        over_single=_over(q_aware, single_q),
        over_averaged=_over(q_aware, averaged_q),
        # the best on these very images: chance in that choice favours the baseline
        over_alone=_over(q_aware, max(alone, key=np.mean, default=None)),
        q_aware=q_aware,
        fooled=pair.fooled,
        # of a stochastic network the stored estimate: there are no expectations per image
        tries_aware=pair.tries if q_aware is None else success_within(q_aware, TRIES),
        tries_unaware=None if q_unaware is None else success_within(q_unaware, TRIES),
        checks=_merged_checks(suites),
        notes=tuple(_notes(pair, at_threat, cells, further)),
    )


def _baseline(
    at_threat: Sequence[Stored],
    which: str,
    alone: Sequence[NDArray[np.float64]],
    points: Sequence[Scored],
) -> tuple[Estimate | None, NDArray[np.float64] | None, Evaluation | None]:
    """The lowest accuracy of the chosen single member or the averaged ensemble in any suite.

    The points that any suite found count for them as they do for the draw.
    """
    found: list[tuple[Estimate, NDArray[np.float64] | None, Evaluation]] = []
    key = {"single": "best_single_member", "averaged": "averaged"}[which]
    for stored in at_threat:
        per_image: NDArray[np.float64] | None = getattr(stored, which)
        headline = stored.evaluation.headline or Headline()
        summary = estimate_of(getattr(headline, key), getattr(headline, f"{key}_interval"))
        if per_image is not None:
            index = headline.best_single_member_index
            if which == "averaged":
                each = [_answered(c, c.averaged) for c in points if c.averaged is not None]
                per_image = np.min([per_image, *each], axis=0)
            elif index is not None and index < len(alone):
                per_image = np.minimum(per_image, alone[index])
            found.append((accuracy_interval(per_image), per_image, stored.evaluation))
        elif summary is not None:
            found.append((summary, None, stored.evaluation))
    # each suite has an upper bound of its worst case: the lowest is the nearest
    return min(found, key=lambda entry: entry[0].value, default=(None, None, None))


def _answered(scored: Scored, right: NDArray[Any]) -> NDArray[np.float64]:
    """Correctness at the points of an attack; 1 on images that it skipped, which say nothing."""
    met = True if scored.met is None else scored.met
    found: NDArray[np.float64] = np.where(met, right, 1.0).astype(np.float64)
    return found


def _alone(at_threat: Sequence[Stored], points: Sequence[Scored]) -> Sequence[NDArray[np.float64]]:
    """(n,) correctness of every member over all points, if a suite attacked all members alone."""
    found = [stored.alone for stored in at_threat if stored.alone is not None]
    if not found:
        return []
    # draws of a network are no members
    found += [
        _answered(c, c.correct)
        for c in points
        if c.correct is not None and c.correct.shape == found[0].shape
    ]
    return list(np.min(found, axis=0))


def _members(
    at_threat: Sequence[Stored], alone: Sequence[NDArray[np.float64]]
) -> tuple[Estimate, ...]:
    """Accuracy of every single member, from its records or else as stored."""
    if alone:
        return tuple(map(accuracy_interval, alone))
    headlines = [stored.evaluation.headline or Headline() for stored in at_threat]
    stored = [h.single_members for h in headlines if h.single_members]
    n = at_threat[0].evaluation.data.num_images if at_threat else 0
    lowest = np.min(stored, axis=0).tolist() if stored else []
    # a single member is right or wrong on an image: its accuracy is a count
    return tuple(Estimate(share, *wilson(round(share * n), n)) for share in lowest)


def _over(q: NDArray[np.float64] | None, other: NDArray[np.float64] | None) -> Estimate | None:
    return None if q is None or other is None else paired_difference(q, other)


def _merged_checks(suites: Sequence[Stored]) -> tuple[Check, ...]:
    """One entry per check, which fails if it fails in any suite."""
    # red in any suite is red; a check that did not run says nothing
    rank = {False: 0, True: 1, None: 2}
    checks: dict[str, Check] = {}
    for stored in suites:
        for check in stored.evaluation.checks:
            before = checks.get(check.id)
            if before is None or rank[check.passed] < rank[before.passed]:
                checks[check.id] = check
    return tuple(checks[key] for key in sorted(checks))


_KEEP: Final = (
    "They are in a folder next to the evaluation's JSON file: copy both, or in Python write both "
    "with `report.save(DIR)`."
)


def _vote(headline: Headline) -> str:
    if headline.vote is None or headline.vote_interval is None:
        return ""
    low, high = headline.vote_interval
    return (
        f" Under attack the majority of {headline.averaged_draws} draws is right and clear on "
        f"{100 * headline.vote:.1f} % of the images ({100 * low:.1f} to {100 * high:.1f} %); the "
        "average is that of as many draws."
    )


def _drawn_note(headline: Headline) -> str:
    ends = headline.aware_interval_draws
    known = "" if ends is None else (
        f"On these images the 95 % interval of the aware figure over the draws is "
        f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %. "
    )  # fmt: skip
    return (
        "The network draws in its forward pass, and its draws cannot be enumerated: all figures "
        f"are estimates from {headline.draws} fresh draws, which no attack used. {known}They are "
        "upper bounds of the robust accuracy, on the points that the attacks found."
        f"{_vote(headline)}"
    )


def _missing(bounded: Sequence[Scored], further: Sequence[Scored]) -> str:
    which, kind = bounded, "attacks"
    if all(c.q is not None for c in bounded):
        which, kind = further, "further attacks"
    count = sum(c.q is None for c in which)
    return f"The per-image records of {count} of {len(which)} {kind} are missing"


def _notes(
    pair: Pair, at_threat: Sequence[Stored], cells: Sequence[Scored], further: Sequence[Scored]
) -> list[str]:
    notes = []
    bounded = [c for c in cells if c.cell.bounded]
    if (drawn := estimated_headline(at_threat)) is not None:
        notes.append(_drawn_note(drawn))
    if not any(c.cell.aware for c in bounded):
        notes.append(
            "No aware attack was run at this threat, so there is no headline: accuracy under "
            "unaware attacks alone is no claim of robustness for a randomized defence."
        )
    elif drawn is not None:
        pass
    elif pair.aware is None:
        notes.append(f"{_missing(bounded, further)}, so the suites cannot be joined. {_KEEP}")
    elif pair.q_aware is None:
        notes.append(
            f"{_missing(bounded, further)}: the headline is the one the suite stored. {_KEEP}"
        )
    if any(not c.whole for c in bounded):
        notes.append(
            "Attacks without an accuracy ran only on images that some member still classified "
            "correctly; their points are part of the worst case."
        )
    if len(at_threat) == 1 and len({c.suite for c in cells}) == 1 and pair.q_aware is not None:
        stored = at_threat[0].evaluation.headline
        if stored is not None and stored.aware is not None and pair.aware is not None:
            # records of another evaluation, or a figure that was edited
            gap = abs(stored.aware - pair.aware.value)
            if gap > AGREE:
                notes.append(
                    f"The suite stored an aware accuracy of {100 * stored.aware:.2f} %; its "
                    f"per-image records give {100 * pair.aware.value:.2f} %, which is shown."
                )
    return notes
