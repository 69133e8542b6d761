"""Adversarial training of an ensemble (Madry et al., 2018), in its three published forms."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from redefense.defences.base import Adversary, CrossEntropyDefence, terms
from redefense.ensembles import Ensemble
from redefense.limits import one_of
from redefense.types import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(CrossEntropyDefence):
    """Cross-entropy on adversarial examples only.

    Attributes:
        variant: "shared": examples on the averaged ensemble, each member is trained on them (the
            baseline of DVERGE); "independent": separate examples for each member (the comparison of
            BARRE); "joint": examples on the averaged ensemble, trained as one classifier (MRBoost).
        adversary: attack that generates the examples.
    """

    summary: ClassVar[str] = "adversarial training on PGD examples: shared, independent or joint"

    variant: str = "shared"
    adversary: Adversary = field(default_factory=Adversary)

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("shared", "independent", "joint"))

    @property
    def spreads(self) -> bool:
        # the loss of the averaged output needs all members in one graph
        return self.variant != "joint"

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """One part per member with its cross-entropy; a single part for `joint`."""
        x, y = batch.x, batch.y
        if self.variant != "independent":
            x = self.adversary.craft(ensemble.averaged(), x, y, rng)
        if self.variant == "joint":
            log_probs = ensemble.averaged()(x)
            ce = F.nll_loss(log_probs, y)
            if self.label_smoothing:
                # `nll_loss` has no label smoothing
                ce = torch.lerp(ce, -log_probs.mean(), self.label_smoothing)
            yield Loss(ce, terms(ce=ce, total=ce))
            return
        own = [x] * ensemble.num_members
        if self.variant == "independent":
            own = self.adversary.craft_own(ensemble, x, y, rng)
        for m in ensemble.spread.own(ensemble.num_members):
            ce = self.cross_entropy(ensemble.logits_of(m, own[m]), y)
            # terms of parts are summed, so each logs its share of the mean
            yield Loss(ce, terms(ce=ce / ensemble.num_members, total=ce))
