"""Catastrophic overfitting: members robust to their one-step adversary only.

Training on one-step examples may end in networks on which that step finds no adversarial example,
while PGD of ten steps fools them on every image (Wong, Rice & Kolter, "Fast is better than free",
ICLR 2020). It is detected by an accuracy under PGD far below that under the training adversary.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from redefense.defences.base import Adversary, Defence
from redefense.ensembles import Ensemble, evaluating
from redefense.networks import Queried
from redefense.rng import stream
from redefense.types import Images, Labels, correct

LEAST_RATIO = 0.5
"""Ratio of PGD accuracy to one-step accuracy below which overfitting is reported."""


def one_step_adversary(defence: Defence) -> Adversary | None:
    """The one-step adversary of a method, if it has one."""
    adversary = getattr(defence, "adversary", None)
    # methods with this switch use their adversary for a penalty if it is off
    learns = getattr(defence, "adversarial_training", True)
    found = isinstance(adversary, Adversary) and adversary.steps == 1 and learns
    return adversary if found else None


def one_step_accuracy(
    ensemble: Ensemble, adversary: Adversary, x: Images, y: Labels, seed: int
) -> dict[str, float]:
    """Accuracies, expected over the mixture, of members attacked separately.

    Returns:
        `one_step_accuracy` under the adversary, `pgd_accuracy` under ten steps in the same ball.
    """
    pgd = replace(adversary, attack="pgd", steps=10, step_size=0.25)
    found = {}
    for name, attacker in (("one_step_accuracy", adversary), ("pgd_accuracy", pgd)):
        right = []
        for m in ensemble.spread.own(ensemble.num_members):
            net = Queried(ensemble.member(m))
            # one stream for both, so that they start from the same points
            point = attacker.craft(net, x, y, stream(seed, "overfitting"))
            with torch.no_grad(), evaluating(net):
                right.append(correct(net(point), y).double().mean())
        every = ensemble.spread.members(torch.stack(right))
        found[name] = float(ensemble.mixture.to(every) @ every)
    return found


def overfitted(found: Mapping[str, float]) -> str:
    """A warning for the result of `one_step_accuracy`; empty without overfitting."""
    one, pgd = found["one_step_accuracy"], found["pgd_accuracy"]
    if pgd >= LEAST_RATIO * one:
        return ""
    return (
        f"warning: catastrophic overfitting: on validation images the accuracy is {100 * one:.1f} "
        f"% under the one-step training adversary and {100 * pgd:.1f} % under PGD of ten steps. "
        "Train with adversary.attack=n-fgsm, a smaller adversary.step_size, or more steps"
    )
