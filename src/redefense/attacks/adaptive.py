"""Attacks that are given every member and the mixture, though not the draw.

They maximise a smooth surrogate and score every point exactly: the probability that the drawn
member is correct is the mixture's weight on the correct members. For each image they return the
point where it is lowest; ties are broken by the surrogate. The clean image is returned only where
it is strictly better. Members of probability zero are never queried.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from redefense.attacks.apgd import APGDT, AutoAscent
from redefense.attacks.base import Attack, Best, Oracle, OracleResult, dual, input_gradient
from redefense.attacks.early_stop import reuse_unmoved
from redefense.attacks.gradient import check_steps, climb, random_starts
from redefense.attacks.objectives import margin
from redefense.ensembles import Ensemble, MemberOf, as_ensemble
from redefense.errors import ConfigError
from redefense.limits import not_negative, within
from redefense.threat import TINY, Threat, norms, per_image
from redefense.types import Float, Images, Labels, Logits, correct


class Support:
    """The members of positive probability, as attacked by adaptive attacks."""

    def __init__(self, victim: nn.Module) -> None:
        self.ensemble: Ensemble = as_ensemble(victim)
        mixture = self.ensemble.mixture.detach().double().cpu()
        self.indices: Sequence[int] = mixture.nonzero().flatten().tolist()
        self.shares: Sequence[float] = (mixture / mixture.sum())[mixture != 0].tolist()

    def each(self, x: Images) -> Sequence[Logits]:
        return self.ensemble.logits_of_each(self.indices, [x] * len(self.indices))

    def blocks(self) -> Iterator[tuple[Sequence[int], Sequence[float]]]:
        """Members whose logits are computed in one call, and their probabilities."""
        size = self.ensemble.together
        for start in range(0, len(self.indices), size):
            yield self.indices[start : start + size], self.shares[start : start + size]

    def correct(self, logits: Sequence[Logits], y: Labels) -> Float[Tensor, " B"]:
        """(B,) probability that the drawn member is correct, to nine decimals.

        Rounded, so that equal sums over different members compare as equal.
        """
        right = torch.stack([correct(z.detach(), y) for z in logits], dim=1).double()
        return (right @ torch.tensor(self.shares, device=y.device).double()).round(decimals=9)

    def log_odds(self, logits: Sequence[Logits], y: Labels) -> Float[Tensor, " B"]:
        """(B,) log((1 - p) / p) of the true class's mean probability p under the mixture."""
        logs = torch.stack(
            [z.log_softmax(1) + math.log(s) for z, s in zip(logits, self.shares, strict=True)]
        ).logsumexp(0)
        others = logs.scatter(1, y[:, None], -torch.inf).logsumexp(1)
        return others - logs.gather(1, y[:, None]).squeeze(1)

    def offer(self, best: Best, x: Images, y: Labels) -> Float[Tensor, " B"]:
        """Score points by one pass over all members and keep those that are better.

        Returns:
            (B,) probability that the drawn member is correct.
        """
        with torch.no_grad():
            logits = self.each(x)
            correct = self.correct(logits, y)
            best.offer(x, correct, self.log_odds(logits, y))
        return correct

    def offer_clean(self, best: Best, x: Images, y: Labels) -> None:
        """Use the clean image where it is strictly better."""
        with torch.no_grad():
            correct = self.correct(self.each(x), y)
        # the lowest objective, so that ties keep the perturbed point
        best.offer(x, correct, torch.full_like(correct, -math.inf))


def mean_oracle(support: Support, y: Labels) -> Oracle:
    """Oracle for the log odds of the mean probability; expected accuracy is computed exactly."""

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        x = x.detach().requires_grad_(with_grad)
        with torch.set_grad_enabled(with_grad):
            logits = support.each(x)
            value = support.log_odds(logits, y)
        grad = input_gradient(value, x) if with_grad else None
        return OracleResult(value.detach(), support.correct(logits, y), grad)

    return oracle


def climb_members(
    support: Support,
    oracle_of: Callable[[Labels], Oracle],
    x: Images,
    y: Labels,
    threat: Threat,
    rng: torch.Generator,
    *,
    steps: int,
    step_size: float,
    restarts: int,
    shrink: float = 1.0,
) -> Images:
    """Best point of `restarts` ascents from random starts, the clean image included.

    Images for which a point that fools all members is known are not attacked again.
    """
    start, best = random_starts(x, y, threat, rng), Best.start(x)
    for _ in range(restarts):
        points = start()  # for all images, so that streams do not depend on which remain
        rows = (best.correct > 0).nonzero().flatten()
        if len(rows) == 0:
            break
        part = best.select(rows)
        climb(
            reuse_unmoved(oracle_of, y[rows]), points[rows], x[rows], threat,
            steps=steps, step_size=step_size * threat.eps, shrink=shrink, best=part,
        )  # fmt: skip
        best.update(rows, part)
    support.offer_clean(best, x, y)
    return best.x


@dataclass(frozen=True, kw_only=True)
class MeanProbPGD(Attack):
    """PGD on the mixture-weighted mean probability of the true class.

    Its gradient weights members by their probability of the true class, so members that are not
    fooled yet dominate. Returns the point of lowest exact expected accuracy.

    Attributes:
        steps: gradients of each start.
        step_size: length of a step as a fraction of eps.
        restarts: random starts.
    """

    steps: int = 20
    step_size: float = 0.25
    restarts: int = 1

    adaptive: ClassVar[bool] = True
    summary: ClassVar[str] = "PGD on the members' mean probability, scored exactly"

    def check(self) -> None:
        check_steps(self.steps, self.step_size, self.restarts)

    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        support = Support(victim)
        return climb_members(
            support, partial(mean_oracle, support), x, y, threat, rng,
            steps=self.steps, step_size=self.step_size, restarts=self.restarts,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeanProbAPGD(AutoAscent):
    """Auto-PGD on the same objective, scored the same way."""

    adaptive: ClassVar[bool] = True
    summary: ClassVar[str] = "auto-PGD on the members' mean probability, scored exactly"

    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        support = Support(victim)
        best = self.improve([lambda rows: mean_oracle(support, y[rows])], x, y, threat, rng)
        support.offer_clean(best, x, y)
        return best.x


def hinge_oracle(support: Support, y: Labels, norm: float, kappa: float) -> Oracle:
    """Oracle for the sum of the members' remaining margins, one call's graph at a time.

    The gradient is the sum of the normalised margin gradients of the members not fooled yet,
    weighted by their probabilities. Where these cancel, it is the gradient of the nearest member.
    """

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        x = x.detach()
        total, single, logits = torch.zeros_like(x), torch.zeros_like(x), []
        value = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        nearest = torch.full_like(value, math.inf)
        for members, shares in support.blocks():
            # each member's own copy of the points, for its own gradient
            points = torch.cat([x] * len(members)).requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                zs = support.ensemble.logits_of_each(members, points.split(len(x)))
                gaps = torch.cat([-margin(z, y) for z in zs])
            logits += [z.detach() for z in zs]
            grads = input_gradient(gaps, points) if with_grad else points
            parts = zip(shares, gaps.detach().split(len(x)), grads.split(len(x)), strict=True)
            for share, gap, grad in parts:
                # at a tie the member may still be correct, so its gradient still counts
                correct = gap + kappa >= 0
                left = (gap + kappa).relu().to(x.dtype)
                value -= share * left
                if not with_grad:
                    continue
                slope = norms(grad, dual(norm)).clamp_min(TINY)
                # weight 0 for members already fooled, since otherwise they would dominate the
                # gradient
                unit = -grad * per_image(correct / slope, grad)
                total += share * unit
                distance = torch.where(correct, left / slope, math.inf)
                single = torch.where((distance < nearest).view(-1, 1, 1, 1), unit, single)
                nearest = nearest.minimum(distance)
        if with_grad:
            # opposite unit gradients leave rounding errors, whose direction would be random
            cancel = norms(total, math.inf) <= 1e-6 * norms(single, math.inf)
            total = torch.where(cancel.view(-1, 1, 1, 1), single, total)
        return OracleResult(value, support.correct(logits, y), total if with_grad else None)

    return oracle


@dataclass(frozen=True, kw_only=True)
class Hinge(Attack):
    """PGD on the distances to the members not fooled yet.

    Maximises -sum_m p_m relu(gap_m + kappa) / |grad gap_m|, where gap_m is the true logit minus the
    best other one and the gradient's norm is dual to the threat's. To first order this is the
    distance to a point on which every member errs. The steps shrink, since the gradients do not
    shrink near the optimum.

    Attributes:
        steps: gradients per restart.
        step_size: length of the first step, as a fraction of eps.
        shrink: factor in (0, 1] by which the steps shrink over all `steps`, geometrically.
        restarts: independent random starts.
        kappa: members count as fooled only beyond this logit gap, >= 0.
    """

    steps: int = 20
    step_size: float = 0.5
    shrink: float = 0.02
    restarts: int = 1
    kappa: float = 0.0

    adaptive: ClassVar[bool] = True
    summary: ClassVar[str] = "PGD on the normalised margins of the members not fooled yet"

    def check(self) -> None:
        check_steps(self.steps, self.step_size, self.restarts)
        within("(0, 1]", shrink=self.shrink)
        not_negative(kappa=self.kappa)

    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        support = Support(victim)
        oracle_of = partial(hinge_oracle, support, norm=threat.norm, kappa=self.kappa)
        return climb_members(
            support, oracle_of, x, y, threat, rng,
            steps=self.steps, step_size=self.step_size, shrink=self.shrink,
            restarts=self.restarts,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """The best of an attack on each single member, all judged on all members.

    Attributes:
        attack: the attack on single members. The default is auto-PGD towards the nine likeliest
            wrong classes, which finds more adversarial points than untargeted attacks.
    """

    attack: Attack = field(default_factory=partial(APGDT, steps=50, loss="targeted_margin"))

    adaptive: ClassVar[bool] = True
    summary: ClassVar[str] = "best of the attacks on single members, scored on all"

    @property
    def least_classes(self) -> int:
        return self.attack.least_classes

    def check(self) -> None:
        if not isinstance(self.attack, Attack) or not self.attack.bounded:
            raise ConfigError(f"attack must be a bounded attack, e.g. PGD(), got {self.attack!r}")

    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        support, best = Support(victim), Best.start(x)
        state = rng.get_state()
        for m in support.indices:
            rng.set_state(state)  # equal members get equal attacks
            only = MemberOf(support.ensemble, m)  # a plain member of a `Hyper` would be a copy
            support.offer(best, self.attack.perturb(only, x, y, threat, rng=rng), y)
        support.offer_clean(best, x, y)
        return best.x
