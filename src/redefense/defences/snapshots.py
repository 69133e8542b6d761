"""Snapshots: the members are one network at the ends of its learning-rate cycles.

Source of the idea: Huang et al., "Snapshot Ensembles: Train 1, get M for free", ICLR 2017, there
for accuracy. The network trains on adversarial examples; the epochs are shared equally by M stages,
each of which covers the learning-rate schedule once (the paper uses `optim.schedule=cosine`), and
each member is initialised from the one before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from redefense.defences.base import Adversary, CrossEntropyDefence, Stage, terms
from redefense.defences.mrboost import begin_member, check_all_alike, one_by_one
from redefense.ensembles import Ensemble
from redefense.networks import Queried
from redefense.types import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Snapshots(CrossEntropyDefence):
    """Members that are one network at several times of its adversarial training.

    Attributes:
        adversary: attack that generates the examples, on the trained member.
    """

    summary: ClassVar[str] = "one adversarially trained network at the ends of M cycles"
    randomized: ClassVar[bool] = True

    adversary: Adversary = field(default_factory=Adversary)

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """One stage per member; before its stage a member has probability zero."""
        before = partial(begin_member, copied=True)
        return one_by_one(num_members, epochs, loss=self.newest, before=before)

    def check(self, ensemble: Ensemble, num_classes: int) -> None:
        check_all_alike(ensemble)

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The loss of the last stage."""
        yield from self.newest(ensemble.num_members - 1, ensemble, batch, rng)

    def newest(
        self, m: int, ensemble: Ensemble, batch: Batch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """The cross-entropy of member m on its own examples."""
        x = self.adversary.craft(Queried(ensemble.member(m)), batch.x, batch.y, rng)
        ce = self.cross_entropy(ensemble.logits_of(m, x), batch.y)
        yield Loss(ce, terms(ce=ce, total=ce))
