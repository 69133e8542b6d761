"""FAB: steps along a linearised decision boundary towards the image (Croce & Hein, 2020)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from redefense.attacks.apgd import Attempt, filtered
from redefense.attacks.base import STEPS, Attack, Best, Presets, input_gradient
from redefense.attacks.early_stop import BOUNDARY_CHECKS, BOUNDARY_STEPS
from redefense.attacks.objectives import targeted_margin, wrong_classes
from redefense.limits import at_least, within
from redefense.threat import Threat, norms, per_image
from redefense.types import Bool, Float, Images, Labels, Victim, correct


def to_hyperplane(
    points: Float[Tensor, "B D"], slope: Float[Tensor, "B D"], gap: Float[Tensor, " B"], norm: float
) -> Float[Tensor, "B D"]:
    """Shortest move, inside the box [0, 1], onto the hyperplane `gap + <slope, move> = 0`.

    In L-inf and L2 the shortest move is min(t * speed, room) per pixel for some length t, where
    speed is 1 or |slope| and room the way to the box. What it gains, |slope| times the move, rises
    piecewise linearly in t: sorted by where the pixels hit the box, t is found in closed form.
    Where the hyperplane does not intersect the box, every pixel moves to its bound.
    """
    size = slope.abs()
    way = -slope.sign() * torch.where(gap >= 0, 1.0, -1.0).to(slope.dtype)[:, None]
    room = torch.where(way > 0, 1 - points, points)
    speed = torch.ones_like(size) if norm == math.inf else size
    tiny = torch.finfo(size.dtype).tiny
    hit, order = torch.where(size > 0, room / speed.clamp_min(tiny), math.inf).sort(dim=1)
    rate = (size * speed).gather(1, order)
    done = (size * room).gather(1, order)
    # gain and rate just before the k-th pixel hits the box
    spent = done.cumsum(1) - done
    moving = rate.flip(1).cumsum(1).flip(1)
    need = gap.abs()[:, None]
    # pixels without slope never hit the box and gain nothing: 0 in place of their infinite time
    enough = spent + moving * hit.nan_to_num(posinf=0.0) >= need
    # argmax does not accept booleans, and returns the first of equal maxima
    first = enough.to(torch.uint8).argmax(1, keepdim=True)
    reached = enough.any(1, keepdim=True)
    length = (need - spent.gather(1, first)) / moving.gather(1, first).clamp_min(tiny)
    move = torch.where(reached, (length * speed).minimum(room), room)
    return way * move


class Found(NamedTuple):
    """Closest point that fools (the image where there is none), its distance, the last point."""

    point: Tensor
    distance: Tensor
    last: Tensor


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Targeted FAB: nearest points beyond the boundaries to the likeliest wrong classes.

    It minimises the distance, so a point may lie outside the ball and is then projected back. A
    preset returns the clean image instead.

    Attributes:
        steps: gradients per target.
        num_targets: wrong classes tried, on images not fooled yet; all there are if fewer.
        alpha_max: largest weight of the move from the image, against that from the last point.
        eta: overshoot beyond the boundary, >= 1.
        beta: fraction of the perturbation kept after a success, in (0, 1).
        early_stop: stop for a target that is reached within eps, or is still far after some steps.
        preset: published settings.
    """

    steps: int = 100
    num_targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    early_stop: bool = False
    preset: str | None = None

    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "along the boundaries to the likeliest wrong classes"
    presets: ClassVar[Presets] = {
        name: {
            "steps": steps,
            "num_targets": 9,
            "alpha_max": 0.1,
            "eta": 1.05,
            "beta": 0.9,
            "early_stop": False,
        }
        for name, steps in STEPS.items()
    }

    def check(self) -> None:
        at_least(1, steps=self.steps, num_targets=self.num_targets, eta=self.eta)
        within("[0, 1]", alpha_max=self.alpha_max)
        within("(0, 1)", beta=self.beta)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: Generator
    ) -> Images:
        if self.preset is not None:
            return filtered(victim, x, y, self._attempts(victim, threat))
        best = Best.start(x)
        with torch.no_grad():
            targets = wrong_classes(victim(x), y, self.num_targets)
        for target in targets:
            rows = (best.correct > 0).nonzero().flatten()
            if len(rows) == 0:
                break
            found = self._search(victim, x[rows], y[rows], target[rows], threat)
            beyond = torch.isfinite(found.distance).view(-1, 1, 1, 1)
            point = threat.project(torch.where(beyond, found.point, found.last), x[rows])
            best.judge(victim, rows, point, y[rows])
        return best.x

    def _search(
        self, victim: Victim, x: Images, y: Labels, target: Labels, threat: Threat
    ) -> Found:
        """All steps; with `early_stop` only where the distance nears eps, see `BOUNDARY_CHECKS`."""
        found = Found(x, torch.full_like(x[:, 0, 0, 0], math.inf), x)
        rows, done = torch.arange(len(x), device=x.device), 0
        for share, factor in (*(BOUNDARY_CHECKS if self.early_stop else ()), (1.0, math.inf)):
            end = min(self.steps, max(BOUNDARY_STEPS, round(share * self.steps)))
            if end > done and len(rows) > 0:
                part = Found(*(values[rows] for values in found))
                part = self.walk(victim, x[rows], y[rows], target[rows], threat, part, end - done)
                found = Found(*(a.index_copy(0, rows, b) for a, b in zip(found, part, strict=True)))
            done, distance = end, found.distance[rows] / threat.eps
            # an image without any adversarial point yet gets a fifth of the steps
            near = (distance <= factor) | (distance.isinf() & (share < 0.2))
            rows = rows[near & (distance > 1)]
        return found

    def walk(
        self,
        victim: Victim,
        x: Images,
        y: Labels,
        target: Labels,
        threat: Threat,
        found: Found | None = None,
        steps: int | None = None,
    ) -> Found:
        """Moves for one target class per image, from the image or from what was found so far."""
        if found is None:
            found = Found(x, torch.full_like(x[:, 0, 0, 0], math.inf), x)
        nearest, distance, point = found
        for _ in range(self.steps if steps is None else steps):
            point = self._move(victim, point, x, y, target, threat.norm)
            with torch.no_grad():
                fooled = ~correct(victim(point), y)
            length = norms(point - x, threat.norm)
            closer = fooled & (length < distance)
            nearest = torch.where(closer.view(-1, 1, 1, 1), point, nearest)
            distance = torch.where(closer, length, distance)
            # after a success the next step starts nearer to the image, to find closer points
            back = x + (point - x) * self.beta
            point = torch.where(fooled.view(-1, 1, 1, 1), back, point)
        return Found(nearest, distance, point)

    def _move(
        self, victim: Victim, point: Images, x: Images, y: Labels, target: Labels, norm: float
    ) -> Images:
        """A mean of two moves beyond the linearised boundary, from the last point and the image."""
        with torch.enable_grad():
            here = point.detach().requires_grad_()
            gap = targeted_margin(victim(here), y, target)
        slope = input_gradient(gap, here).flatten(1)
        gap = gap.detach()
        # the same linear model, evaluated at the image
        at_image = gap + (slope * (x - point).flatten(1)).sum(1)
        near = to_hyperplane(point.flatten(1), slope, gap, norm).view_as(x)
        far = to_hyperplane(x.flatten(1), slope, at_image, norm).view_as(x)
        a, b = (norms(move, norm).clamp_min(1e-8) for move in (near, far))
        # the paper leans to the image where the last point is far from its boundary
        share = per_image((a / (a + b)).clamp(0.0, self.alpha_max), x)
        mixed = (point + self.eta * near) * (1 - share) + (x + self.eta * far) * share
        return mixed.clamp(0.0, 1.0)

    def _attempts(self, victim: Victim, threat: Threat) -> Callable[[int], list[Attempt]]:
        """One attempt per class rank, with all the queries of the published code."""

        def towards(rank: int) -> Attempt:
            def attempt(x: Images, y: Labels) -> tuple[Images, Bool[Tensor, " B"]]:
                found = x.clone()
                rows = correct(victim(x), y).nonzero().flatten()
                if len(rows) > 0:
                    target = victim(x).sort(dim=1).indices[:, -rank]
                    walk = self.walk(victim, x[rows], y[rows], target[rows], threat)
                    found[rows] = walk.point
                length = norms(found - x, threat.norm)
                return found, ~correct(victim(found), y) & (length <= threat.eps)

            return attempt

        return lambda classes: [
            # rank 1 is the predicted class
            towards(rank)
            for rank in range(2, min(self.num_targets, classes - 1) + 2)
        ]
