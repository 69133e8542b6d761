"""The undefended ensemble: members that differ only by their initialisation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from redefense.defences.base import CrossEntropyDefence, LossFn, Stage, terms
from redefense.ensembles import Ensemble
from redefense.limits import within
from redefense.types import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Vanilla(CrossEntropyDefence):
    """Each member minimises its own cross-entropy on clean images (the sum over members)."""

    summary: ClassVar[str] = "no defence: members trained separately on clean images"
    spreads = True

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """One part per member; the log reports the mean over members."""
        for m in ensemble.spread.own(ensemble.num_members):
            ce = self.cross_entropy(ensemble.logits_of(m, batch.x), batch.y)
            # terms of parts are summed, so each logs its share of the mean
            yield Loss(ce, terms(ce=ce / ensemble.num_members, total=ce))


def after_plain(
    name: str, loss: LossFn, *, num_members: int, epochs: int, share: float, label_smoothing: float
) -> tuple[Stage, ...]:
    """Stages of a method that starts from trained undefended members.

    Args:
        name: name of the method's stage.
        loss: loss of that stage.
        num_members: M; both stages train all.
        epochs: total of both stages.
        share: fraction of the epochs for the undefended stage, rounded; the method has at least
            one.
        label_smoothing: for the undefended stage.

    Raises:
        ConfigError: if the share is not in [0, 1).
    """
    within("[0, 1)", share=share)
    all_members = tuple(range(num_members))
    # the method itself has at least one epoch
    plain = min(round(share * epochs), epochs - 1)
    own = Stage(name=name, epochs=epochs - plain, members=all_members, loss=loss)
    if plain == 0:
        return (own,)
    vanilla = Vanilla(label_smoothing=label_smoothing)
    return (Stage(name="plain", epochs=plain, members=all_members, loss=vanilla.loss), own)
