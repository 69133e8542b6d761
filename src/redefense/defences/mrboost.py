"""MRBoost: members trained one by one, each to increase the margin of the earlier ones.

Source: Zhang et al., "Building Robust Ensembles via Margin Boosting", ICML 2022, and its released
code. Stage m trains member m alone: examples are made by PGD on the mean **logits** of members 1 to
m, maximising the margin cross-entropy MCE (`penalties`), and member m minimises its own MCE on
them. The variant `individual=False` minimises the MCE of the mean logits instead, through member m.

The epochs of a run are shared equally by the stages (published: 100 each).

Departures from the released code: `individual` can be switched off (there the flag's type makes it
always true); one forward pass for both halves of MCE; any number of classes; no epoch is selected
on the test set. At inference our deterministic view averages probabilities, theirs logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from redefense.defences.base import Adversary, After, CrossEntropyDefence, Stage, terms
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError
from redefense.limits import not_negative
from redefense.penalties import margin_cross_entropy
from redefense.types import Batch, Images, Labels, Logits, Loss


@dataclass(frozen=True, kw_only=True)
class MRBoost(CrossEntropyDefence):
    """Margin boosting.

    Attributes:
        other_weight: weight of the wrong classes in MCE; 0 is cross-entropy.
        individual: the new member's own loss (the method), or that of the mean logits.
        persistent: initialise a new member from the one before it.
        adversary: attack that generates the examples, from random points of half the ball.
    """

    summary: ClassVar[str] = (
        "margin boosting: each new member is trained where the earlier ones err"
    )

    other_weight: float = 1.0
    individual: bool = True
    persistent: bool = False
    adversary: Adversary = field(default_factory=lambda: Adversary(eps=8 / 255))

    def __post_init__(self) -> None:
        not_negative(other_weight=self.other_weight)

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """One stage per member; before its stage a member has probability zero."""
        return one_by_one(
            num_members,
            epochs,
            loss=self.newest,
            before=partial(begin_member, copied=self.persistent),
        )

    def check(self, ensemble: Ensemble, num_classes: int) -> None:
        if self.persistent:
            check_all_alike(ensemble)

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The loss of the last stage, which uses all members."""
        yield from self.newest(ensemble.num_members - 1, ensemble, batch, rng)

    def newest(
        self, m: int, ensemble: Ensemble, batch: Batch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """The loss of stage m, which trains member m."""
        y, view = batch.y, MeanLogits(ensemble, range(m + 1))
        x = boosted_examples(view, batch.x, y, self.adversary, self.other_weight, rng)
        logits = ensemble.logits_of(m, x)
        if not self.individual:
            with torch.no_grad():
                # without graphs: only the new member is trained
                earlier = [ensemble.logits_of(i, x) for i in range(m)]
            logits = torch.stack([*earlier, logits]).mean(0)
        mce = margin_cross_entropy(logits, y, self.other_weight, self.label_smoothing).mean()
        yield Loss(mce, terms(mce=mce, total=mce))


class MeanLogits(nn.Module):
    """The mean of some members' logits."""

    def __init__(self, ensemble: Ensemble, members: Sequence[int]) -> None:
        super().__init__()
        self.ensemble, self.chosen = ensemble, members

    def forward(self, x: Images) -> Logits:
        return torch.stack([self.ensemble.logits_of(m, x) for m in self.chosen]).mean(0)


def boosted_examples(
    victim: nn.Module,
    x: Images,
    y: Labels,
    adversary: Adversary,
    other_weight: float,
    rng: torch.Generator,
) -> Images:
    """PGD examples on the margin cross-entropy, from random points of half the ball."""

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        return margin_cross_entropy(logits, labels, other_weight)

    # as in the code of both methods
    return adversary.craft(victim, x, y, rng, objective=objective, start=0.5)


def one_by_one(
    num_members: int,
    epochs: int,
    *,
    loss: Callable[..., Iterator[Loss]],
    before: Callable[..., None],
    after: Callable[[int], After | None] = lambda m: None,
) -> tuple[Stage, ...]:
    """One stage per member, with equal epochs; earlier stages get the remaining ones.

    Args:
        num_members: M.
        epochs: total of all stages.
        loss: loss of a member, its first argument.
        before: called at the start of a member's stage.
        after: called at its end.

    Raises:
        ConfigError: if a member would get no epoch.
    """
    share, left = divmod(epochs, num_members)
    if share == 0:
        raise ConfigError(
            f"members are trained one after another: {num_members} need at least as many epochs, "
            f"got {epochs}"
        )
    return tuple(
        Stage(
            name=f"member {m + 1}",
            epochs=share + (m < left),
            members=(m,),
            loss=partial(loss, m),
            before=partial(before, m),
            after=after(m),
        )
        for m in range(num_members)
    )


def begin_member(m: int, ensemble: Ensemble, *, copied: bool) -> None:
    """Members up to m are equally probable; m starts as a copy of the one before if `copied`."""
    if copied and m > 0:
        copy_member(ensemble, m - 1, m)
    # later members are untrained and must not answer
    uniform = torch.zeros_like(ensemble.mixture)
    uniform[: m + 1] = 1 / (m + 1)
    ensemble.set_mixture(uniform)


def copy_member(ensemble: Ensemble, source: int, target: int) -> None:
    """Copy the parameters and buffers of member `source` to member `target`.

    Raises:
        ConfigError: if their shapes differ.
    """
    check_alike(ensemble, source, target)
    with torch.no_grad():
        pairs = zip(_tensors(ensemble, source), _tensors(ensemble, target), strict=True)
        for value, place in pairs:
            place.copy_(value)


def check_all_alike(ensemble: Ensemble) -> None:
    """Check that every member could start from the first; errors as in `copy_member`."""
    for m in range(1, ensemble.num_members):
        check_alike(ensemble, 0, m)


def check_alike(ensemble: Ensemble, source: int, target: int) -> None:
    """Check that one member could start from another; errors as in `copy_member`."""
    shapes = ([value.shape for value in _tensors(ensemble, m)] for m in (source, target))
    if next(shapes) != next(shapes):
        raise ConfigError(
            f"this method starts member {target + 1} as a copy of member {source + 1}, but their "
            "tensors have other shapes: give networks of one architecture, or choose "
            "another method, e.g. at"
        )


def _tensors(ensemble: Ensemble, m: int) -> list[Tensor]:
    """The parameters and buffers of member m."""
    buffers = [
        # by name, since `member(m)` of a `Hyper` is a copy
        value
        for name, value in ensemble.named_buffers()
        if name.startswith(f"members.{m}.")
    ]
    return [*ensemble.parameters_of(m), *buffers]
