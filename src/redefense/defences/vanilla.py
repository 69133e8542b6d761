"""The undefended ensemble: members that differ by their initialisation alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from redefense.defences.base import Defence, terms
from redefense.types import Batch, Ensemble, Loss


@dataclass(frozen=True, kw_only=True)
class Vanilla(Defence):
    """Each member minimises its own cross-entropy on clean images (the sum over members)."""

    summary: ClassVar[str] = "no defence: members trained apart on clean images"

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """One part a member; the log shows the mean over members."""
        for m in range(ensemble.num_members):
            ce = F.cross_entropy(ensemble.logits_of(m, batch.x), batch.y)
            yield Loss(ce, terms(ce=ce / ensemble.num_members, total=ce))
