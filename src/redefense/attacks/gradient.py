"""Gradient ascent on a victim's loss: one loop, from which FGSM to the adaptive attacks are made.

Steps are fractions of the budget. The loop climbs a *sum* over images, so that an image's path
does not depend on its batch mates, and reuses the forward pass of each step to judge the point it
was taken at.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from redefense.attacks.base import (
    RED_RELEASED,
    TORCHATTACKS,
    Attack,
    Best,
    Look,
    Looker,
    Presets,
    batch_noise,
    input_gradient,
)
from redefense.attacks.objectives import Objective, objective_named
from redefense.errors import ConfigError
from redefense.rng import ImageStreams
from redefense.threat import Threat, per_image, steepest
from redefense.types import Images, Labels, Victim


def look_at(victim: Victim, y: Labels, objective: Objective, *, draws: int = 1) -> Looker:
    """Looks at a victim's logits, averaged over `draws` queries of the same points."""

    def look(x: Tensor, with_grad: bool) -> Look:
        x = x.detach().requires_grad_(with_grad)
        values, correct, grads = [], [], []
        for _ in range(draws):
            with torch.set_grad_enabled(with_grad):
                logits = victim(x)
                value = objective(logits, y)
            if with_grad:
                grads.append(input_gradient(value.sum(), x))
            values.append(value.detach())
            correct.append((logits.detach().argmax(1) == y).to(x.dtype))
        grad = _mean(grads) if grads else None
        return Look(_mean(values), _mean(correct), grad)

    return look


def _mean(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts) if len(parts) > 1 else total


def climb(
    look: Looker,
    start: Images,
    x: Images,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    decay: float | None = None,
    best: Best | None = None,
) -> Images:
    """Projected steepest ascent inside the ball around `x`.

    Args:
        look: gives value, correctness and gradient at a point.
        start: first point, inside the ball.
        x: centre of the ball.
        threat: the ball.
        steps: number of gradients.
        step_size: length of a step in the threat's norm.
        decay: of the momentum over gradients of unit mean magnitude (Dong et al., 2018); None
            climbs the plain gradient.
        best: keeps the best of all points visited, the last one included at the cost of one more
            forward pass; None costs nothing and leaves the caller with the last point.

    Returns:
        The last point.
    """
    point, velocity = start, torch.zeros_like(x)
    for _ in range(steps):
        seen = look(point, True)
        if best is not None:
            best.offer(point, seen.correct, seen.value)
        assert seen.grad is not None
        velocity = seen.grad if decay is None else unit_mean(seen.grad) + decay * velocity
        point = threat.project(point + step_size * steepest(velocity, threat.norm), x)
    if best is not None:
        seen = look(point, False)
        best.offer(point, seen.correct, seen.value)
    return point


def unit_mean(grad: Images) -> Images:
    """Gradient divided by its mean magnitude, per image; zero stays zero and never becomes NaN."""
    size = grad.abs().flatten(1).mean(1).clamp_min(torch.finfo(grad.dtype).tiny)
    return grad / per_image(size, grad)


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of the whole budget along the steepest direction (Goodfellow et al., 2015)."""

    loss: str = "log_odds"
    preset: str | None = None

    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "one gradient step of the whole budget"
    presets: ClassVar[Presets] = {
        TORCHATTACKS: {"loss": "cross_entropy"},
        RED_RELEASED: {"loss": "cross_entropy"},
    }

    def check(self) -> None:
        objective_named(self.loss)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        look = look_at(victim, y, objective_named(self.loss))
        return climb(look, x, x, threat, steps=1, step_size=threat.eps)


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent from random starts (Madry et al., 2018).

    Attributes:
        steps: gradients per restart.
        step_size: as a fraction of eps.
        random_start: start at a random point of the ball instead of the image.
        restarts: independent starts; the best point of all is kept.
        keep_best: return the best point visited (fooled first, then by loss) instead of the last;
            costs one more forward pass.
        loss: name in `OBJECTIVES`; the default climbs as cross-entropy does and never vanishes.
        preset: published settings; noise is then one tensor for the batch, drawn from `rng`.
    """

    steps: int = 20
    step_size: float = 0.25
    random_start: bool = True
    restarts: int = 1
    keep_best: bool = True
    loss: str = "log_odds"
    preset: str | None = None

    summary: ClassVar[str] = "projected gradient ascent from random starts"
    presets: ClassVar[Presets] = {
        TORCHATTACKS: {"steps": 10, "keep_best": False, "loss": "cross_entropy"},
        RED_RELEASED: {"steps": 10, "keep_best": False, "loss": "cross_entropy"},
    }

    def check(self) -> None:
        objective_named(self.loss)
        check_steps(self.steps, self.step_size, self.restarts)
        if self.restarts > 1 and not (self.keep_best and self.random_start):
            raise ConfigError("more than one restart needs random_start and keep_best")

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        look = look_at(victim, y, objective_named(self.loss))
        start = random_starts(x, y, threat, rng, of_batch=self.preset is not None)
        best = Best.start(x) if self.keep_best else None
        for _ in range(self.restarts):
            last = climb(
                look,
                start() if self.random_start else x,
                x,
                threat,
                steps=self.steps,
                step_size=self.step_size * threat.eps,
                best=best,
            )
        return last if best is None else best.x


def random_starts(
    x: Images, y: Labels, threat: Threat, rng: torch.Generator, *, of_batch: bool = False
) -> Callable[[], Tensor]:
    """Makes random points of the ball, each image from its own stream, or all from `rng`."""
    if of_batch:
        eps = threat.eps
        if threat.norm == math.inf:
            return lambda: threat.project(x + batch_noise(x, -eps, eps, rng), x)
        return lambda: threat.project(x + threat.noise(batch_noise(x, 0.0, 1.0, rng)), x)
    streams = ImageStreams.of(rng, x, y)
    shape = x.shape[1:]
    return lambda: threat.project(x + threat.noise(streams.uniform(*shape).to(x.dtype)), x)


def check_steps(steps: int, step_size: float, restarts: int = 1) -> None:
    """Refuse counts below 1 and steps that are not positive.

    Raises:
        ConfigError: naming the rule and the value.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if not step_size > 0:
        raise ConfigError(f"step_size must be positive, got {step_size}")
    if restarts < 1:
        raise ConfigError(f"restarts must be at least 1, got {restarts}")
