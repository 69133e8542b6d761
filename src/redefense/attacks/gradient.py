"""Gradient ascent on a victim's loss: the one loop that a dozen attacks configure.

Steps are fractions of the budget. The loop maximises a *sum* over images, so that an image's result
does not depend on the rest of the batch. The forward pass of each step also scores its point.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Generator, Tensor

from redefense.attacks.base import (
    RED_RELEASED,
    TORCHATTACKS,
    Attack,
    Best,
    Oracle,
    OracleResult,
    Presets,
    batch_noise,
    input_gradient,
)
from redefense.attacks.objectives import Objective, objective_named
from redefense.errors import ConfigError
from redefense.limits import at_least, not_negative, positive
from redefense.rng import ImageStreams, Seed
from redefense.threat import Threat, per_image, steepest
from redefense.types import Images, Labels, Victim, correct

PUBLISHED: Final = (TORCHATTACKS, RED_RELEASED)
"""Settings published by both libraries; their budget (8/255, 0.03) is given by the threat."""

TEN_STEPS: Final[Mapping[str, object]] = {
    "steps": 10,
    "step_size": 0.25,  # 2/255 at the published eps of 8/255
    "keep_best": False,
    "loss": "cross_entropy",
}


def gradient_oracle(victim: Victim, y: Labels, objective: Objective, *, draws: int = 1) -> Oracle:
    """Oracle for a victim's logits, averaged over `draws` queries of the same points."""

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        # without the graph of earlier steps: it would keep every step in memory
        x = x.detach().requires_grad_(with_grad)
        values, rights, grads = [], [], []
        for _ in range(draws):
            with torch.set_grad_enabled(with_grad):
                logits = victim(x)
                value = objective(logits, y)
            if with_grad:
                grads.append(input_gradient(value, x))
            values.append(value.detach())
            rights.append(correct(logits.detach(), y).to(x.dtype))
        grad = _mean(grads) if grads else None
        return OracleResult(_mean(values), _mean(rights), grad)

    return oracle


def _mean(parts: list[Tensor]) -> Tensor:
    # summed one by one, in the order of the queries: a stack would hold all gradients twice
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts) if len(parts) > 1 else total


def climb(
    oracle: Oracle,
    start: Images,
    x: Images,
    threat: Threat,
    *,
    steps: int,
    step_size: float | Tensor,
    shrink: float = 1.0,
    decay: float | None = None,
    best: Best | None = None,
    guard: bool = True,
) -> Images:
    """Projected steepest ascent inside the ball around `x`.

    Args:
        oracle: gives value, correctness and gradient at a point.
        start: first point, inside the ball.
        x: centre of the ball.
        threat: the ball.
        steps: number of gradients.
        step_size: length of the first step in the threat's norm.
        shrink: factor by which the steps shrink over all `steps`, geometrically; 1: constant steps.
        decay: momentum factor, over gradients of unit mean magnitude (Dong et al., 2018); None: no
            momentum.
        best: records the best point visited. The last point costs one more forward pass; None skips
            it.
        guard: exclude zero gradients from the momentum. Otherwise they become NaN and the image no
            longer moves, as in published code.

    Returns:
        The last point.
    """
    point, velocity = start, torch.zeros_like(x)
    for step in range(steps):
        seen = oracle(point, True)
        if best is not None:
            best.offer(point, seen.correct, seen.value)
        assert seen.grad is not None
        velocity = (
            seen.grad if decay is None else unit_mean(seen.grad, guard=guard) + decay * velocity
        )
        # geometric, so that early steps explore and late ones settle, whatever the number of steps
        size = step_size * shrink ** (step / steps)
        point = threat.project(point + size * steepest(velocity, threat.norm), x)
    if best is not None:
        seen = oracle(point, False)
        best.offer(point, seen.correct, seen.value)
    return point


def unit_mean(grad: Images, *, guard: bool = True) -> Images:
    """Gradient divided by its mean magnitude, per image; with `guard`, zero stays zero."""
    size = grad.abs().flatten(1).mean(1)
    if guard:
        # a zero gradient divided by its zero size would be NaN, and stay so in every later step
        size = size.clamp_min(torch.finfo(grad.dtype).tiny)
    return grad / per_image(size, grad)


def random_starts(
    x: Images, y: Labels, threat: Threat, rng: Generator | Seed, *, of_batch: bool = False
) -> Callable[[], Tensor]:
    """Draws random points of the ball, each image from its own stream, or all from `rng`.

    With a seed in place of a generator, a part of a batch gets the same points as the whole batch.
    """
    flat = threat.norm == math.inf
    # presets draw one tensor for the whole batch, in the order of the published code
    common = rng if of_batch and isinstance(rng, Generator) else None
    if common is not None and flat:
        return lambda: threat.project(x + batch_noise(x, -threat.eps, threat.eps, common), x)
    streams = None if common is not None else ImageStreams.of(rng, x, y)

    def uniform(like: Tensor) -> Tensor:
        if common is not None:
            return batch_noise(like, 0.0, 1.0, common)
        assert streams is not None
        return streams.uniform(*like.shape[1:]).to(x.dtype)

    def start() -> Tensor:
        cube = uniform(x)
        # an L2 start has a random direction and a second random number for its length
        return threat.project(x + threat.noise(cube, None if flat else uniform(y.to(x.dtype))), x)

    return start


def check_steps(steps: int, step_size: float, restarts: int = 1) -> None:
    """Validate counts (at least 1) and the step size (positive).

    Raises:
        ConfigError: naming the rule and the value.
    """
    at_least(1, steps=steps)
    positive(step_size=step_size)
    at_least(1, restarts=restarts)


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """One step of the whole budget along the steepest direction (Goodfellow et al., 2015)."""

    loss: str = "log_odds"
    preset: str | None = None

    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "one gradient step of the whole budget"
    presets: ClassVar[Presets] = {name: {"loss": "cross_entropy"} for name in PUBLISHED}

    def check(self) -> None:
        objective_named(self.loss)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        oracle = gradient_oracle(victim, y, objective_named(self.loss))
        return climb(oracle, x, x, threat, steps=1, step_size=threat.eps)


@dataclass(frozen=True, kw_only=True)
class Ascent(Attack):
    """Base class of the attacks that use `climb`.

    Attributes:
        steps: number of gradients, per restart where there are restarts.
        step_size: as a fraction of eps.
        keep_best: return the best point visited (misclassified first, then by loss) instead of the
            last; costs one more forward pass. On a victim that draws a member per call, "best"
            depends on a single draw, and the last point, to which all draws contributed, is as
            strong.
        loss: name in `OBJECTIVES`; the default orders points as cross-entropy does, and its
            gradient never vanishes.
        preset: published settings; random numbers are then drawn for the batch, from `rng`.
    """

    steps: int = 20
    step_size: float = 0.25
    keep_best: bool = True
    loss: str = "log_odds"
    preset: str | None = None

    presets: ClassVar[Presets] = {name: TEN_STEPS for name in PUBLISHED}

    def check(self) -> None:
        objective_named(self.loss)
        check_steps(self.steps, self.step_size)

    def ascend(
        self,
        oracle: Oracle,
        starts: Iterable[Images],
        x: Images,
        threat: Threat,
        *,
        decay: float | None = None,
    ) -> Images:
        """Ascend from each start; return the best point of all, or the last."""
        best, last = Best.start(x) if self.keep_best else None, x
        for start in starts:
            last = climb(
                oracle, start, x, threat, steps=self.steps, step_size=self.step_size * threat.eps,
                decay=decay, best=best, guard=self.preset is None,
            )  # fmt: skip
        return last if best is None else best.x


@dataclass(frozen=True, kw_only=True)
class BIM(Ascent):
    """Projected steepest ascent from the image itself (Kurakin et al., 2017)."""

    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "projected gradient ascent from the image itself"

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        return self.ascend(gradient_oracle(victim, y, objective_named(self.loss)), [x], x, threat)


@dataclass(frozen=True, kw_only=True)
class MIM(Ascent):
    """BIM along a running sum of normalised gradients (MI-FGSM, Dong et al., 2018).

    Attributes:
        decay: momentum factor of the running sum, >= 0.
    """

    decay: float = 1.0

    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "BIM with momentum"
    presets: ClassVar[Presets] = {name: {**TEN_STEPS, "decay": 1.0} for name in PUBLISHED}

    def check(self) -> None:
        Ascent.check(self)
        not_negative(decay=self.decay)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        oracle = gradient_oracle(victim, y, objective_named(self.loss))
        return self.ascend(oracle, [x], x, threat, decay=self.decay)


@dataclass(frozen=True, kw_only=True)
class RandomAscent(Ascent):
    """Base class of the attacks that ascend from random starts.

    Attributes:
        random_start: start at a random point of the ball instead of the image.
        restarts: independent random starts; the best point of all is returned.
    """

    random_start: bool = True
    restarts: int = 1

    presets: ClassVar[Presets] = {
        name: {**TEN_STEPS, "random_start": True, "restarts": 1} for name in PUBLISHED
    }

    def check(self) -> None:
        Ascent.check(self)
        check_steps(self.steps, self.step_size, self.restarts)
        # all starts from the image would be equal, and only the last restart would be returned
        if self.restarts > 1 and not (self.keep_best and self.random_start):
            raise ConfigError("more than one restart needs random_start and keep_best")

    def climb(self, oracle: Oracle, x: Images, y: Labels, threat: Threat, rng: Generator) -> Images:
        starts: Iterable[Images] = [x]
        if self.random_start:
            start = random_starts(x, y, threat, rng, of_batch=self.preset is not None)
            starts = (start() for _ in range(self.restarts))
        return self.ascend(oracle, starts, x, threat)


@dataclass(frozen=True, kw_only=True)
class PGD(RandomAscent):
    """Projected gradient ascent from random starts (Madry et al., 2018)."""

    summary: ClassVar[str] = "projected gradient ascent from random starts"

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        return self.climb(gradient_oracle(victim, y, objective_named(self.loss)), x, y, threat, rng)


@dataclass(frozen=True, kw_only=True)
class EOTPGD(RandomAscent):
    """PGD along the mean gradient of several queries of a random victim (Athalye et al., 2018).

    On a deterministic victim it equals PGD at a multiple of the cost. Where the members are known,
    `meanprob_pgd` uses the exact expectation.

    Attributes:
        draws: queries per gradient.
    """

    draws: int = 10

    summary: ClassVar[str] = "PGD on the mean gradient of several queries of a random victim"
    presets: ClassVar[Presets] = {
        # the library's default `eot_iter`
        name: {**settings, "draws": 2}
        for name, settings in RandomAscent.presets.items()
    }

    def check(self) -> None:
        RandomAscent.check(self)
        at_least(1, draws=self.draws)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        oracle = gradient_oracle(victim, y, objective_named(self.loss), draws=self.draws)
        return self.climb(oracle, x, y, threat, rng)
