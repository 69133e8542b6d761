"""GAL: members with dissimilar input gradients.

Source: Kariyappa & Qureshi, "Improving Adversarial Robustness of Ensembles with Diversity
Training", 2019, the gradient alignment loss. With c_ij[b] the signed cosine between the input
gradients of members i and j,

    loss = R_m CE_m + weight * mean_b log sum_{i<j} exp c_ij[b].

No code of the authors is known, so presets are named after the reimplementations:

| preset | R, cross-entropy over members | noise |
|---|---|---|
| dverge (the code of DVERGE) | mean | half of the images get N(0, 0.045^2) |
| trs (the code of TRS and RED) | sum | none |

It needs members with leaky ReLU (`ensemble.activation=leaky`, as the recipes set it): with ReLU the
penalty trains active units alone. The authors of the trs version omit it, too.

Departures: one forward pass serves cross-entropy and gradients (DVERGE's code makes two, which also
updates batch norm twice), and images with noise are clamped to [0, 1].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final

import torch
from torch import Tensor

from redefense.defences.base import CrossEntropyDefence
from redefense.defences.coupled import DIFFERENTIATE, Coupled
from redefense.ensembles import Ensemble
from redefense.limits import not_negative, one_of
from redefense.penalties import gradient_alignment
from redefense.rng import drawn
from redefense.runtime.spread import SINGLE_PROCESS, Spread
from redefense.threat import per_image
from redefense.types import Batch, Float, Images, Labels, Loss

NOISE: Final[Mapping[str, float]] = MappingProxyType({"dverge": 0.045, "trs": 0.0})
"""Standard deviation of each preset's noise, in pixel units."""


@dataclass(frozen=True, kw_only=True)
class GAL(CrossEntropyDefence):
    """Gradient alignment loss.

    Attributes:
        preset: dverge or trs, see the module's table.
        weight: weight of the alignment; 0.5 in all published code.
        noise: standard deviation of the noise added to each image with probability 1/2; the
            preset's unless given.
        differentiate: "exact" double backward, or "finite" differences of losses.
    """

    summary: ClassVar[str] = "gradient alignment loss: dissimilar input gradients"
    spreads = True

    preset: str = "dverge"
    weight: float = 0.5
    noise: float | None = None
    differentiate: str = "exact"

    def __post_init__(self) -> None:
        one_of("preset", self.preset, NOISE)
        if self.noise is None:
            # filled in, so that a stored run keeps its noise if the defaults change
            object.__setattr__(self, "noise", NOISE[self.preset])
        not_negative(weight=self.weight, noise=self.noise or 0.0)
        one_of("differentiate", self.differentiate, DIFFERENTIATE)

    def terms(self, ensemble: Ensemble, x: Images, y: Labels) -> dict[str, Tensor]:
        """The loss at given images: `ce`, `alignment` without its weight, `total` with it."""
        return self._coupled(ensemble.num_members, x, y).joint(ensemble)

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The gradient of `terms`' total at noisy images, one member's graph at a time."""
        x = with_noise(batch.x, self.noise or 0.0, rng, ensemble.spread)
        coupled = self._coupled(ensemble.num_members, x, batch.y)
        yield from coupled.parts(ensemble, self.differentiate)

    def _coupled(self, num_members: int, x: Images, y: Labels) -> Coupled:
        return Coupled(
            y=y,
            ce_images=x,
            label_smoothing=self.label_smoothing,
            ce_weight=1 / num_members if self.preset == "dverge" else 1.0,
            points=(x,),
            penalty=lambda grads: {"alignment": gradient_alignment(grads)},
            weights={"alignment": self.weight},
        )


def with_noise(
    x: Images, deviation: float, rng: torch.Generator, spread: Spread = SINGLE_PROCESS
) -> Images:
    """Images of which each gets Gaussian noise with probability 1/2, clamped to [0, 1].

    The noise is drawn for the whole batch, of which `x` may be one process's part.
    """
    if deviation == 0:
        return x
    size, rows = spread.rows(len(x))
    shape = (size, *x.shape[1:])

    def normal(rng: torch.Generator) -> Images:
        return torch.randn(shape, generator=rng, device=rng.device, dtype=x.dtype)[rows]

    def uniform(rng: torch.Generator) -> Float[Tensor, " B"]:
        return torch.rand(size, generator=rng, device=rng.device)[rows]

    noise, share = drawn(rng, normal, x.device), drawn(rng, uniform, x.device)
    noisy = (x + deviation * noise).clamp(0.0, 1.0)
    return torch.where(per_image(share < 0.5, x), noisy, x)
