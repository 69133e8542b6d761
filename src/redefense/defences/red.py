"""RED: members with dissimilar, small input gradients; a random one answers each query.

Source: "RED: Efficiently Boosting Ensemble Robustness via Random Sampling Inference", Eqs. 2-4, 12,
13, and the code released with it. With s the mean pairwise |cosine| and n the mean norm of the
members' per-image input gradients (`penalties`), x^ one adversarial example per image on the
averaged ensemble:

| preset | cross-entropy over members | similarity | Lipschitz | x^ |
|---|---|---|---|---|
| printed | mean | s(x) + s(x^) | (n(x) + n(x^)) / 2 | whole batch |
| released | sum | s(x) | mean 2 |grad of batch-mean CE|^2 on half/half | second half |
| calibrated | mean | s(clean half) + s(adversarial half) | n on half/half | second half |

Departures from the released code: the leading minus of Eq. 4 is read as a misprint (similarity is
penalised); examples are crafted with batch norm in evaluation mode; only forward passes of the
cross-entropy update its running statistics. With weight 10 the printed Lipschitz term is about 45
times the cross-entropy and the released one about a thousandth of it; `calibrated` was chosen on a
validation split.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final, cast

import torch
from torch import Tensor

from redefense.defences.base import Adversary, CrossEntropyDefence
from redefense.defences.coupled import DIFFERENTIATE, Coupled
from redefense.ensembles import Ensemble
from redefense.errors import InputError
from redefense.limits import not_negative, one_of
from redefense.penalties import gradient_similarity, lipschitz, squared_lipschitz
from redefense.types import Batch, Float, Images, Labels, Loss

WEIGHTS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {"printed": (10.0, 10.0), "released": (10.0, 10.0), "calibrated": (0.1, 0.5)}
)
"""Weights of similarity and Lipschitz of each preset; "calibrated" was chosen by this project."""

WITH_ADVERSARIAL_TRAINING: Final = (0.03, 0.03)
"""Weights of `calibrated` with adversarial training. Its cross-entropy falls slowly; with the
weights above, two of three members on the digits collapsed to zero gradients, which have no
penalty. Chosen on the digits' validation split.
"""


ROOM: Final = 4
"""Graphs of this many members for a batch, with frozen weights, need no more memory than the second
derivative of one member: counted for ResNet-8, 20 and 18 in both precisions.
"""


@dataclass(frozen=True, kw_only=True)
class RED(CrossEntropyDefence):
    """Random Ensemble Defence.

    Attributes:
        preset: version of the loss, see the module's table.
        similarity: weight of the similarity term; the preset's by default, for `calibrated` a
            smaller one with adversarial training.
        lipschitz: weight of the Lipschitz term; default as for `similarity`.
        adversary: attack that generates x^ on the averaged ensemble.
        adversarial_training: compute cross-entropy and similarity on each member's own adversarial
            examples instead of clean images (Table 3).
        differentiate: "exact" double backward, or "finite" differences of losses.
    """

    summary: ClassVar[str] = (
        "Random Ensemble Defence: dissimilar and small input gradients, one random member a query"
    )
    randomized: ClassVar[bool] = True
    spreads = True

    preset: str = "calibrated"
    similarity: float | None = None
    lipschitz: float | None = None
    adversary: Adversary = field(default_factory=Adversary)
    adversarial_training: bool = False
    differentiate: str = "exact"

    def __post_init__(self) -> None:
        one_of("preset", self.preset, WEIGHTS)
        one_of("differentiate", self.differentiate, DIFFERENTIATE)
        weights = WEIGHTS[self.preset]
        if self.adversarial_training and self.preset == "calibrated":
            weights = WITH_ADVERSARIAL_TRAINING
        for name, default in zip(("similarity", "lipschitz"), weights, strict=True):
            if getattr(self, name) is None:
                # filled in, so that a stored run keeps its weights if the defaults change
                object.__setattr__(self, name, default)
            not_negative(**{name: getattr(self, name)})

    def terms(
        self,
        ensemble: Ensemble,
        x: Images,
        y: Labels,
        x_adv: Tensor,
        x_own: Float[Tensor, "M B ch H W"] | None = None,
    ) -> dict[str, Tensor]:
        """The loss, as one joint graph over all members.

        Args:
            ensemble: M members, used in their current mode.
            x: clean images.
            y: labels.
            x_adv: one example per image, as `x`; presets with a half batch use rows B // 2 onwards.
            x_own: with `adversarial_training`, each member's own examples.

        Returns:
            `ce`, `similarity` and `lipschitz` without their weights, `total` with them.
        """
        return self._coupled(ensemble.num_members, x, y, x_adv, x_own).joint(ensemble)

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """The gradient of `terms`' total, one member's graph at a time."""
        x, y = batch.x, batch.y
        first = 0 if self.preset == "printed" else len(x) // 2
        x_adv = x.clone()
        # only the half that the loss reads is attacked
        x_adv[first:] = self.adversary.craft(
            ensemble.averaged(), x[first:], y[first:], rng, room=ROOM * len(x)
        )
        own = None
        if self.adversarial_training:
            own = torch.stack(self.adversary.craft_own(ensemble, x, y, rng))
        coupled = self._coupled(ensemble.num_members, x, y, x_adv, own)
        yield from coupled.parts(ensemble, self.differentiate)

    def _coupled(
        self, num_members: int, x: Images, y: Labels, x_adv: Tensor, x_own: Tensor | None
    ) -> Coupled:
        if x_adv.shape != x.shape:
            raise InputError(
                f"x_adv must have the shape of x, {tuple(x.shape)}, got {tuple(x_adv.shape)}"
            )
        if self.adversarial_training and x_own is None:
            raise InputError("adversarial_training needs x_own, each member's own examples")
        half = len(x) // 2
        # an odd image belongs to the adversarial half
        mixed = torch.cat([x[:half], x_adv[half:]])
        # a list: one batch of images for each member
        clean = x if x_own is None else list(x_own)
        points: tuple[Tensor | list[Tensor], ...]
        if self.preset == "printed":
            # adversarial training replaces the images of cross-entropy and similarity only
            points = (clean, x_adv) if x_own is None else (clean, x_adv, x)
        elif self.preset == "released":
            points = (clean, mixed)
        elif x_own is None:
            points = (mixed,)
        else:
            points = ([torch.cat([own[:half], x_adv[half:]]) for own in x_own], mixed)
        return Coupled(
            y=y,
            ce_images=clean,
            label_smoothing=self.label_smoothing,
            ce_weight=1.0 if self.preset == "released" else 1 / num_members,
            points=points,
            penalty=_PENALTIES[self.preset],
            weights={
                "similarity": cast(float, self.similarity),
                "lipschitz": cast(float, self.lipschitz),
            },
        )


def _printed(clean: Tensor, adversarial: Tensor, smooth: Tensor | None = None) -> dict[str, Tensor]:
    smooth = clean if smooth is None else smooth
    return {
        "similarity": gradient_similarity(clean) + gradient_similarity(adversarial),
        "lipschitz": (lipschitz(smooth) + lipschitz(adversarial)) / 2,
    }


def _released(clean: Tensor, mixed: Tensor) -> dict[str, Tensor]:
    return {"similarity": gradient_similarity(clean), "lipschitz": squared_lipschitz(mixed)}


def _calibrated(mixed: Tensor, smooth: Tensor | None = None) -> dict[str, Tensor]:
    half = mixed.shape[1] // 2
    return {
        "similarity": gradient_similarity(mixed[:, :half]) + gradient_similarity(mixed[:, half:]),
        "lipschitz": lipschitz(mixed if smooth is None else smooth),
    }


_PENALTIES: Final[Mapping[str, Callable[..., dict[str, Tensor]]]] = MappingProxyType(
    {"printed": _printed, "released": _released, "calibrated": _calibrated}
)
