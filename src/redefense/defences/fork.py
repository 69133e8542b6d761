"""Fork: trains one network for most of the epochs, then M diverging copies of it.

The first stage trains member 0 alone on adversarial examples. At its end every member becomes a
copy of it, and the second stage trains all of them on the rest of the same learning-rate schedule.
Copies trained on the same examples would stay equal; `apart` selects how they diverge:

| apart | each member learns from | and in addition |
|---|---|---|
| none | its own examples, from its own random starts | |
| similarity | the same | RED's similarity of the input gradients at these examples |
| subset | examples that fool a subset of members, if it is in the subset | |

For `subset` every image draws a nonempty subset of the members uniformly. The adversary maximises
the smooth minimum of their margins, each in standard deviations of the member's logits, as the
attack `attacks.subset` does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.attacks.objectives import margin
from redefense.defences.base import Adversary, CrossEntropyDefence, Stage, terms
from redefense.defences.coupled import DIFFERENTIATE, Coupled
from redefense.defences.mrboost import begin_member, check_all_alike, copy_member
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError
from redefense.limits import not_negative, one_of, positive, within
from redefense.networks import Queried
from redefense.penalties import gradient_similarity
from redefense.rng import drawn
from redefense.threat import TINY
from redefense.types import Batch, Bool, Float, Images, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class Fork(CrossEntropyDefence):
    """One adversarially trained network, and diverging copies of it.

    Attributes:
        share: fraction of the epochs that train one network, rounded; each stage has at least one.
        apart: "none", "similarity" or "subset", see the module's table.
        similarity: weight of the similarity, for apart="similarity".
        temperature: of the smooth minimum, for apart="subset".
        adversary: attack that generates the examples.
        differentiate: "exact" double backward, or "finite" differences of losses.
    """

    summary: ClassVar[str] = "one adversarially trained network, then diverging copies of it"
    randomized: ClassVar[bool] = True

    share: float = 0.8
    apart: Literal["none", "similarity", "subset"] = "similarity"
    similarity: float = 0.1
    temperature: float = 0.1
    adversary: Adversary = field(default_factory=Adversary)
    differentiate: str = "exact"

    def __post_init__(self) -> None:
        not_negative(similarity=self.similarity)
        one_of("differentiate", self.differentiate, DIFFERENTIATE)
        within("(0, 1)", share=self.share)
        positive(temperature=self.temperature)

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """One network, then all members on the rest of its learning-rate schedule.

        Raises:
            ConfigError: for fewer than two epochs, one for each stage.
        """
        if epochs < 2:
            raise ConfigError(f"fork needs at least 2 epochs, got {epochs}")
        alone = min(max(round(self.share * epochs), 1), epochs - 1)
        return (
            Stage(
                name="one", epochs=alone, members=(0,), loss=self.one, before=_only_first,
                schedule=(0.0, alone / epochs),
            ),
            Stage(
                name="copies", epochs=epochs - alone, members=tuple(range(num_members)),
                loss=self.loss, before=_copy_to_all, schedule=(alone / epochs, 1.0),
            ),
        )  # fmt: skip

    def one(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The cross-entropy of member 0 on its own examples."""
        x = self.adversary.craft(Queried(ensemble.member(0)), batch.x, batch.y, rng)
        ce = self.cross_entropy(ensemble.logits_of(0, x), batch.y)
        yield Loss(ce, terms(ce=ce, total=ce))

    def check(self, ensemble: Ensemble, num_classes: int) -> None:
        check_all_alike(ensemble)

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The copies' losses, one part each."""
        if self.apart == "subset":
            yield from self._subsets(ensemble, batch, rng)
            return
        own = self.adversary.craft_own(ensemble, batch.x, batch.y, rng)
        coupled = Coupled(
            y=batch.y,
            ce_images=own,
            ce_weight=1.0,
            points=(own,),
            penalty=lambda grads: {"similarity": gradient_similarity(grads)},
            # weight 0 for "none": its members differ by their random starts only
            weights={"similarity": self.similarity if self.apart == "similarity" else 0.0},
            label_smoothing=self.label_smoothing,
        )
        yield from coupled.parts(ensemble, self.differentiate)

    def _subsets(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        x, y, count = batch.x, batch.y, ensemble.num_members
        # for the whole batch, of which this process may have a part
        size, rows = ensemble.spread.rows(len(x))

        def subsets(rng: torch.Generator) -> Bool[Tensor, "S M"]:
            # one number for each subset: bit k tells whether member k is in it; 0 would be the
            # empty one
            code = torch.randint(1, 2**count, (size, 1), generator=rng, device=rng.device)
            return (code >> torch.arange(count, device=rng.device)) % 2 == 1

        everyone = drawn(rng, subsets, x.device)
        chosen, share = everyone[rows], size / len(x)
        # attacks expect one output; the objective separates the members again
        view = _Stacked(ensemble)

        def smooth_minimum(logits: Float[Tensor, "B MC"], labels: Labels) -> Float[Tensor, " B"]:
            return smooth_margin(logits.unflatten(1, (count, -1)), labels, chosen, self.temperature)

        point = self.adversary.craft(view, x, y, rng, objective=smooth_minimum)
        for m in range(count):
            weight = chosen[:, m].to(x.dtype)
            each = F.cross_entropy(
                ensemble.logits_of(m, point), y, reduction="none",
                label_smoothing=self.label_smoothing,
            )  # fmt: skip
            # the mean over the images of this member in the whole batch, of which the processes
            # average their parts; a small batch may have none
            ce = share * (each * weight).sum() / everyone[:, m].sum().clamp_min(1)
            yield Loss(ce, terms(ce=ce / count, total=ce))


def smooth_margin(
    logits: Float[Tensor, "B M C"], y: Labels, subset: Bool[Tensor, "B M"], temperature: float
) -> Float[Tensor, " B"]:
    """The smooth minimum over each image's subset of members of their scaled margins.

    Up to smoothing, positive only where every member of the subset errs. A member's margin (best
    wrong logit minus the true one) is measured in standard deviations of its logits.
    """
    flat, labels = logits.flatten(0, 1), y.repeat_interleave(logits.shape[1])
    scale = flat.detach().std(1).clamp_min(TINY)
    gaps = (margin(flat, labels) / scale).view(logits.shape[:2])
    return -temperature * (-gaps / temperature).masked_fill(~subset, -torch.inf).logsumexp(1)


class _Stacked(nn.Module):
    """The logits of all members, concatenated."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, x: Images) -> Float[Tensor, "B MC"]:
        return self.ensemble.member_logits(x).transpose(0, 1).flatten(1)


def _only_first(ensemble: Ensemble) -> None:
    begin_member(0, ensemble, copied=False)


def _copy_to_all(ensemble: Ensemble) -> None:
    for m in range(1, ensemble.num_members):
        copy_member(ensemble, 0, m)
    ensemble.set_mixture(torch.full_like(ensemble.mixture, 1 / ensemble.num_members))
