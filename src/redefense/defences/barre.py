"""BARRE: boosting for a randomized ensemble, with optimal sampling probabilities.

Source: Dbouk & Shanbhag, "On the Robustness of Randomized Ensembles to Adversarial Perturbations",
ICML 2023, and its released code, which builds on that of MRBoost. Stage m trains member m alone,
starting from member m - 1: examples are made by PGD on the log of the members' mean probability
under the sampling probabilities so far, maximising the margin cross-entropy MCE, and member m
minimises its own MCE on them. Optimal sampling (OSP) then minimises the ensemble's adversarial risk

    eta(alpha) = mean over images of sum_m alpha_m [member m errs at ARC's point for alpha]

by projected sub-gradient descent on some training images; the best alpha is used. The mixture is
part of the ensemble and is saved in its checkpoints.

Departures from the released code: the mixture is refitted at the end of each stage from the second
member on (theirs from the fourth on, every ten epochs of a stage's second half), and the next stage
preserves its proportions, the new member getting 1 / m (theirs resets to uniform); a constant first
step of the sub-gradient (theirs follows the learning rate, 0.1 then 0.01); ARC visits members by
falling probability and supports probability zero; no epoch is selected on the test set.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from redefense.attacks.arc import ARC
from redefense.defences.base import Adversary, After, CrossEntropyDefence, Stage, terms
from redefense.defences.mrboost import boosted_examples, check_all_alike, copy_member, one_by_one
from redefense.ensembles import Ensemble, evaluating, frozen_weights, mean_log_probs
from redefense.limits import at_least, not_negative
from redefense.penalties import margin_cross_entropy
from redefense.threat import Threat
from redefense.types import Batch, Float, Images, Int, Logits, Loss, correct

Part = tuple[Float[Tensor, "_ ch H W"], Int[Tensor, " _"]]
"""A batch of images and their labels; the last batch may be smaller."""

ATTACK = ARC(steps=10, radius=1.0, competitors=2)
"""The published settings of the attack inside optimal sampling."""


@dataclass(frozen=True, kw_only=True)
class BARRE(CrossEntropyDefence):
    """Boosted randomized ensemble.

    Attributes:
        other_weight: weight of the wrong classes in MCE; 0 is cross-entropy.
        adversary: attack that generates the examples; its eps also applies to optimal sampling.
        refit_images: number of training images for optimal sampling.
        refit_steps: steps of its sub-gradient descent; with 0 the mixture stays uniform.
        refit_rate: length of its first step; step t is refit_rate / (t + 1).
    """

    summary: ClassVar[str] = "boosting of a randomized ensemble with optimal sampling probabilities"
    randomized: ClassVar[bool] = True

    other_weight: float = 1.0
    adversary: Adversary = field(default_factory=lambda: Adversary(eps=8 / 255))
    refit_images: int = 4096
    refit_steps: int = 10
    refit_rate: float = 0.1

    def __post_init__(self) -> None:
        not_negative(other_weight=self.other_weight, refit_rate=self.refit_rate)
        at_least(1, refit_images=self.refit_images)
        at_least(0, refit_steps=self.refit_steps)

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """One stage per member; the mixture is refitted at the end of each but the first."""

        def after(m: int) -> After | None:
            return partial(self.refit, m + 1) if m > 0 and self.refit_steps else None

        return one_by_one(num_members, epochs, loss=self.newest, before=begin, after=after)

    def check(self, ensemble: Ensemble, num_classes: int) -> None:
        check_all_alike(ensemble)

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The loss of the last stage, which uses all members."""
        yield from self.newest(ensemble.num_members - 1, ensemble, batch, rng)

    def newest(
        self, m: int, ensemble: Ensemble, batch: Batch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """The loss of stage m, which trains member m; examples attack the current mixture."""
        view = LogMeanProbability(ensemble)
        x = boosted_examples(view, batch.x, batch.y, self.adversary, self.other_weight, rng)
        logits, y = ensemble.logits_of(m, x), batch.y
        mce = margin_cross_entropy(logits, y, self.other_weight, self.label_smoothing).mean()
        yield Loss(mce, terms(mce=mce, total=mce))

    def refit(
        self, count: int, ensemble: Ensemble, batches: Iterator[Batch], rng: torch.Generator
    ) -> None:
        """Optimal sampling: optimise the current mixture of the first `count` members."""
        images = first_images(batches, self.refit_images)
        # a copy: the mixture is changed in place below
        shares = ensemble.mixture[:count].clone()
        best, lowest = shares, float("inf")
        for step in range(self.refit_steps):
            _set(ensemble, shares)
            errors = self.errors(ensemble, count, images, rng)
            risk = float(shares @ errors)
            # a sub-gradient step may raise the risk
            if risk < lowest:
                best, lowest = shares, risk
            # the error rates are a sub-gradient; steps of 1 / t converge for such functions
            shares = project_simplex(shares - self.refit_rate / (step + 1) * errors)
        _set(ensemble, best)

    def errors(
        self, ensemble: Ensemble, count: int, images: list[Part], rng: torch.Generator
    ) -> Float[Tensor, " N"]:
        """Error rate of each of the first members on ARC's examples against the mixture.

        It is a sub-gradient of the adversarial risk in the mixture.
        """
        wrong, seen = torch.zeros_like(ensemble.mixture[:count]), 0
        with evaluating(ensemble), frozen_weights(ensemble), torch.no_grad():
            for x, y in images:
                point = ATTACK(ensemble, x, y, Threat(eps=self.adversary.eps), rng=rng)
                for m in range(count):
                    wrong[m] += (~correct(ensemble.logits_of(m, point), y)).sum()
                seen += len(y)
        return wrong / seen


class LogMeanProbability(nn.Module):
    """log of the mean probability; members of probability zero are not queried.

    The mixture is read on construction, so the device is synchronised once, not per query.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble
        self.chosen = [m for m, share in enumerate(ensemble.shares()) if share > 0]

    def forward(self, x: Images) -> Logits:
        logits = torch.stack([self.ensemble.logits_of(m, x) for m in self.chosen])
        shares = torch.stack([self.ensemble.mixture[m] for m in self.chosen])
        return mean_log_probs(logits, shares)


def begin(m: int, ensemble: Ensemble) -> None:
    """Initialise member m from member m - 1 and set its probability to 1 / (m + 1)."""
    if m > 0:
        copy_member(ensemble, m - 1, m)
    # the proportions that the refit found stay, and the new member gets the share of a uniform one
    earlier = ensemble.mixture[:m] / ensemble.mixture[:m].sum() * m / (m + 1)
    added = earlier.new_full((1,), 1 / (m + 1))
    _set(ensemble, torch.cat([earlier, added]))


def first_images(batches: Iterator[Batch], count: int) -> list[Part]:
    """The first `count` images of the batches, at most all of them."""
    found: list[Part] = []
    for batch in batches:
        found.append((batch.x[:count], batch.y[:count]))
        count -= len(batch.y)
        if count <= 0:
            break
    return found


def project_simplex(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The nearest probabilities, in L2 (by sorting: Held, Wolfe & Crowder, 1974)."""
    # the nearest point subtracts one number from the largest entries and zeroes the others
    ordered = values.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(values) + 1).to(values)
    return (values - excess[(ordered > excess).sum() - 1]).clamp_min(0)


def _set(ensemble: Ensemble, shares: Tensor) -> None:
    mixture = torch.zeros_like(ensemble.mixture)
    mixture[: len(shares)] = shares
    ensemble.set_mixture(mixture)
