"""S44: whether attacks with a larger budget lower the accuracy on the first images."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np

from redefense.attacks import Attack
from redefense.attacks.subset import Subset
from redefense.checks.check import Check
from redefense.evaluation.cascade.runner import Runner
from redefense.evaluation.plan import Planned
from redefense.evaluation.suite import CellSpec

IMAGES: Final = 100
"""Number of images for the stronger attacks, which skip images that are already fooled."""

ALLOWED: Final = 0.01
"""Largest allowed loss of expected accuracy on them."""


def stronger_budget(runner: Runner, plan: Sequence[Planned]) -> Check:
    """S44: adaptive attacks of the suite with twice their steps and four times their subsets.

    Steps are at least twice the default. The attack on subsets is always included; its number of
    subsets covers all subsets of up to six equally probable members. Points found count for the
    headline.
    """
    worst = runner.worst
    if worst is None:
        return Check("S44", None, "no headline")
    first = np.arange(len(worst.q)) < IMAGES
    before, found = worst.q[first], []
    for number, (name, attack) in enumerate(_stronger(plan)):
        met = first & ~worst.lost
        if met.any():
            spec = CellSpec(attack=name, view="members")
            # attacked in turn: each skips what those before it have fooled
            runner.further(f"stronger-{name}-{number}", spec, attack, "members", met)
            found.append(name)
    drop = float((before - worst.q[first]).mean())
    # a single one of few images may be fooled by chance
    passed = drop <= max(ALLOWED, 1 / len(before)) + 1e-9
    names = ", ".join(found) or "no attack (all images were fooled before)"
    message = (
        f"{names} with twice the steps: accuracy {100 * drop:.1f} points lower "
        f"on {len(before)} images"
    )
    return Check("S44", passed, message)


def _stronger(plan: Sequence[Planned]) -> Iterator[tuple[str, Attack]]:
    """Names and attacks of the larger budget."""
    attacks: dict[str, Any] = {"subset": Subset()}
    for planned in plan:
        if planned.attack.adaptive:
            attacks[planned.spec.attack] = planned.attack
    for name, attack in attacks.items():
        if not isinstance(steps := getattr(attack, "steps", None), int):
            continue
        more = {"steps": 2 * max(steps, getattr(type(attack), "steps", 0))}
        if isinstance(attack, Subset):
            more["subsets"] = 4 * attack.subsets
        # a preset fixes its settings
        if getattr(attack, "preset", None) is None:
            yield name, cast(Attack, replace(attack, **more))
