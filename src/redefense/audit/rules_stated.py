"""Audit rules about how figures are described: budgets, images, digits, names and the draw."""

from collections.abc import Callable, Iterator
from typing import Final

from redefense.audit.attack_names import KNOWN
from redefense.audit.finding import Finding, finding_about
from redefense.audit.table import Claim, Group
from redefense.results.intervals import wilson

Rule = Callable[[Group], Iterator[Finding]]


def _noted(applies: Callable[[Claim], bool], why: str) -> Rule:
    """A note about all attacks to which something applies."""

    def rule(group: Group) -> Iterator[Finding]:
        if found := [claim for claim in group.attacks if applies(claim)]:
            yield finding_about(group, found, why, "note")

    return rule


eps_unstated: Final = _noted(
    lambda c: c.bounded and c.eps is None, "The budget eps of these attacks is not stated."
)
norm_unstated: Final = _noted(
    lambda c: c.bounded and c.eps is not None and c.norm is None, "The norm of eps is not stated."
)
other_norm: Final = _noted(
    lambda c: c.norm not in (None, "inf", "2"),
    "`redefense evaluate` supports L-inf and L2 only: budgets in another norm are compared with "
    "each other, but cannot be evaluated.",
)
unknown_attack: Final = _noted(
    lambda c: c.key not in KNOWN,
    "These attacks are unknown: only rules for all attacks were applied.",
)
unbounded_attack: Final = _noted(
    lambda c: not c.bounded,
    "These attacks are unbounded: their accuracies mean nothing without the norm of the "
    "perturbation, and must not be compared with bounded ones.",
)


def fractions(group: Group) -> Iterator[Finding]:
    """Typed figures that are all at most 1: an error if clean accuracies are included."""
    claims = [c for c in group.claims if c.decimals is not None]
    # 0 and 1 alone may be percent, as under strong attacks
    if claims and max(c.accuracy for c in claims) <= 1 and any(c.accuracy % 1 for c in claims):
        why = "Accuracies are percent, and all of these are at most 1: are they fractions?"
        yield finding_about(group, claims, why, "note" if group.clean is None else "error")


def spelling(group: Group) -> Iterator[Finding]:
    for what in ("dataset", "method"):
        # reversed, so that the first row of each spelling is kept
        first = {getattr(c, what): c for c in reversed(group.claims)}
        if len(first) > 1:
            names = ", ".join(map(repr, reversed(first)))
            why = f"Treated as one {what}: {names}. If they differ, rename them."
            yield finding_about(group, list(reversed(first.values())), why, "note")


def draw_denied(group: Group) -> Iterator[Finding]:
    if group.randomized is False and group.num_members > 1:
        why = (
            f"The {group.num_members} members are stated to answer without a draw: rules for "
            "randomized defences, such as the need for an aware attack, were not applied."
        )
        yield finding_about(group, group.claims[:1], why, "note")


def draw_unstated(group: Group) -> Iterator[Finding]:
    attacks = group.attacks
    if group.randomized is not None or group.num_members < 2 or any(c.aware for c in attacks):
        return
    if attacks:
        why = (
            f"It is not stated whether a query is answered by one of the {group.num_members} "
            "members at random: if so, an aware attack is missing."
        )
        yield finding_about(group, group.claims[:1], why, "note")


def images_unstated(group: Group) -> Iterator[Finding]:
    unstated = [c for c in group.claims if c.num_images is None]
    if unstated:
        why = "The number of images is not stated, so no figure has an interval."
        # one row stands for all, since a paper states the number once or never
        yield finding_about(group, unstated[:1], why, "note")


def too_few_images(group: Group) -> Iterator[Finding]:
    """More decimals than the number of images supports; an error from a factor of ten on."""
    for claim in group.claims:
        n, decimals = claim.num_images, claim.decimals
        if n is None or decimals is None or claim.spread is not None:
            continue  # means of several runs may have more decimals
        # 1e-9 for rounding: with 100 images whole percents are exactly the grain
        if 100 / n <= 10.0**-decimals * (1 + 1e-9):
            continue
        coarse = 100 / n > 10.0 ** (1 - decimals) * (1 + 1e-9)
        low, high = wilson(round(claim.accuracy * n / 100), n)
        why = (
            f"One of {n} images is worth {100 / n:.2g} points, more than the last digit stated; "
            f"the 95 % interval is {100 * low:.1f} to {100 * high:.1f}."
        )
        yield finding_about(group, [claim], why, "error" if coarse else "note")


def impossible_share(group: Group) -> Iterator[Finding]:
    for claim in group.claims:
        n, decimals = claim.num_images, claim.decimals
        if n is None or decimals is None or group.randomized is not False:
            continue
        if claim.spread is not None:
            continue
        # n images allow n + 1 shares; the nearest must round to what is stated
        nearest = 100 * round(claim.accuracy * n / 100) / n
        if abs(nearest - claim.accuracy) > 0.5 * 10.0**-decimals + 1e-9:
            why = (
                f"A deterministic model is correct on a whole number of images: no share of {n} "
                f"rounds to this figure, and it is not stated to be a mean over several models."
            )
            yield finding_about(group, [claim], why)
