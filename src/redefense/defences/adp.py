"""ADP: members whose predictions of the wrong classes are diverse.

Source: Pang, Xu, Du, Chen & Zhu, "Improving Adversarial Robustness via Promoting Ensemble
Diversity", ICML 2019: the adaptive diversity promoting regularizer. Per image, then averaged,

    loss = sum_m CE_m - entropy * H(mean probability) - log_det * log det(Mt^T Mt + 1e-6 I),

with Mt the members' probabilities of the wrong classes, each at unit length (`penalties`). The
paper's weights are 2 and 0.5; the released code's flags default to 1 and 0.5, its documented run
uses the paper's.

With `adversarial_training` the loss is taken on clean and on adversarial images, made on the
averaged ensemble by ten steps of eps / 10, with eps drawn for each batch.

Departures from the released code: the determinant is computed in double precision by Cholesky, so
nothing is scaled down to avoid NaN; any number of classes is supported; examples are crafted with
batch norm in evaluation mode, from images whose mean is subtracted once (the released adversarial
script does it twice and clips to a wrong range); nothing is selected on the test set. The
regularizer is differentiated with respect to detached logits first, so only one member's
activations are in memory, at the cost of one more forward pass per member.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from redefense.defences.base import Adversary, CrossEntropyDefence
from redefense.ensembles import Ensemble, frozen_statistics
from redefense.errors import ConfigError
from redefense.limits import not_negative
from redefense.penalties import ensemble_entropy, log_det_diversity
from redefense.radius import Eps
from redefense.rng import drawn
from redefense.runtime.phases import PENALTY, phase
from redefense.types import Batch, Float, Images, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class ADP(CrossEntropyDefence):
    """Adaptive diversity promoting; needs fewer members than classes.

    Attributes:
        entropy: weight of the entropy of the mean probability (the paper's alpha).
        log_det: weight of the log determinant (beta).
        adversarial_training: add the same loss on adversarial images.
        adversary: attack that generates them; its eps is the upper limit.
        smallest_eps: eps is uniform between this and the adversary's.
    """

    summary: ClassVar[str] = (
        "adaptive diversity promoting: diverse predictions of the wrong classes"
    )
    spreads = True

    entropy: float = 2.0
    log_det: float = 0.5
    adversarial_training: bool = False
    adversary: Adversary = field(
        default_factory=lambda: Adversary(eps=0.05, steps=10, step_size=0.1)
    )
    smallest_eps: Eps = 0.01

    def __post_init__(self) -> None:
        not_negative(entropy=self.entropy, log_det=self.log_det)
        if not 0 <= self.smallest_eps <= self.adversary.eps:
            raise ConfigError(
                f"smallest_eps must lie in [0, adversary.eps = {self.adversary.eps}], "
                f"got {self.smallest_eps}"
            )

    def terms(self, ensemble: Ensemble, x: Images, y: Labels) -> dict[str, Tensor]:
        """The loss at given images, as one joint graph over all members.

        Returns:
            `ce`, `entropy` and `log_det` without their weights, `total` with them.
        """
        logits = ensemble.member_logits(x)
        ce = torch.stack([self.cross_entropy(z, y) for z in logits]).sum()
        named = self._diversity(logits, y)
        total = ce + named.pop("bonus")
        return {"ce": ce, **named, "total": total}

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The gradient of `terms`' total, one member's graph at a time."""
        yield from self._parts(ensemble, batch.x, batch.y)
        if self.adversarial_training:
            share = drawn(rng, _uniform, batch.x.device)
            eps = self.smallest_eps + share * (self.adversary.eps - self.smallest_eps)
            x_adv = self.adversary.craft(ensemble.averaged(), batch.x, batch.y, rng, eps=eps)
            yield from self._parts(ensemble, x_adv, batch.y)

    def _parts(self, ensemble: Ensemble, x: Images, y: Labels) -> Iterator[Loss]:
        with phase(PENALTY):
            # the passes of the members below update the statistics, once
            with torch.no_grad(), frozen_statistics(ensemble):
                logits = ensemble.member_logits(x)
            # in bf16 training the cotangents of the logits are not rounded to bf16
            logits = (logits.float() if logits.dtype.itemsize < 4 else logits).requires_grad_()
            named = self._diversity(logits, y)
            bonus = named.pop("bonus")
            (cotangent,) = torch.autograd.grad(bonus, logits)
        logged = {name: value.detach() for name, value in named.items()}
        for m in ensemble.spread.own(ensemble.num_members):
            z = ensemble.logits_of(m, x)
            ce = self.cross_entropy(z, y)
            # logged for one member only: terms of parts are summed
            once = {**logged, "total": ce.detach() + bonus.detach()} if m == 0 else {}
            yield Loss(
                # the product has the gradient of the regularizer through member m
                ce + (z * cotangent[m]).sum(),
                {"ce": ce.detach(), "total": ce.detach(), **once},
            )

    def check(self, ensemble: Ensemble, num_classes: int) -> None:
        _check_members(ensemble.num_members, num_classes)

    def _diversity(self, logits: Float[Tensor, "M B C"], y: Labels) -> dict[str, Tensor]:
        _check_members(logits.shape[0], logits.shape[2])
        entropy, log_det = ensemble_entropy(logits), log_det_diversity(logits, y)
        bonus = -self.entropy * entropy - self.log_det * log_det
        return {"entropy": entropy, "log_det": log_det, "bonus": bonus}


def _check_members(num_members: int, num_classes: int) -> None:
    # vectors of C - 1 wrong classes: from C members on they are dependent, and the determinant is 0
    if num_members >= num_classes:
        raise ConfigError(
            f"adp needs fewer members than classes, got {num_members} members for "
            f"{num_classes} classes: reduce num_members"
        )


def _uniform(rng: torch.Generator) -> Float[Tensor, ""]:
    return torch.rand((), generator=rng, device=rng.device).double()
