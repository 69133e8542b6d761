"""Base class of defences: settings, and the loss of each training stage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.attacks.gradient import climb, gradient_oracle, random_starts
from redefense.attacks.objectives import OBJECTIVES, Objective
from redefense.config import Smoothing
from redefense.ensembles import Averaged, Ensemble, evaluating, frozen_weights
from redefense.errors import ConfigError
from redefense.limits import at_least, positive
from redefense.networks import Queried
from redefense.radius import Eps, check_linf
from redefense.rng import seed_from
from redefense.runtime.phases import EXAMPLES, phase
from redefense.threat import Threat
from redefense.types import Batch, Float, Images, Labels, Logits, Loss

LossFn = Callable[[Ensemble, Batch, torch.Generator], Iterator[Loss]]
Before = Callable[[Ensemble], None]
After = Callable[[Ensemble, Iterator[Batch], torch.Generator], None]

GRAPHS: Final = 3
"""Graphs of this many members for the attacked images need no more memory than training one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adversary:
    """Attack that generates the training examples, on cross-entropy unless a method overrides it.

    Attributes:
        attack: "pgd" (Madry et al., 2018; with steps=1 and step_size=1.25 the one-step adversary of
            Wong, Rice & Kolter, 2020); or "n-fgsm" (de Jorge et al., 2022): one step of length eps
            from noise of up to 2 eps, which leaves the ball and is clamped to [0, 1] alone.
        eps: radius of the ball, in pixel units of [0, 1].
        steps: gradient steps.
        step_size: length of a step as a fraction of eps.
    """

    attack: Literal["pgd", "n-fgsm"] = "pgd"
    eps: Eps = 0.03
    steps: int = 10
    step_size: float = 0.25

    def __post_init__(self) -> None:
        check_linf(self.eps, "adversary.eps")
        at_least(1, **{"adversary.steps": self.steps})
        positive(**{"adversary.step_size": self.step_size})
        if self.attack == "n-fgsm" and (self.steps, self.step_size) != (1, 1):
            raise ConfigError(
                "adversary.attack=n-fgsm takes one step of length eps: set adversary.steps=1 and "
                f"adversary.step_size=1, got {self.steps} and {self.step_size}"
            )

    def craft(
        self,
        victim: nn.Module,
        x: Images,
        y: Labels,
        rng: torch.Generator,
        *,
        room: int | None = None,
        eps: Float[Tensor, ""] | None = None,
        objective: Objective | None = None,
        start: float = 1.0,
    ) -> Images:
        """Detached adversarial examples; batch norm in evaluation mode, weights' gradients off.

        The average of many members is attacked in parts, so that the graphs of all members fit into
        the memory that training one member needs: `room` images through one member (default:
        `GRAPHS` times the images attacked). `eps` is a radius on the device that replaces the
        adversary's; `objective` replaces cross-entropy; PGD's random starts lie in a ball of
        `start` times eps.
        """
        if len(x) == 0:
            return x
        radius = self.eps if eps is None else eps
        ball, starts, length = 1.0, start, self.step_size
        if self.attack == "n-fgsm":
            ball, starts, length = 3.0, 2.0, 1.0  # no step of eps leaves three times the ball
        # the ball of the steps and the ball of the starts differ for n-fgsm, and for boosting
        threat, noise = _ball(radius, ball), _ball(radius, starts)
        # counted in images through one member, the unit in which memory grows
        room = GRAPHS * len(x) if room is None else room
        size = _images_at_once(victim, len(x), room)
        seed = seed_from(rng)  # every image has its own stream: results do not depend on the parts
        crafted = []
        with evaluating(victim), frozen_weights(victim), phase(EXAMPLES):
            for images, labels in zip(x.split(size), y.split(size), strict=True):
                crafted.append(
                    # the last point, as in published trainings: the best one costs another pass
                    climb(
                        gradient_oracle(victim, labels, objective or OBJECTIVES["cross_entropy"]),
                        random_starts(images, labels, noise, seed)(),
                        images,
                        threat,
                        steps=self.steps,
                        step_size=length * radius,
                    ).detach()
                )
        return torch.cat(crafted)

    def craft_own(
        self, ensemble: Ensemble, x: Images, y: Labels, rng: torch.Generator
    ) -> list[Images]:
        """Examples for each member; for members trained in another process, the clean images."""
        own = ensemble.spread.own(ensemble.num_members)
        examples = []
        for m in range(ensemble.num_members):
            if m in own:
                examples.append(self.craft(Queried(ensemble.member(m)), x, y, rng))
                continue
            # as the attack does: examples must not depend on the process that makes them
            seed_from(rng)
            examples.append(x)
        return examples


def _ball(radius: float | Tensor, times: float) -> Threat:
    """A ball of `times` the radius, at most as wide as the images' range."""
    if isinstance(radius, Tensor):
        # a radius on the device is not read, which would wait for the device
        return Threat(eps=1.0).with_radius((times * radius).clamp_max(1.0))
    return Threat(eps=min(1.0, times * radius))


def _images_at_once(victim: nn.Module, count: int, room: int) -> int:
    if not isinstance(victim, Averaged):
        return count
    ensemble = victim.ensemble
    # all processes split the batch alike, since they attack together
    return max(1, min(count, room // ensemble.spread.most(ensemble.num_members)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage of training: members, number of epochs and loss.

    Attributes:
        name: its name in errors and logs; unique within a run.
        epochs: passes over the training split.
        members: indices of the members to be optimized.
        loss: yields parts whose gradients add up; each is backpropagated before the next is made.
        before: prepares the ensemble at the stage's start; must be idempotent.
        after: called at the stage's end with batches of training images.
        schedule: the part of the learning-rate schedule that it covers; by default each stage
            restarts it.
    """

    name: str
    epochs: int
    members: tuple[int, ...]
    loss: LossFn
    before: Before | None = None
    after: After | None = None
    schedule: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Defence(ABC):
    """A training method. Subclasses are final and hold settings only.

    Attributes:
        summary: one line for `redefense list defences`.
        randomized: whether the method answers queries by a member drawn at random; if not, its
            deterministic form is the averaged ensemble.
    """

    summary: ClassVar[str] = ""
    randomized: ClassVar[bool] = False

    def stages(self, num_members: int, epochs: int) -> tuple[Stage, ...]:
        """The stages of training; by default one joint stage of all members."""
        all_members = tuple(range(num_members))
        return (Stage(name="joint", epochs=epochs, members=all_members, loss=self.loss),)

    def check(self, ensemble: Ensemble, num_classes: int) -> None:  # noqa: B027 - most need nothing
        """Check that the method can train these members; called before anything is written.

        Raises:
            ConfigError: naming what the method needs.
        """

    @property
    def spreads(self) -> bool:
        """Whether members can be distributed; the loss then uses `ensemble.spread`."""
        return False

    @abstractmethod
    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        """Yield the loss of one batch in parts."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropyDefence(Defence):
    """Base class of methods that train on the cross-entropy, optionally with smoothed labels.

    Adversaries and penalties on input gradients use the cross-entropy without smoothing.

    Attributes:
        label_smoothing: fraction of each label that is distributed evenly over all classes.
    """

    label_smoothing: Smoothing = 0.0

    def cross_entropy(self, logits: Logits, y: Labels) -> Float[Tensor, ""]:
        """The mean over images, for training."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


def terms(**values: Tensor) -> dict[str, Tensor]:
    """Detached scalars for the log."""
    return {name: value.detach() for name, value in values.items()}
