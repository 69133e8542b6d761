"""Auto-PGD: ascent that sets its own step size (Croce & Hein, 2020)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from redefense.attacks.base import OFFICIAL, STEPS, Attack, Best, Oracle, Presets
from redefense.attacks.early_stop import early_stopping
from redefense.attacks.gradient import gradient_oracle
from redefense.attacks.objectives import TARGETED, objective_named, wrong_classes
from redefense.errors import ConfigError
from redefense.limits import at_least, within
from redefense.rng import ImageStreams
from redefense.threat import TINY, Threat, norms, per_image, steepest
from redefense.types import Bool, Float, Images, Labels, Victim, correct

Attempt = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and labels to points and whether each fools."""


@dataclass
class LastFooled:
    """The published rule: the last point on which the victim erred, else the start."""

    x: Tensor
    fooled: Tensor

    @classmethod
    def start(cls, x: Images) -> "LastFooled":
        return cls(x, torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def offer(self, x: Images, correct: Float[Tensor, " B"], value: Float[Tensor, " B"]) -> None:
        now = correct == 0
        self.x = torch.where(now.view(-1, 1, 1, 1), x, self.x)
        self.fooled = self.fooled | now


def auto_climb(
    oracle: Oracle,
    start: Images,
    x: Images,
    threat: Threat,
    *,
    steps: int,
    rho: float,
    keeper: Best | LastFooled,
    guard: bool = True,
    one_size: bool = False,
) -> None:
    """Momentum ascent whose step starts at 2 eps and halves, per image, when progress stalls.

    At checkpoints that come ever more often, an image goes back to its point of highest value and
    halves its step if at most a share `rho` of the steps since the last checkpoint raised the
    value, or if neither the highest value nor the step has changed since.

    Args:
        oracle: gives value, correctness and gradient at a point.
        start: first point, inside the ball.
        x: centre of the ball.
        threat: the ball.
        steps: number of steps; visits one point more.
        rho: share of rising steps below which the step is halved.
        keeper: is offered every point visited.
        guard: compare the first step with the start; without, with zero, as the published code.
        one_size: take the first image's step size for all, as TorchAttacks' APGD-T does in L2.
    """
    seen = oracle(start, True)
    keeper.offer(start, seen.correct, seen.value)
    assert seen.grad is not None
    point, before, grad = start, start, seen.grad
    top, top_value, top_grad = start, seen.value, seen.grad
    # the published code compares the first step with 0, a rise wherever losses are positive
    last = seen.value if guard else torch.zeros_like(seen.value)
    # as in the paper: the first step may cross the whole ball
    size = torch.full_like(seen.value, 2 * threat.eps)
    rises, top_at_check = torch.zeros_like(size), top_value
    halved = torch.ones_like(size, dtype=torch.bool)
    until, period = _first_period(steps), _first_period(steps)
    for step in range(steps):
        stride = per_image(size[:1] if one_size else size, x)
        ahead = into_ball(point + stride * steepest(grad, threat.norm), x, threat)
        # the paper's momentum: a quarter of each move repeats the one before; the first has none
        share = 0.75 if step > 0 else 1.0
        moved = point + (ahead - point) * share + (point - before) * (1 - share)
        before, point = point, into_ball(moved, x, threat)
        seen = oracle(point, True)
        keeper.offer(point, seen.correct, seen.value)
        assert seen.grad is not None
        grad, rises, last = seen.grad, rises + (seen.value > last), seen.value
        better = seen.value > top_value
        top_value = torch.where(better, seen.value, top_value)
        top = torch.where(better.view(-1, 1, 1, 1), point, top)
        top_grad = torch.where(better.view(-1, 1, 1, 1), grad, top_grad)
        until -= 1
        if until == 0:
            # the paper's two conditions: too few rises, or no new maximum since a check without
            # halving
            halved = (rises <= rho * period) | (~halved & (top_at_check >= top_value))
            size = torch.where(halved, size / 2, size)
            point = torch.where(halved.view(-1, 1, 1, 1), top, point)
            grad = torch.where(halved.view(-1, 1, 1, 1), top_grad, grad)
            rises, top_at_check = torch.zeros_like(rises), top_value
            # checkpoints at 22, 41, 57, ... percent of the steps: ever closer, at least 6 percent
            # apart
            period = max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            until = period


def _first_period(steps: int) -> int:
    return max(int(0.22 * steps), 1)


def into_ball(point: Images, x: Images, threat: Threat) -> Images:
    """`Threat.project`, rounded as the published code does: bounds, not differences, are clipped.

    Converged points then repeat bit for bit there and here, and so do the comparisons of values
    that steer the step size.
    """
    if threat.norm == math.inf:
        inside = point.maximum(x - threat.eps).minimum(x + threat.eps)
    else:
        delta = point - x
        length = per_image(norms(delta, 2.0), x)
        inside = x + delta / (length + TINY) * length.clamp_max(threat.eps)
    return inside.clamp(0.0, 1.0)


def face_starts(x: Images, y: Labels, threat: Threat, rng: Generator) -> Callable[[], Images]:
    """Random points on the ball's surface, each image from its own stream, clipped to the box."""
    streams = ImageStreams.of(rng, x, y)

    def start() -> Images:
        cube = 2 * streams.uniform(*x.shape[1:]) - 1
        # the inverse error function of uniform numbers is normal, so that directions are uniform
        direction = cube if threat.norm == math.inf else cube.clamp_min(-1 + 1e-15).erfinv()
        return onto_face(direction.to(x.dtype), x, threat)

    return start


def batch_face_start(x: Images, threat: Threat, rng: Generator) -> Images:
    """As `face_starts`, from one tensor of random numbers for the batch, as published."""
    if threat.norm == math.inf:
        direction = 2 * torch.rand(x.shape, dtype=x.dtype, generator=rng, device=rng.device) - 1
    else:
        direction = torch.randn(x.shape, dtype=x.dtype, generator=rng, device=rng.device)
    return onto_face(direction.to(x.device), x, threat)


def onto_face(direction: Images, x: Images, threat: Threat) -> Images:
    length = norms(direction, threat.norm)
    # the published code adds the constant in L2 only, and equal points must repeat its bits
    if threat.norm != math.inf:
        length = length + TINY
    return (x + threat.eps * direction / per_image(length, x)).clamp(0.0, 1.0)


def filtered(
    victim: Victim, x: Images, y: Labels, attempts: Callable[[int], Iterable[Attempt]]
) -> Images:
    """The published cascade: attempts on the images not fooled yet; what none fools stays clean.

    On a random victim a single draw decides each success, so the defaults do not do this.

    Args:
        victim: what is attacked.
        x: clean images.
        y: their labels.
        attempts: the attempts for a given number of classes.
    """
    logits = victim(x)
    x_adv, right = x.clone(), correct(logits, y)
    for attempt in attempts(logits.shape[1]):
        rows = right.nonzero().flatten()
        if len(rows) == 0:
            break
        points, fooled = attempt(x[rows], y[rows])
        x_adv[rows[fooled]] = points[fooled]
        right[rows[fooled]] = False
    return x_adv


@dataclass(frozen=True, kw_only=True)
class AutoAscent(Attack):
    """What the APGD attacks share.

    Attributes:
        steps: number of gradients, per restart.
        restarts: independent starts, spent on images not fooled yet.
        rho: share of rising steps below which the step is halved, in (0, 1].
    """

    steps: int = 100
    restarts: int = 1
    rho: float = 0.75

    def check(self) -> None:
        at_least(1, steps=self.steps, restarts=self.restarts)
        within("(0, 1]", rho=self.rho)

    def improve(
        self,
        oracles: Iterable[Callable[[Tensor], Oracle]],
        x: Images,
        y: Labels,
        threat: Threat,
        rng: Generator,
        *,
        early_stop: bool = False,
    ) -> Best:
        """The best points of climbs from `restarts` starts, with the images not fooled yet.

        Args:
            oracles: makes, from the indices of the images attacked, what to climb.
            x: clean images.
            y: their labels.
            threat: the ball.
            rng: generator of the starts.
            early_stop: skip images that are fooled or far from being fooled.
        """
        best, start = Best.start(x), face_starts(x, y, threat, rng)
        for oracle in oracles:
            for _ in range(self.restarts):
                points = start()  # for all, so that streams do not depend on who is left
                rows = (best.correct > 0).nonzero().flatten()
                if len(rows) == 0:
                    return best
                part, own_oracle = best.select(rows), oracle(rows)
                if early_stop:
                    own_oracle = early_stopping(
                        # bound as defaults: a closure would use the values of a later iteration
                        lambda part, of=oracle, rows=rows: of(rows[part]),  # type: ignore[misc]  # defaults of a lambda have no types
                        len(rows), steps=self.steps,
                    )  # fmt: skip
                auto_climb(
                    own_oracle, points[rows], x[rows], threat,
                    steps=self.steps, rho=self.rho, keeper=part,
                )  # fmt: skip
                best.update(rows, part)
        return best

    def last_fooled(
        self, oracle: Oracle, start: Images, x: Images, threat: Threat, *, one_size: bool = False
    ) -> tuple[Images, Bool[Tensor, " B"]]:
        """One run as published: the last fooling point, and whether there was one."""
        keeper = LastFooled.start(start)
        auto_climb(
            oracle, start, x, threat,
            steps=self.steps, rho=self.rho, keeper=keeper, guard=False, one_size=one_size,
        )  # fmt: skip
        return keeper.x, keeper.fooled


@dataclass(frozen=True, kw_only=True)
class APGD(AutoAscent):
    """Auto-PGD on one objective; keeps the best point (fooled first, then by objective).

    Attributes:
        loss: name in `OBJECTIVES`; the default climbs as cross-entropy does and never vanishes.
        draws: queries per gradient, for random victims.
        early_stop: stop querying images that are fooled or, after three tenths of the steps,
            far from it.
        preset: published settings: one noise tensor for the batch, the last fooling point, and
            the clean image where none was seen.
    """

    loss: str = "log_odds"
    draws: int = 1
    early_stop: bool = False
    preset: str | None = None

    summary: ClassVar[str] = "ascent that sets its own step size"
    presets: ClassVar[Presets] = {
        name: {
            "steps": steps,
            "restarts": 1,
            "rho": 0.75,
            "loss": "cross_entropy",
            "draws": 1,
            "early_stop": False,
        }
        for name, steps in STEPS.items()
    }

    def check(self) -> None:
        AutoAscent.check(self)
        objective_named(self.loss)
        at_least(1, draws=self.draws)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        objective = objective_named(self.loss)
        if self.preset is None:
            oracles = [lambda rows: gradient_oracle(victim, y[rows], objective, draws=self.draws)]
            return self.improve(oracles, x, y, threat, rng, early_stop=self.early_stop).x

        def attempt(x: Images, y: Labels) -> tuple[Images, Bool[Tensor, " B"]]:
            start = batch_face_start(x, threat, rng)
            return self.last_fooled(gradient_oracle(victim, y, objective), start, x, threat)

        return filtered(victim, x, y, lambda _: [attempt] * self.restarts)


@dataclass(frozen=True, kw_only=True)
class APGDT(AutoAscent):
    """Auto-PGD towards one wrong class after the other, nearest logits first.

    Attributes:
        num_targets: wrong classes tried; all there are if fewer.
        loss: `targeted_dlr` (4 classes or more) or `targeted_margin` (any number).
        early_stop: stop querying images that are fooled or, after three tenths of the steps
            towards a class, far from it.
        preset: published settings: one noise tensor for the batch, the last fooling point, and
            the clean image where none was seen.
    """

    num_targets: int = 9
    loss: str = "targeted_dlr"
    early_stop: bool = False
    preset: str | None = None

    summary: ClassVar[str] = "auto-PGD towards the nine likeliest wrong classes"
    presets: ClassVar[Presets] = {
        name: {
            "steps": steps, "restarts": 1, "rho": 0.75, "num_targets": 9, "loss": "targeted_dlr",
            "early_stop": False,
        }
        for name, steps in STEPS.items()
    }  # fmt: skip

    def check(self) -> None:
        AutoAscent.check(self)
        if self.loss not in TARGETED:
            raise ConfigError(f"unknown loss {self.loss!r}; known: {', '.join(TARGETED)}")
        at_least(1, num_targets=self.num_targets)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        if self.preset is None:
            return self._strong(victim, x, y, threat, rng)
        return self._published(victim, x, y, threat, rng)

    def _oracle(self, victim: Victim, y: Labels, target: Labels) -> Oracle:
        formula = TARGETED[self.loss]
        return gradient_oracle(victim, y, lambda logits, y: formula(logits, y, target))

    def _strong(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, rng: Generator
    ) -> Images:
        targets = wrong_classes(victim(x), y, self.num_targets)

        def towards(target: Labels) -> Callable[[Tensor], Oracle]:
            return lambda rows: self._oracle(victim, y[rows], target[rows])

        oracles = [towards(target) for target in targets]
        return self.improve(oracles, x, y, threat, rng, early_stop=self.early_stop).x

    def _published(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, rng: Generator
    ) -> Images:
        one_size = threat.norm == 2.0 and self.preset != OFFICIAL

        def towards(rank: int) -> Attempt:
            def attempt(x: Images, y: Labels) -> tuple[Images, Bool[Tensor, " B"]]:
                start = batch_face_start(x, threat, rng)
                # a class of that rank for this draw of the victim, be it the true one
                target = victim(x).sort(dim=1).indices[:, -rank]
                oracle = self._oracle(victim, y, target)
                return self.last_fooled(oracle, start, x, threat, one_size=one_size)

            return attempt

        def attempts(classes: int) -> list[Attempt]:
            # rank 1 is the predicted class
            ranks = range(2, min(self.num_targets, classes - 1) + 2)
            return [towards(rank) for rank in ranks for _ in range(self.restarts)]

        return filtered(victim, x, y, attempts)
