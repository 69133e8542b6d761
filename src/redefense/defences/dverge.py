"""DVERGE: members trained on images with distilled features that fool the other members.

Source: Yang et al., "DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of
Ensembles", NeurIPS 2020, and its released code. For member j, a layer l, an image x and another
image t, the distilled image is close to x while the layer's features are those of t:

    x'_j = argmin over |z - x|_inf <= eps of |f_j^l(z) - f_j^l(t)|^2,

by ten momentum sign steps from x. Member i then minimises the sum over j != i of CE(f_i(x'_j), y);
clean images are not used. With `adversarial_training` it adds CE on its own PGD examples.

The layer (before its activation; the last one is the logits) is drawn once per epoch and is the
same for all members. Training starts from plain members, for `start` of the epochs (published: 200
and 200 epochs).

Departures from the released code: any network with feature taps; targets are other images of the
same batch, which a random roll pairs, so no image is its own target; features of the targets are
computed once; batch norm is in evaluation mode while images are distilled or attacked; no weight
gradients there. The paper names Adam, the code uses SGD: recipes follow the code.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from redefense.attacks.base import OracleResult, input_gradient
from redefense.attacks.gradient import check_steps, climb
from redefense.defences.base import Adversary, CrossEntropyDefence, Stage, terms
from redefense.defences.vanilla import after_plain
from redefense.ensembles import Ensemble, evaluating, frozen_weights
from redefense.errors import ConfigError
from redefense.limits import not_negative, within
from redefense.models import Tapped
from redefense.radius import Eps
from redefense.rng import drawn, stream
from redefense.runtime.phases import EXAMPLES, phase
from redefense.threat import Threat
from redefense.types import Batch, Images, Int, Loss


@dataclass(frozen=True, kw_only=True)
class DVERGE(CrossEntropyDefence):
    """Diversified vulnerabilities by mutual distillation; needs at least two members.

    Attributes:
        weight: of the loss on distilled images; used with `adversarial_training` only.
        eps: radius of the distillation, in pixel units; published 0.07 for 3 members, 0.05 for 5
            and 8.
        steps: steps of the distillation.
        step_size: length of its steps, as a fraction of eps (published: 0.007 of 0.07).
        start: fraction of the epochs that train undefended members first.
        adversarial_training: add the cross-entropy on each member's own adversarial examples.
        adversary: attack that generates these.
    """

    summary: ClassVar[str] = "members learn from images with features that fool the others"

    weight: float = 1.0
    eps: Eps = 0.07
    steps: int = 10
    step_size: float = 0.1
    start: float = 0.5
    adversarial_training: bool = False
    adversary: Adversary = field(default_factory=lambda: Adversary(eps=8 / 255))

    def __post_init__(self) -> None:
        not_negative(weight=self.weight)
        if self.weight != 1 and not self.adversarial_training:
            raise ConfigError(
                "weight balances two losses, of which there is one without adversarial_training: "
                f"omit it, got {self.weight}"
            )
        within("[0, 1]", eps=self.eps)
        check_steps(self.steps, self.step_size)
        within("[0, 1)", start=self.start)

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """Undefended members for the fraction `start` of the epochs, then the method.

        Raises:
            ConfigError: for fewer than two members.
        """
        if num_members < 2:
            raise ConfigError(f"dverge needs at least 2 members, got {num_members}")
        return after_plain(
            "dverge", self.loss, num_members=num_members, epochs=epochs, share=self.start,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """One part for each pair of a trained member and a member whose features it learns from."""
        num_members, y = ensemble.num_members, batch.y
        distilled = [] if self.weight == 0 else self.distil(ensemble, batch, rng)
        # all examples are made before the first backward pass
        own = (
            self.adversary.craft_own(ensemble, batch.x, y, rng) if self.adversarial_training else []
        )
        for m in range(num_members):
            for source, x in enumerate(distilled):
                if source == m:
                    continue
                ce = self.cross_entropy(ensemble.logits_of(m, x), y)
                mean = ce / (num_members * (num_members - 1))
                yield Loss(self.weight * ce, terms(distilled=mean, total=self.weight * ce))
            if own:
                ce = self.cross_entropy(ensemble.logits_of(m, own[m]), y)
                yield Loss(ce, terms(adversarial=ce / num_members, total=ce))

    def distil(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> list[Images]:
        """x'_j of each member j: images of the batch with the features of other images."""
        x, size = batch.x, len(batch.x)

        def shift(rng: torch.Generator) -> Int[Tensor, ""]:
            # from 1, so that no image is its own target; a batch of one has no other
            return torch.randint(1, max(size, 2), (), generator=rng, device=rng.device)

        roll = drawn(rng, shift, x.device)
        target = x.index_select(0, (torch.arange(size, device=x.device) - roll) % size)
        layer = _layer(batch.progress.seed)
        return [
            self._distil(ensemble.member(m), x, target, layer) for m in range(ensemble.num_members)
        ]

    def check(self, ensemble: Ensemble, num_classes: int) -> None:
        for m in range(ensemble.num_members):
            _tapped(ensemble.member(m))

    def _distil(self, member: nn.Module, x: Images, target: Images, layer: float) -> Images:
        """Move x, within eps, towards the target's features at a relative depth in [0, 1)."""
        net = _tapped(member)
        # a relative depth suits members of different depths
        name = net.tap_names[int(layer * len(net.tap_names))]

        def oracle(point: Images, with_grad: bool) -> OracleResult:
            point = point.detach().requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                # per image; its scale has no effect, since gradients are normalised
                apart = (net.tap(point, name) - wanted).square().flatten(1).mean(1)
            grad = input_gradient(-apart, point) if with_grad else None
            return OracleResult(-apart.detach(), torch.zeros_like(apart).detach(), grad)

        with evaluating(member), frozen_weights(member), phase(EXAMPLES):
            with torch.no_grad():
                wanted = net.tap(target, name)
            return climb(
                oracle, x, x, Threat(eps=self.eps),
                steps=self.steps, step_size=self.step_size * self.eps, decay=1.0,
            ).detach()  # fmt: skip


def _tapped(net: nn.Module) -> Tapped:
    if not isinstance(net, Tapped):
        raise ConfigError(f"dverge needs networks with feature taps, {type(net).__name__} has none")
    return net


@lru_cache(maxsize=1)  # shared by the steps of an epoch; a recorded step must not draw
def _layer(seed: int) -> float:
    """Relative depth, in [0, 1), of the layer whose features an epoch uses."""
    return torch.rand((), generator=stream(seed, "layer")).item()
