"""TRS: members with dissimilar input gradients that are small in the worst case nearby.

Source: Yang et al., "TRS: Transferability Reduced Ensemble via Promoting Gradient Diversity and
Model Smoothness", NeurIPS 2021, and the code released with it. With s the mean pairwise |cosine|
of input gradients on clean images and x' the point of an L-inf ball around x where the members'
gradients are largest:

| preset | cross-entropy over members | similarity | smoothness |
|---|---|---|---|
| printed | mean | s(x) | 2 * mean over members and images of |g(x')| |
| released | sum | s(x) | mean over members of 2 |grad of batch-mean CE|^2, half x, half x' |

The 2 comes from the paper's mean over pairs of S_i + S_j. Published weights for CIFAR-10 are 40 and
2.5, with the ball growing linearly from 0.01 to 0.03 over the epochs (the authors' answer to a
question about their code). In the released form the smoothness is then about a hundredth of the
cross-entropy or less, in the printed form many times as large: recipes state which they use.

x' is shared by all members and found by six steps of a third of the radius from a random start,
maximising the mean over members of |g|^2. This needs second derivatives at each step, in the
precision of the run. With `warm_start` the first epochs train undefended members (the released
code's optional resume from them).

Departures from the released code: any number of members (it has three, by index); gradients of the
search do not accumulate over its steps; no weight gradients inside it; it runs with batch norm in
evaluation mode; the released form always uses x' (the released commands compute and discard it).
The separate maximum for each member in the printed form is replaced by the shared x', as in the
code.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.attacks.base import OracleResult
from redefense.attacks.gradient import check_steps, climb, random_starts
from redefense.defences.base import CrossEntropyDefence, Stage
from redefense.defences.coupled import DIFFERENTIATE, Coupled
from redefense.defences.vanilla import after_plain
from redefense.ensembles import Ensemble, evaluating, frozen_weights
from redefense.limits import not_negative, one_of, within
from redefense.networks import differentiable_twice, differentiating
from redefense.penalties import gradient_similarity, lipschitz, squared_lipschitz
from redefense.radius import Eps
from redefense.runtime.phases import EXAMPLES, phase
from redefense.threat import Threat
from redefense.types import Batch, Images, Labels, Loss


@dataclass(frozen=True, kw_only=True)
class TRS(CrossEntropyDefence):
    """Transferability Reduced Smooth ensemble.

    Attributes:
        preset: printed or released, see the module's table.
        similarity: weight of the gradients' similarity.
        smoothness: weight of their norm at x'.
        first_eps: radius of the ball around an image in the first epoch, in pixel units.
        last_eps: radius reached after the last epoch, by equal increments.
        steps: steps of the search for x'.
        step_size: length of its steps, as a fraction of the radius.
        warm_start: fraction of the epochs that train undefended members first.
        differentiate: "exact" double backward, or "finite" differences of losses.
    """

    summary: ClassVar[str] = (
        "transferability reduced smoothness: dissimilar gradients, small in the worst case nearby"
    )
    spreads = True

    preset: str = "released"
    similarity: float = 40.0
    smoothness: float = 2.5
    first_eps: Eps = 0.01
    last_eps: Eps = 0.03
    steps: int = 6
    step_size: float = 1 / 3
    warm_start: float = 0.0
    differentiate: str = "exact"

    def __post_init__(self) -> None:
        one_of("preset", self.preset, _SMOOTHNESS)
        not_negative(similarity=self.similarity, smoothness=self.smoothness)
        within("[0, 1]", first_eps=self.first_eps, last_eps=self.last_eps)
        check_steps(self.steps, self.step_size)
        within("[0, 1)", warm_start=self.warm_start)
        one_of("differentiate", self.differentiate, DIFFERENTIATE)

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """Undefended members for the fraction `warm_start` of the epochs, then the method."""
        return after_plain(
            "trs", self.loss, num_members=num_members, epochs=epochs, share=self.warm_start,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def terms(self, ensemble: Ensemble, x: Images, y: Labels, rough: Tensor) -> dict[str, Tensor]:
        """The loss, as one joint graph over all members.

        Args:
            ensemble: M members, used in their current mode.
            x: clean images.
            y: labels.
            rough: x', one point per image, as `x`; the released preset uses rows B // 2 onwards.

        Returns:
            `ce`, `similarity` and `smoothness` without their weights, `total` with them.
        """
        return self._coupled(ensemble.num_members, x, y, rough).joint(ensemble)

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The gradient of `terms`' total, one member's graph at a time."""
        x, y = batch.x, batch.y
        # the released loss reads x' for the second half only
        first = 0 if self.preset == "printed" else len(x) // 2
        eps = self.eps(batch.progress.epoch, batch.progress.epochs)
        rough = x.clone()
        rough[first:] = self.search(ensemble, x[first:], y[first:], eps, rng)
        coupled = self._coupled(ensemble.num_members, x, y, rough)
        yield from coupled.parts(ensemble, self.differentiate)

    def eps(self, epoch: int, epochs: int) -> float:
        """Radius of the ball in an epoch, counted from 0."""
        return self.first_eps + (self.last_eps - self.first_eps) * epoch / epochs

    def search(
        self, ensemble: Ensemble, x: Images, y: Labels, eps: float, rng: torch.Generator
    ) -> Images:
        """The points of the ball that maximise the sum of the members' squared gradient norms."""
        threat = Threat(eps=eps)
        unknown = torch.zeros(len(x), device=x.device)  # the objective is not used

        def oracle(point: Images, with_grad: bool) -> OracleResult:
            return OracleResult(unknown, unknown, roughness_gradient(ensemble, point, y))

        with evaluating(ensemble), frozen_weights(ensemble), phase(EXAMPLES):
            return climb(
                oracle, random_starts(x, y, threat, rng)(), x, threat,
                steps=self.steps, step_size=self.step_size * eps,
            )  # fmt: skip

    def _coupled(self, num_members: int, x: Images, y: Labels, rough: Images) -> Coupled:
        half = len(x) // 2
        released = self.preset == "released"
        return Coupled(
            y=y,
            ce_images=x,
            label_smoothing=self.label_smoothing,
            ce_weight=1.0 if released else 1 / num_members,
            points=(x, torch.cat([x[:half], rough[half:]]) if released else rough),
            penalty=lambda clean, worst: {
                "similarity": gradient_similarity(clean),
                "smoothness": _SMOOTHNESS[self.preset](worst),
            },
            weights={"similarity": self.similarity, "smoothness": self.smoothness},
        )


def roughness_gradient(ensemble: Ensemble, x: Images, y: Labels) -> Images:
    """Gradient in x of the sum over members and images of |g|^2, one member's graph at a time.

    Half precision suffices: only its sign is used, and the search reaches the same objective.
    """
    spread, parts = ensemble.spread, []
    with torch.enable_grad():
        for m in spread.own(ensemble.num_members):
            point = x.detach().requires_grad_()
            with differentiable_twice(), differentiating():
                loss = F.cross_entropy(ensemble.logits_of(m, point), y, reduction="sum")
                (grad,) = torch.autograd.grad(loss, point, create_graph=True)
                part = torch.zeros_like(x)
                if grad.requires_grad:  # constant where the loss is linear
                    part = torch.autograd.grad(grad.square().sum(), point)[0]
            parts.append(part)
    total = torch.zeros_like(x)
    # one by one in the order of members, so that the bits do not depend on the processes
    for part in spread.members(torch.stack(parts)):
        total += part
    return total


def _printed_smoothness(grads: Tensor) -> Tensor:
    return 2 * lipschitz(grads)


_SMOOTHNESS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {"printed": _printed_smoothness, "released": squared_lipschitz}
)
