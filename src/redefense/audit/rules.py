"""Audit rules about figures: contradictions within a table of robust accuracies.

Each rule takes all claims about one method and yields its findings. Tolerances allow for chance: a
few tenths of a point for random starts, two images, one unit of the last stated digit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import MappingProxyType
from typing import Final

from redefense.audit import rules_stated as stated
from redefense.audit.attack_names import (
    BLACK_BOX,
    GRADIENT,
    HEADLINES,
    ITERATIVE,
    MINIMAL,
    WHITE_BOX,
    averages,
    squeezed,
    steps_of,
)
from redefense.audit.finding import Finding, finding_about
from redefense.audit.rules_stated import Rule
from redefense.audit.table import Claim, Group


def _contained(group: Group) -> bool:
    """Whether an aware attack is at or below every other bounded one of a randomized method."""
    bounded = [c for c in group.attacks if c.bounded]
    aware = [c for c in bounded if c.aware]

    def contains(a: Claim, c: Claim) -> bool:
        """Whether `a` has at most the accuracy of `c`, with at most its budget."""
        return (a.same_budget(c) or c.covers(a)) and a.accuracy <= c.accuracy + 0.5

    return bool(group.randomized and aware) and all(
        any(contains(a, c) for a in aware) for c in bounded
    )


def _slack(claims: Sequence[Claim], points: float) -> float:
    """Tolerance for chance: `points`, two images, or one unit of the last stated digit.

    The spreads of means are added, and a tolerance for a slightly smaller budget: twice the
    relative difference, times the error within the larger budget.
    """
    sizes = [c.num_images for c in claims if c.num_images is not None]
    last = [10.0**-c.decimals for c in claims if c.decimals is not None]
    high, low = (choose(claims, key=lambda c: c.accuracy) for choose in (max, min))
    smaller = 0.0
    if high.norm == low.norm and high.eps is not None and low.eps:
        # accuracy falls about linearly with eps near 0; twice that covers steeper curves
        smaller = max(2 * (1 - high.eps / low.eps), 0.0) * (100 - low.accuracy)
    spreads = sum(c.spread or 0.0 for c in claims)
    return max([points, *([200 / min(sizes)] if sizes else []), *last]) + spreads + smaller


def _includes(a: Claim, c: Claim) -> bool:
    """Whether the budget of `a` equals or includes that of `c`: then `a` must not be weaker."""
    return a.bounded and c.bounded and (a.same_budget(c) or a.covers(c)) and _same_view(a, c)


def _same_view(a: Claim, b: Claim) -> bool:
    return a.view == b.view or not a.view or not b.view


def _above(
    group: Group, highs: Iterable[str], lows: Iterable[str], points: float
) -> Iterator[tuple[Claim, list[Claim]]]:
    """Each figure of `highs` with those of `lows` that it exceeds by more than the tolerance."""
    for high in group.named(highs):
        below = [
            low
            for low in group.named(lows)
            if _includes(high, low) and high.accuracy > low.accuracy + _slack((high, low), points)
        ]
        if below:
            yield high, below


def _never_above(highs: Iterable[str], lows: Iterable[str], points: float, why: str) -> Rule:
    """The rule that no figure of `highs` exceeds one of `lows` by more than the tolerance."""

    def rule(group: Group) -> Iterator[Finding]:
        for high, below in _above(group, highs, lows, points):
            yield finding_about(group, [high, *below], why)

    return rule


def rises_with_steps(group: Group) -> Iterator[Finding]:
    counted = [(c, steps) for c in group.attacks if (steps := steps_of(c.attack)) is not None]
    for high, many in counted:
        below = [
            low
            for low, few in counted
            if (low.key, low.aware) == (high.key, high.aware) and few < many
            and _includes(high, low) and high.accuracy > low.accuracy + _slack((high, low), 1.0)
        ]  # fmt: skip
        if below:
            why = (
                "Accuracy is higher with more steps: gradients are masked, steps are too large, or "
                "the figures are not of one model."
            )
            yield finding_about(group, [high, *below], why)


def duplicates_differ(group: Group) -> Iterator[Finding]:
    """The same attack or clean accuracy with two figures; an error beyond chance."""
    # two evaluations of a randomized method differ by their draws, too
    chance = 0.5 if group.randomized is False else 2.0
    for first, second in combinations(group.claims, 2):
        if not _same_measurement(first, second):
            continue
        gap = abs(first.accuracy - second.accuracy)
        # two roundings of one figure
        rounding = sum(0.5 * 10.0**-c.decimals for c in (first, second) if c.decimals is not None)
        if gap <= rounding + 1e-9:
            continue
        beyond = gap > _slack((first, second), chance)
        if first.eps != second.eps and not beyond:
            continue  # budgets that are nearly equal may differ
        why = (
            "One measurement has two figures: one of them is wrong, or they are of two models "
            "that need different names."
            if beyond
            else "One measurement has two figures that differ within chance."
        )
        yield finding_about(group, [first, second], why, "error" if beyond else "note")


def _same_measurement(a: Claim, b: Claim) -> bool:
    """Whether two typed claims state the same attack, budget, and set of images."""
    stated = ((getattr(a, key), getattr(b, key)) for key in ("num_images", "members", "randomized"))
    clean = a.key == b.key == "clean"  # clean accuracy has no budget
    attack = squeezed(a.attack) == squeezed(b.attack) and (
        a.same_budget(b) and (a.aware, a.bounded) == (b.aware, b.bounded)
    )
    return (
        None not in (a.decimals, b.decimals)
        and (clean or attack)
        and _same_view(a, b)
        and all(first == second for first, second in stated)
    )


def black_box_below_white_box(group: Group) -> Iterator[Finding]:
    for low in group.named(BLACK_BOX):
        white = [c for c in group.named(WHITE_BOX) if _includes(c, low)]
        best = min(white, key=lambda c: c.accuracy, default=None)
        if best is not None and low.accuracy < best.accuracy - _slack((low, best), 0.5):
            why = (
                "A score-based attack is stronger than every gradient attack: the gradients are "
                "masked, and the white-box figures overstate the robustness."
            )
            yield finding_about(group, [low, best], why)


def eot_against_pgd(group: Group) -> Iterator[Finding]:
    for high, below in _above(group, {"pgd"}, {"eotpgd"}, 0.5):
        gap = high.accuracy - min(c.accuracy for c in below)
        if group.randomized is False:
            why = (
                "Averaging over draws changes nothing on a deterministic model: EoT-PGD must equal "
                "PGD, so the two were not run on the same model or with the same settings."
            )
            yield replace(finding_about(group, [high, *below], why), id="eot-below-pgd")
        elif group.randomized is None:
            why = "EoT-PGD below PGD is impossible for a deterministic method; it is not stated."
            yield replace(finding_about(group, [high, *below], why, "note"), id="eot-below-pgd")
        else:
            why = (
                f"Averaging over few draws already lowers PGD's accuracy by {gap:.1f} points: that "
                "much holds only for attackers unaware of the draw."
            )
            yield replace(finding_about(group, [high, *below], why, "note"), id="averaging-helps")


def inert_attack(group: Group) -> Iterator[Finding]:
    clean = group.clean
    for claim in group.named(MINIMAL):
        # near chance level an attack cannot lower the accuracy
        if clean is None or clean.accuracy <= 10 or claim.eps is not None:
            continue
        if claim.accuracy >= clean.accuracy - _slack((claim, clean), 0.5):
            why = (
                "An unbounded attack that does not lower the accuracy failed: for example, CW has "
                "no gradient on a model with outputs below 0 (log-probabilities)."
            )
            yield finding_about(group, [claim, clean], why)


def above_clean(group: Group) -> Iterator[Finding]:
    clean = group.clean
    if clean is None:
        return
    for claim in group.attacks:
        if claim.accuracy > clean.accuracy + _slack((claim, clean), 0.1):
            why = "Accuracy is higher under attack than on clean images."
            yield finding_about(group, [claim, clean], why)


def rises_with_eps(group: Group) -> Iterator[Finding]:
    swept = [c for c in group.attacks if c.eps is not None and c.whole]
    for high in swept:
        below = [
            low
            for low in swept
            if (low.key, low.norm, low.view) == (high.key, high.norm, high.view)
            and (low.eps or 0.0) < (high.eps or 0.0)
            and high.accuracy > low.accuracy + _slack((high, low), 0.5)
        ]
        alike = [low for low in below if low.attack.lower() == high.attack.lower()]
        if alike:
            why = "Accuracy is higher at a larger budget: the attack fails there."
            yield finding_about(group, [high, *alike], why)
        elif below:
            why = "Accuracy is higher at a larger budget, if the attack and its restarts are equal."
            yield finding_about(group, [high, *below], why, "note")


def unaware_only(group: Group) -> Iterator[Finding]:
    bounded = [c for c in group.attacks if c.bounded]
    # an aware attack covers its own budget and smaller ones; an unstated budget counts as equal
    aware = [a for a in bounded if a.aware]

    def known(c: Claim) -> bool:
        return any(None in (a.eps, c.eps) or a.same_budget(c) or a.covers(c) for a in aware)

    attacks = [c for c in bounded if not known(c)]
    if not group.randomized or not attacks:
        return
    # a row without an eps, where others state one, does not count as an aware attack
    stated = any(c.eps is not None for c in attacks)
    unknown = [c for c in attacks if c.aware is None and (c.eps is not None or not stated)]
    strongest = min(attacks, key=lambda c: c.accuracy)
    if unknown:
        why = (
            "It is unknown whether an aware attack was run on this randomized defence: the names "
            "of its attacks are unknown, and there is no column `aware`."
        )
        yield finding_about(group, unknown, why, "note")
    elif any(averages(c.key) for c in attacks):
        why = (
            "No attack on this randomized defence uses all members: an average over draws (EoT), "
            "which may be two, counts only if the column `aware` states it."
        )
        yield finding_about(group, [strongest], why)
    else:
        why = (
            "This randomized defence was attacked only by attacks unaware of the draw: nothing is "
            "known about attacks that use all members."
        )
        yield finding_about(group, [strongest], why)


def aware_above_unaware(group: Group) -> Iterator[Finding]:
    aware = [c for c in group.attacks if c.aware and c.bounded]
    for low in group.attacks:
        same = [c for c in aware if c.same_budget(low)]
        if not group.randomized or low.aware is not False or not low.bounded or not same:
            continue
        best = min(same, key=lambda c: c.accuracy)
        if low.accuracy < best.accuracy - _slack((low, best), 1.0):
            why = "An unaware attack is stronger than the aware ones, which have not converged."
            yield finding_about(group, [low, best], why, "note")


def headline_above_attack(group: Group) -> Iterator[Finding]:
    for headline in (c for c in group.claims if c.key in HEADLINES):
        attacks = [c for c in group.attacks if c.bounded]
        one_budget = all(c.same_budget(attacks[0]) for c in attacks)
        summed = [
            c
            for c in attacks
            # a headline without a budget is that of all attacks only if these have one budget
            if c.same_budget(headline) or (headline.eps is None and one_budget)
            # and the unaware headline may be above aware attacks
            if headline.key != "headlineunaware" or c.aware is False
        ]
        lower = [c for c in summed if c.accuracy < headline.accuracy - _slack((c, headline), 0.0)]
        if lower:
            why = "A worst case cannot be above one of the attacks that it includes."
            yield finding_about(group, [headline, *lower], why)
        free = [c for c in group.attacks if not c.bounded]
        lowest = min([*attacks, *free], key=lambda c: c.accuracy, default=None)
        if lowest in free and abs(lowest.accuracy - headline.accuracy) < 0.05:
            why = "The headline is the figure of an unbounded attack."
            finding = finding_about(group, [headline, lowest], why)
            yield replace(finding, id="unbounded-in-headline")


RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "autoattack-above-apgd": _never_above(
            {"autoattack"}, {"apgd", "apgdt"}, 0.5,
            "AutoAttack runs APGD first and keeps every success, so its accuracy cannot be higher; "
            "it is if a random output makes it skip an image that is still correct.",
        ),
        "autoattack-above-pgd": _never_above(
            {"autoattack"}, GRADIENT, 0.5,
            "AutoAttack is stronger than any single gradient attack of at most its budget; if its "
            "accuracy is higher it failed, as when a random output makes it skip an image.",
        ),
        "apgd-above-pgd": _never_above(
            {"apgd"}, ITERATIVE, 1.0,
            "APGD is PGD with a better schedule, so its accuracy must not be higher; it returns "
            "the clean image if a random output hid its success.",
        ),
        "iterative-above-single-step": _never_above(
            ITERATIVE - {"eotpgd"}, {"fgsm"}, 0.5,
            "Accuracy is higher with many steps than with one: masked gradients or wrong steps.",
        ),
        "rises-with-steps": rises_with_steps,
        "duplicates-differ": duplicates_differ,
        "black-box-below-white-box": black_box_below_white_box,
        "eot-below-pgd": eot_against_pgd,
        "inert-attack": inert_attack,
        "above-clean": above_clean,
        "rises-with-eps": rises_with_eps,
        "unaware-only": unaware_only,
        "aware-above-unaware": aware_above_unaware,
        "headline-above-attack": headline_above_attack,
        "unbounded-attack": stated.unbounded_attack,
        "unknown-attack": stated.unknown_attack,
        "draw-denied": stated.draw_denied,
        "draw-unstated": stated.draw_unstated,
        "spelling": stated.spelling,
        "fractions": stated.fractions,
        "other-norm": stated.other_norm,
        "norm-unstated": stated.norm_unstated,
        "eps-unstated": stated.eps_unstated,
        "images-unstated": stated.images_unstated,
        "too-few-images": stated.too_few_images,
        "impossible-share": stated.impossible_share,
    }
)  # fmt: skip
"""Every rule that needs only figures, by the id of its findings."""

_STRENGTH = frozenset(
    {
        "autoattack-above-apgd", "autoattack-above-pgd", "apgd-above-pgd", "inert-attack",
        "iterative-above-single-step", "black-box-below-white-box", "above-clean", "rises-with-eps",
        "rises-with-steps",
    }
)  # fmt: skip


def findings_of(group: Group) -> Iterator[Finding]:
    contained = _contained(group)
    for name, rule in RULES.items():
        for finding in rule(group):
            # some rules yield findings of two ids and set them themselves
            named = replace(finding, id=finding.id or name)
            if contained and name in _STRENGTH:
                # the figure is wrong, but a lower one is also stated and is what counts
                named = replace(named, severity="note")
            yield named
