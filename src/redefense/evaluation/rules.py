"""Rules about figures alone: what a believable table of robustness cannot look like.

Each rule takes all that is claimed of one method and yields its findings. Slack is left for chance:
a few tenths of a point for random starts, two images, one unit of the last stated digit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

from redefense.evaluation.claims import Claim, Group
from redefense.evaluation.names import (
    BLACK_BOX,
    GRADIENT,
    HEADLINES,
    ITERATIVE,
    KNOWN,
    MINIMAL,
    WHITE_BOX,
    averages,
)
from redefense.evaluation.statistics import wilson


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One reason for doubt.

    Attributes:
        id: of the rule, a key of `RULES`, or one of those that need more than figures.
        severity: `error` if the claim cannot hold as stated, `note` if the reader must know it.
        subject: the data set and method it is about.
        rows: the figures concerned and where they stand.
        figures: the numbers the rule compared, accuracies in percent.
        why: one sentence.
    """

    id: str
    severity: Literal["error", "note"]
    subject: str
    rows: tuple[str, ...]
    figures: Mapping[str, float]
    why: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = f" ({'; '.join(self.rows)})" if self.rows else ""
        return f"{self.severity} {self.id}, {self.subject}: {self.why}{rows}"


def _contained(group: Group) -> bool:
    """Whether an aware attack stands at or below every other bounded one of a random method."""
    aware = [c.accuracy for c in group.attacks if c.aware and c.bounded]
    others = [c.accuracy for c in group.attacks if c.bounded]
    return bool(group.randomized and aware) and min(aware) <= min(others) + 0.5


def _slack(claims: Sequence[Claim], points: float) -> float:
    """What chance may explain: `points`, two images, or one unit of the last stated digit."""
    sizes = [c.num_images for c in claims if c.num_images is not None]
    last = [10.0**-c.decimals for c in claims if c.decimals is not None]
    return max([points, *([200 / min(sizes)] if sizes else []), *last])


def _finding(
    group: Group, rows: Sequence[Claim], why: str, severity: Literal["error", "note"] = "error"
) -> Finding:
    unique = len({claim.attack for claim in rows}) == len(rows)
    return Finding(
        id="",
        severity=severity,
        subject=group.subject or "claim",
        rows=tuple(str(claim) for claim in rows),
        figures={c.attack if unique else c.where: c.accuracy for c in rows},
        why=why,
    )


def _comparable(a: Claim, b: Claim) -> bool:
    same_view = a.view == b.view or not a.view or not b.view
    return a.bounded and b.bounded and a.budget == b.budget and same_view


def _above(
    group: Group, highs: Iterable[str], lows: Iterable[str], points: float
) -> Iterator[tuple[Claim, list[Claim]]]:
    """Each figure of `highs` with those of `lows` that it exceeds by more than the slack."""
    for high in group.named(highs):
        below = [
            low
            for low in group.named(lows)
            if _comparable(high, low) and high.accuracy > low.accuracy + _slack((high, low), points)
        ]
        if below:
            yield high, below


def autoattack_above_apgd(group: Group) -> Iterator[Finding]:
    for high, below in _above(group, {"autoattack"}, {"apgd", "apgdt"}, 0.5):
        why = (
            "AutoAttack runs APGD first and keeps every success, so it cannot leave more images "
            "right; it does when a random answer makes it give up an image that still stands."
        )
        yield _finding(group, [high, *below], why)


def autoattack_above_pgd(group: Group) -> Iterator[Finding]:
    for high, below in _above(group, {"autoattack"}, GRADIENT, 0.5):
        why = (
            "AutoAttack is stronger than any single gradient attack at the same budget; above one "
            "it failed, as it does when one random answer makes it give up an image."
        )
        yield _finding(group, [high, *below], why)


def apgd_above_pgd(group: Group) -> Iterator[Finding]:
    for high, below in _above(group, {"apgd"}, ITERATIVE, 1.0):
        why = (
            "APGD is PGD with a better schedule and must not leave more images right; it returns "
            "the clean image wherever a random answer hid its success."
        )
        yield _finding(group, [high, *below], why)


def iterative_above_single_step(group: Group) -> Iterator[Finding]:
    for high, below in _above(group, ITERATIVE - {"eotpgd"}, {"fgsm"}, 0.5):
        why = "Many steps leave more images right than one: gradients are masked or steps wrong."
        yield _finding(group, [high, *below], why)


def black_box_below_white_box(group: Group) -> Iterator[Finding]:
    for low in group.named(BLACK_BOX):
        white = [c for c in group.named(WHITE_BOX) if _comparable(c, low)]
        best = min(white, key=lambda c: c.accuracy, default=None)
        if best is not None and low.accuracy < best.accuracy - _slack((low, best), 0.5):
            why = (
                "An attack that sees only scores beats every one that sees gradients: the "
                "gradients mislead, and the white-box figures overstate the robustness."
            )
            yield _finding(group, [low, best], why)


def eot_against_pgd(group: Group) -> Iterator[Finding]:
    for high, below in _above(group, {"pgd"}, {"eotpgd"}, 0.5):
        gap = high.accuracy - min(c.accuracy for c in below)
        if group.randomized is False:
            why = (
                "Averaging over draws changes nothing on a deterministic model: EoT-PGD must equal "
                "PGD, so the two were not run on the same model or with the same settings."
            )
            yield replace(_finding(group, [high, *below], why), id="eot-below-pgd")
        elif group.randomized is None:
            why = "EoT-PGD below PGD cannot be if this method is deterministic, which is not said."
            yield replace(_finding(group, [high, *below], why, "note"), id="eot-below-pgd")
        else:
            why = (
                f"A little averaging already takes {gap:.1f} points off PGD's figure: that much "
                "rests on the attacker's ignorance of the draw."
            )
            yield replace(_finding(group, [high, *below], why, "note"), id="averaging-helps")


def inert_attack(group: Group) -> Iterator[Finding]:
    clean = group.clean
    for claim in group.named(MINIMAL):
        if clean is None or clean.accuracy <= 10:
            continue
        if claim.accuracy >= clean.accuracy - _slack((claim, clean), 0.5):
            why = (
                "An attack free to move as far as it likes that changes nothing did not run: on a "
                "model with outputs below 0 (log-probabilities), for one, CW has no gradient."
            )
            yield _finding(group, [claim, clean], why)


def above_clean(group: Group) -> Iterator[Finding]:
    clean = group.clean
    if clean is None:
        return
    for claim in group.attacks:
        if claim.accuracy > clean.accuracy + _slack((claim, clean), 0.1):
            why = "More images are right under attack than without one."
            yield _finding(group, [claim, clean], why)


def rises_with_eps(group: Group) -> Iterator[Finding]:
    swept = [c for c in group.attacks if c.eps is not None]
    for high in swept:
        below = [
            low
            for low in swept
            if (low.key, low.norm, low.view) == (high.key, high.norm, high.view)
            and (low.eps or 0.0) < (high.eps or 0.0)
            and high.accuracy > low.accuracy + _slack((high, low), 0.5)
        ]
        if below:
            why = "A larger budget leaves more images right: the attack fails where it may do more."
            yield _finding(group, [high, *below], why)


def unaware_only(group: Group) -> Iterator[Finding]:
    attacks = [c for c in group.attacks if c.bounded]
    if not group.randomized or not attacks or any(c.aware for c in attacks):
        return
    unknown = [c for c in attacks if c.aware is None]
    strongest = min(attacks, key=lambda c: c.accuracy)
    if unknown:
        why = (
            "Whether anybody who knows of the draw attacked this defence, which answers at random, "
            "cannot be told: no rule knows these names, and no column `aware` says it."
        )
        yield _finding(group, unknown, why, "note")
    elif any(averages(c.key) for c in attacks):
        why = (
            "A defence that answers at random was attacked by nobody who uses all members: an "
            "average over draws (EoT), which may be two, counts only where `aware` says so."
        )
        yield _finding(group, [strongest], why)
    else:
        why = (
            "A defence that answers at random was attacked only by attacks that ignore the draw: "
            "nothing is known about an attacker who uses all members."
        )
        yield _finding(group, [strongest], why)


def aware_above_unaware(group: Group) -> Iterator[Finding]:
    aware = [c for c in group.attacks if c.aware and c.bounded]
    for low in group.attacks:
        same = [c for c in aware if c.budget == low.budget]
        if not group.randomized or low.aware is not False or not low.bounded or not same:
            continue
        best = min(same, key=lambda c: c.accuracy)
        if low.accuracy < best.accuracy - _slack((low, best), 1.0):
            why = "An attack not made for the draw beats those that are, which were too weak."
            yield _finding(group, [low, best], why, "note")


def headline_above_attack(group: Group) -> Iterator[Finding]:
    for headline in (c for c in group.claims if c.key in HEADLINES):
        attacks = [c for c in group.attacks if c.bounded]
        lower = [c for c in attacks if c.accuracy < headline.accuracy - _slack((c, headline), 0.0)]
        if lower:
            why = "A worst case cannot lie above one of the attacks that it sums up."
            yield _finding(group, [headline, *lower], why)
        free = [c for c in group.attacks if not c.bounded]
        lowest = min([*attacks, *free], key=lambda c: c.accuracy, default=None)
        if lowest in free and abs(lowest.accuracy - headline.accuracy) < 0.05:
            why = "The headline is the figure of an attack that nothing bounds."
            finding = _finding(group, [headline, lowest], why)
            yield replace(finding, id="unbounded-in-headline")


def unbounded_attack(group: Group) -> Iterator[Finding]:
    free = [c for c in group.attacks if not c.bounded]
    if free:
        why = (
            "No eps bounds these attacks: their accuracies mean nothing without the size of the "
            "change, and must not be ranked beside bounded ones."
        )
        yield _finding(group, free, why, "note")


def eps_unstated(group: Group) -> Iterator[Finding]:
    silent = [c for c in group.attacks if c.bounded and c.eps is None]
    if silent:
        yield _finding(group, silent, "The budget eps of these attacks is not stated.", "note")


def unknown_attack(group: Group) -> Iterator[Finding]:
    unknown = [c for c in group.attacks if c.key not in KNOWN]
    if unknown:
        why = "No rule knows these attacks by name: only what holds of every attack was looked at."
        yield _finding(group, unknown, why, "note")


def draw_denied(group: Group) -> Iterator[Finding]:
    if group.randomized is False and group.num_members > 1:
        why = (
            f"{group.num_members} members are said to answer without a draw: what must hold of "
            "random answers, such as an attack that knows the draw, was not asked for."
        )
        yield _finding(group, group.claims[:1], why, "note")


def draw_unstated(group: Group) -> Iterator[Finding]:
    attacks = group.attacks
    if group.randomized is not None or group.num_members < 2 or any(c.aware for c in attacks):
        return
    if attacks:
        why = (
            f"Whether one of the {group.num_members} members is drawn to answer is not stated: if "
            "so, an attack that knows the draw is missing."
        )
        yield _finding(group, group.claims[:1], why, "note")


def images_unstated(group: Group) -> Iterator[Finding]:
    silent = [c for c in group.claims if c.num_images is None]
    if silent:
        why = "The number of images is not stated, so no figure has an interval."
        yield _finding(group, silent[:1], why, "note")


def too_few_images(group: Group) -> Iterator[Finding]:
    """Digits finer than one image; an error from ten times finer on."""
    for claim in group.claims:
        n, decimals = claim.num_images, claim.decimals
        if n is None or decimals is None or 100 / n <= 10.0**-decimals * (1 + 1e-9):
            continue
        coarse = 100 / n > 10.0 ** (1 - decimals) * (1 + 1e-9)
        low, high = wilson(round(claim.accuracy * n / 100), n)
        why = (
            f"One of {n} images is worth {100 / n:.2g} points, more than the last digit stated; "
            f"the 95 % interval is {100 * low:.1f} to {100 * high:.1f}."
        )
        yield _finding(group, [claim], why, "error" if coarse else "note")


def impossible_share(group: Group) -> Iterator[Finding]:
    for claim in group.claims:
        n, decimals = claim.num_images, claim.decimals
        if n is None or decimals is None or group.randomized is not False:
            continue
        nearest = 100 * round(claim.accuracy * n / 100) / n
        if abs(nearest - claim.accuracy) > 0.5 * 10.0**-decimals + 1e-9:
            why = (
                f"A deterministic model is right on a whole number of images: no share of {n} "
                f"rounds to this figure, unless it is a mean of several models, which is not said."
            )
            yield _finding(group, [claim], why)


Rule = Callable[[Group], Iterator[Finding]]

RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "autoattack-above-apgd": autoattack_above_apgd,
        "autoattack-above-pgd": autoattack_above_pgd,
        "apgd-above-pgd": apgd_above_pgd,
        "iterative-above-single-step": iterative_above_single_step,
        "black-box-below-white-box": black_box_below_white_box,
        "eot-below-pgd": eot_against_pgd,
        "inert-attack": inert_attack,
        "above-clean": above_clean,
        "rises-with-eps": rises_with_eps,
        "unaware-only": unaware_only,
        "aware-above-unaware": aware_above_unaware,
        "headline-above-attack": headline_above_attack,
        "unbounded-attack": unbounded_attack,
        "unknown-attack": unknown_attack,
        "draw-denied": draw_denied,
        "draw-unstated": draw_unstated,
        "eps-unstated": eps_unstated,
        "images-unstated": images_unstated,
        "too-few-images": too_few_images,
        "impossible-share": impossible_share,
    }
)
"""Every rule about figures alone, by the id of its findings."""

_STRENGTH = frozenset(
    {
        "autoattack-above-apgd", "autoattack-above-pgd", "apgd-above-pgd", "inert-attack",
        "iterative-above-single-step", "black-box-below-white-box", "above-clean", "rises-with-eps",
    }
)  # fmt: skip


def findings_of(group: Group) -> Iterator[Finding]:
    contained = _contained(group)
    for name, rule in RULES.items():
        for finding in rule(group):
            named = replace(finding, id=finding.id or name)
            if contained and name in _STRENGTH:
                # the figure is still wrong, but a harsher one stands beside it and is what counts
                named = replace(named, severity="note")
            yield named
