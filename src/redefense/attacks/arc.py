"""ARC, an attack on randomized classifiers, one member at a time (Dbouk & Shanbhag, 2022)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from redefense.attacks.adaptive import Support
from redefense.attacks.base import Attack, Best, dual, input_gradient
from redefense.attacks.gradient import random_starts
from redefense.ensembles import Ensemble
from redefense.limits import at_least, not_negative, positive
from redefense.threat import TINY, Threat, norms, per_image, steepest
from redefense.types import Float, Images, Labels


@dataclass(frozen=True, kw_only=True)
class ARC(Attack):
    """Moves one perturbation across the nearest boundary of one member after the other.

    Each step starts a local perturbation at zero and, member by member in order of falling
    probability, moves it towards that member's nearest decision boundary, just as far as a linear
    member needs. A move is accepted only where it does not raise the exact expected accuracy. The
    order of equally probable members matters: each restart uses another order, the second the first
    one's reverse, as in the authors' code.

    Attributes:
        steps: rounds over all members.
        radius: norm of the local perturbation, as a fraction of eps.
        competitors: number of wrong classes, by highest logit, whose boundaries are considered.
        overshoot: added to each move, as a fraction of eps.
        restarts: the first starts from the image; further ones start from random points, for images
            on which some member is still correct. The best point is returned.
    """

    steps: int = 20
    radius: float = 1.0
    competitors: int = 9
    overshoot: float = 0.05
    restarts: int = 1

    adaptive: ClassVar[bool] = True
    summary: ClassVar[str] = "across the nearest boundary of one member after the other"

    def check(self) -> None:
        at_least(1, steps=self.steps, restarts=self.restarts, competitors=self.competitors)
        positive(radius=self.radius)
        not_negative(overshoot=self.overshoot)

    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        support, best = Support(victim), Best.start(x)
        start = random_starts(x, y, threat, rng)
        with torch.no_grad():
            clean = support.correct(support.each(x), y)
        orders = member_orders(support.shares)
        self._rounds(support, best, next(orders), x, clean, x, y, threat)
        for _ in range(1, self.restarts):
            point, order = start(), next(orders)
            correct = support.offer(best, point, y)
            self._rounds(support, best, order, point, correct, x, y, threat)
        support.offer_clean(best, x, y)
        return best.x

    def _rounds(
        self,
        support: Support,
        best: Best,
        order: Sequence[int],
        point: Images,
        correct: Float[Tensor, " B"],
        x: Images,
        y: Labels,
        threat: Threat,
    ) -> None:
        """Run rounds from one scored point per image, at most until all members err."""
        rows = torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            remaining = (best.correct[rows] > 0).nonzero().flatten()
            if len(remaining) == 0:
                break
            rows, point, correct = rows[remaining], point[remaining], correct[remaining]
            part, clean = best.select(rows), x[rows]
            turn, local = self._turns(support, part, order, point, correct, clean, y[rows], threat)
            best.update(rows, part)
            # no round raises the expected accuracy: `_turns` accepts no move that does
            point, correct = threat.project(point + turn, clean), local

    def _turns(
        self,
        support: Support,
        best: Best,
        order: Sequence[int],
        point: Images,
        correct: Float[Tensor, " B"],
        x: Images,
        y: Labels,
        threat: Threat,
    ) -> tuple[Images, Float[Tensor, " B"]]:
        """One round: the local perturbation, and the expected accuracy on it."""
        radius, local = self.radius * threat.eps, correct
        turn = torch.zeros_like(x)
        for place, m in enumerate(order):
            distance, slope = nearest_boundary(
                support.ensemble, support.indices[m], point + turn, threat, self.competitors
            )
            unit = steepest(-slope, threat.norm)
            amount = torch.full_like(distance, radius)
            if place > 0:
                along = self._along(slope, turn, threat)
                # the length after which the rescaled sum of both moves reaches this boundary, from
                # the paper
                needed = radius / (radius - distance).clamp_min(TINY) * (distance - along).abs()
                needed = needed + self.overshoot * threat.eps
                amount = torch.where(distance < radius, needed, amount)
            bent = turn + per_image(amount, x) * unit
            # always of full length; the sum with the point is projected onto the ball afterwards
            bent = radius * bent / per_image(norms(bent, threat.norm).clamp_min(TINY), x)
            candidate = support.offer(best, threat.project(point + bent, x), y)
            # equal is accepted: a move may lower the accuracy only together with the next one
            accepted = candidate <= local
            turn = torch.where(accepted.view(-1, 1, 1, 1), bent, turn)
            local = torch.where(accepted, candidate, local)
        return turn, local

    @staticmethod
    def _along(slope: Images, turn: Images, threat: Threat) -> Float[Tensor, " B"]:
        """Projection of the current perturbation on the direction to the boundary."""
        unit = -slope / per_image(norms(slope, dual(threat.norm)).clamp_min(TINY), slope)
        return (unit * turn).flatten(1).sum(1)


def member_orders(shares: Sequence[float]) -> Iterator[list[int]]:
    """Infinite iterator of orders of the members by falling probability.

    Equally probable members are rotated, each rotation followed by its reverse: up to three such
    members pass through every order in six.
    """
    for turn in count():
        ranks = [(k + turn // 2) % len(shares) for k in range(len(shares))]
        # sorted is stable, also in reverse: equal shares keep the order of the rotation
        yield sorted(ranks[:: -1 if turn % 2 else 1], key=shares.__getitem__, reverse=True)


def nearest_boundary(
    ensemble: Ensemble, m: int, x: Images, threat: Threat, competitors: int
) -> tuple[Float[Tensor, " B"], Images]:
    """A member's nearest decision boundary, to first order.

    Returns:
        The distance to it in the threat's norm, and the gradient of the predicted class's logit
        minus that of the class beyond it.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = ensemble.logits_of(m, x)
        # of the predicted class, as in the paper, even if it is not the label
        nearest_few = min(competitors, logits.shape[1] - 1) + 1
        top = logits.topk(nearest_few, dim=1).values
        gaps = [top[:, 0] - top[:, j] for j in range(1, nearest_few)]
    nearest, slope = torch.full_like(x[:, 0, 0, 0], math.inf).detach(), torch.zeros_like(x)
    for i, gap in enumerate(gaps):
        grad = input_gradient(gap, x, keep_graph=i + 1 < len(gaps))
        distance = gap.detach() / norms(grad, dual(threat.norm)).clamp_min(TINY)
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        slope = torch.where(closer.view(-1, 1, 1, 1), grad, slope)
    return nearest, slope.detach()
