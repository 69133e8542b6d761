"""Base class of defences: settings, and the loss of each training stage."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.attacks.gradient import climb, gradient_oracle, random_starts
from redefense.attacks.objectives import OBJECTIVES
from redefense.config import Eps, Smoothing, check_linf
from redefense.ensembles import Averaged, Ensemble, evaluating, frozen_weights
from redefense.errors import ConfigError
from redefense.networks import Asked
from redefense.rng import seed_from
from redefense.runtime.phases import EXAMPLES, phase
from redefense.threat import Threat
from redefense.types import Batch, Float, Images, Labels, Logits, Loss

LossFn = Callable[[Ensemble, Batch, torch.Generator], Iterator[Loss]]
Before = Callable[[Ensemble], None]
After = Callable[[Ensemble, Iterator[Batch], torch.Generator], None]

GRAPHS: Final = 3
"""So many members' graphs of the crafted images take no more memory than one member's training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adversary:
    """Who makes the training examples: PGD on cross-entropy (Madry et al., 2018).

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps.
        step_size: length of a step as a fraction of eps.
    """

    eps: Eps = 0.03
    steps: int = 10
    step_size: float = 0.25

    def __post_init__(self) -> None:
        check_linf(self.eps, "adversary.eps")
        if self.steps < 1:
            raise ConfigError(f"adversary.steps must be at least 1, got {self.steps}")
        if not self.step_size > 0:
            raise ConfigError(f"adversary.step_size must be positive, got {self.step_size}")

    def craft(
        self,
        victim: nn.Module,
        x: Images,
        y: Labels,
        rng: torch.Generator,
        *,
        room: int | None = None,
        eps: Float[Tensor, ""] | None = None,
    ) -> Images:
        """Detached adversarial examples; batch norm in evaluation mode, weights' gradients off.

        Against the average of many members few images are attacked at once, so that the graphs of
        all members fit into the memory that training one member takes: `room` images' graphs
        through one member, `GRAPHS` times those attacked unless said. `eps` is a radius that lies
        on the device, in place of the adversary's own.
        """
        if len(x) == 0:
            return x
        threat = Threat(eps=self.eps)
        if eps is not None:
            threat = threat.with_radius(eps)
        room = GRAPHS * len(x) if room is None else room
        size = _images_at_once(victim, len(x), room)
        seed = seed_from(rng)  # of streams that are the images' own: parts change nothing
        crafted = []
        with evaluating(victim), frozen_weights(victim), phase(EXAMPLES):
            for images, labels in zip(x.split(size), y.split(size), strict=True):
                crafted.append(
                    climb(
                        gradient_oracle(victim, labels, OBJECTIVES["cross_entropy"]),
                        random_starts(images, labels, threat, seed)(),
                        images,
                        threat,
                        steps=self.steps,
                        step_size=self.step_size * threat.eps,
                    ).detach()
                )
        return torch.cat(crafted)

    def craft_own(
        self, ensemble: Ensemble, x: Images, y: Labels, rng: torch.Generator
    ) -> list[Images]:
        """Each member's own examples; for members trained in another process, the images."""
        own = ensemble.spread.own(ensemble.num_members)
        examples = []
        for m in range(ensemble.num_members):
            if m in own:
                examples.append(self.craft(Asked(ensemble.member(m)), x, y, rng))
            else:
                seed_from(rng)  # as the attack would: who crafts must not change what is crafted
                examples.append(x)
        return examples


def _images_at_once(victim: nn.Module, count: int, room: int) -> int:
    if not isinstance(victim, Averaged):
        return count
    ensemble = victim.ensemble
    # processes that have fewer members than others cut the batch as those do: they craft together
    return max(1, min(count, room // ensemble.spread.most(ensemble.num_members)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of training: who learns, for how long, from which loss.

    Attributes:
        name: what errors and logs call it; unique within a run.
        epochs: passes over the training split.
        members: whose parameters the optimizer owns.
        loss: yields parts whose gradients add up; each is backpropagated before the next is made.
        before: prepares the ensemble at the stage's start; must give the same if done twice.
        after: finishes it at the stage's end, given batches of training images.
    """

    name: str
    epochs: int
    members: tuple[int, ...]
    loss: LossFn
    before: Before | None = None
    after: After | None = None


@dataclass(frozen=True, kw_only=True)
class Defence(ABC):
    """A training method. Subclasses are final, hold settings only and are one file each.

    Attributes:
        summary: one line for `redefense list defences`.
        randomized: whether the method answers queries by a member drawn at random; if not, its
            deterministic form is the averaged ensemble.
    """

    summary: ClassVar[str] = ""
    randomized: ClassVar[bool] = False

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """One joint stage of all members, unless a method says otherwise."""
        everyone = tuple(range(num_members))
        return (Stage(name="joint", epochs=epochs, members=everyone, loss=self.loss),)

    @property
    def spreads(self) -> bool:
        """Whether processes can share the members: the loss asks `ensemble.spread` for its own."""
        return False

    @abstractmethod
    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """Yield the loss of one batch in parts."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropyDefence(Defence):
    """A method that trains on the cross-entropy with the labels, which may be smoothed.

    Adversaries, and penalties on input gradients, look at the cross-entropy with the plain labels.

    Attributes:
        label_smoothing: the share of each label that is spread evenly over all classes.
    """

    label_smoothing: Smoothing = 0.0

    def cross_entropy(self, logits: Logits, y: Labels) -> Float[Tensor, ""]:
        """The mean over images, to be trained on."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


def terms(**values: Tensor) -> dict[str, Tensor]:
    """Detached scalars for the log."""
    return {name: value.detach() for name, value in values.items()}


def check_weights(**values: float) -> None:
    """Refuse weights that are negative or not finite.

    Raises:
        ConfigError: naming the setting and its value.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be finite and at least 0, got {value}")
