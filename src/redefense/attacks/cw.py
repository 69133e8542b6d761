"""Carlini and Wagner's attack: minimises the L2 distance by gradient descent.

Every image has its own trade-off constant, step sizes and stopping point.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.attacks.base import (
    RED_RELEASED,
    TORCHATTACKS,
    Attack,
    Distortion,
    Presets,
    input_gradient,
)
from redefense.attacks.minimal import in_blocks
from redefense.attacks.objectives import margin
from redefense.limits import at_least, not_negative, positive
from redefense.networks import differentiating
from redefense.threat import Threat, per_image
from redefense.types import Float, Images, Labels, Victim, correct

_INSET, _INSET_MOST = 1e-6, 1e-2  # CW: distance from the border of the box at the start
_BOLDER = 10.0  # CW: growth of the rate until an image is fooled, with c and the inset
_CONVERGED = 0.9999  # CW: a loss above this share of the lowest one is not falling
_HALVINGS = 8  # CW: bisection steps towards the image, at the end


def to_box(w: Tensor) -> Tensor:
    """Any real number to (0, 1): the change of variables that keeps CW inside the box."""
    return 0.5 * (torch.tanh(w) + 1)


@dataclass
class _Adam:
    """Adam (Kingma & Ba, 2015) on a batch from which images can be removed."""

    rate: Tensor
    mean: Tensor
    square: Tensor
    count: int = 0

    def move(self, w: Tensor, grad: Tensor, share: float) -> Tensor:
        """One step at a fraction of the learning rate."""
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * grad
        self.square = 0.999 * self.square + 0.001 * grad**2
        mean = self.mean / (1 - 0.9**self.count)
        square = self.square / (1 - 0.999**self.count)
        return w - share * self.rate * mean / (square.sqrt() + 1e-8)

    def select(self, rows: Tensor) -> None:
        self.rate = self.rate[rows]
        self.mean, self.square = self.mean[rows], self.square[rows]


@dataclass
class _Smallest:
    """Per image the smallest successful change, or else the point of the highest margin.

    Margins are the wrong class's lead minus the required lead; positive ones are successes.
    """

    x: Tensor
    size: Tensor
    margin: Tensor

    def offer(self, rows: Tensor, point: Tensor, size: Tensor, margin: Tensor) -> Tensor:
        """Replace points of the given rows by better ones; return a mask of successes."""
        fooled = margin > 0
        closer = torch.isinf(self.size[rows]) & (margin > self.margin[rows])
        better = torch.where(fooled, size < self.size[rows], closer)
        taken = rows[better]
        self.x[taken], self.margin[taken] = point[better], margin[better]
        self.size[taken] = torch.where(fooled, size, math.inf)[better]
        return fooled


def cw_descent(
    victim: Victim,
    x: Images,
    y: Labels,
    c: Float[Tensor, " B"],
    best: _Smallest,
    *,
    steps: int,
    rate: Float[Tensor, " B"],
    inset: Float[Tensor, " B"],
    kappa: float,
) -> Tensor:
    """One descent on |x' - x|^2 + c * max(margin of the true class + kappa, 0), from the image.

    The learning rate falls linearly to zero. The start keeps a relative distance `inset` from the
    border of the box, where the change of variables has zero gradient and pixels could never move.
    An image stops when its loss has not fallen for half of the steps. The point after the last step
    is scored, too.

    Returns:
        (B,) which images were fooled with this c.
    """
    # the inverse of `to_box`, just inside its ends
    w = torch.atanh((2 * x - 1) * per_image(1 - inset, x))
    rows = torch.arange(len(x), device=x.device)
    adam = _Adam(per_image(rate, x), torch.zeros_like(w), torch.zeros_like(w))
    success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    lowest, since = torch.full_like(c, math.inf), torch.zeros_like(y)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            w = w.detach().requires_grad_()
            point = to_box(w)
            size = (point - x[rows]).square().flatten(1).sum(1)
            gain = margin(victim(point), y[rows]).to(size.dtype) - kappa
            # a success has no margin term: from there on only its distance is minimised
            loss = size + c[rows] * (-gain).clamp_min(0.0)
            total = loss.sum()
        fooled = best.offer(rows, point.detach(), size.detach(), gain.detach())
        success[rows] |= fooled
        if step == steps:
            break
        w = adam.move(w.detach(), input_gradient(total, w), 1 - step / steps)
        falling = loss.detach() < _CONVERGED * lowest[rows]
        lowest[rows] = torch.where(falling, loss.detach(), lowest[rows])
        since[rows] = torch.where(falling, step, since[rows])
        # half of the steps without progress: the rest, at a falling rate, would not help
        patient = step - since[rows] < max(steps // 2, 1)
        if not bool(patient.all()):
            w, rows = w[patient], rows[patient]
            adam.select(patient)
            if not len(rows):
                break
    return success


def carlini_wagner(
    victim: Victim, x: Images, y: Labels, *, searches: int, steps: int, rate: float, c: float,
    kappa: float,
) -> Images:  # fmt: skip
    """Repeated descents with a bisected trade-off c per image; see `CW`."""
    best = _Smallest(
        x.clone(),
        torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device),
        torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device),
    )
    with torch.no_grad():
        gain = margin(victim(x), y).to(x.dtype) - kappa
    rows = torch.arange(len(x), device=x.device)
    # misclassified images have distance zero
    fooled = best.offer(rows, x, torch.zeros_like(gain), gain)
    rows = rows[~fooled]
    low, high = torch.zeros_like(gain), torch.full_like(gain, math.inf)
    now, failures = torch.full_like(gain, c), torch.zeros_like(gain)
    for _ in range(searches if len(rows) else 0):
        part = _Smallest(best.x[rows], best.size[rows], best.margin[rows])
        success = cw_descent(
            victim, x[rows], y[rows], now[rows], part, steps=steps, kappa=kappa,
            # an image that no descent fooled needs larger steps, and a start that can leave the
            # border
            rate=rate * _BOLDER ** failures[rows],
            inset=(_INSET * 100 ** failures[rows]).clamp_max(_INSET_MOST),
        )  # fmt: skip
        best.x[rows], best.size[rows], best.margin[rows] = part.x, part.size, part.margin
        won, lost = rows[success], rows[~success]
        high[won], low[lost] = now[won], now[lost]
        # also for images that are not attacked: they are never read again
        failures += high.isinf()
        now[rows] = torch.where(
            # bisected on a log scale; the clamp is for a low of 0, before the first failure
            high[rows].isinf(),
            10 * now[rows],
            torch.sqrt(high[rows] * low[rows].clamp_min(1e-3)),
        )
    shorten(victim, x, y, best, kappa)
    return best.x


def shorten(victim: Victim, x: Images, y: Labels, best: _Smallest, kappa: float) -> None:
    """Move back towards the image while the victim stays fooled, by bisection."""
    rows = ((best.size > 0) & ~best.size.isinf()).nonzero().flatten()
    if not len(rows):
        return
    x, y, far = x[rows], y[rows], best.x[rows]
    low, high = torch.zeros_like(best.size[rows]), torch.ones_like(best.size[rows])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        point = x + per_image(middle, x) * (far - x)
        with torch.no_grad():
            gain = margin(victim(point), y).to(x.dtype) - kappa
        size = (point - x).square().flatten(1).sum(1)
        fooled = best.offer(rows, point, size, gain)
        low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)


def carlini_wagner_published(
    victim: Victim, x: Images, y: Labels, *, steps: int, rate: float, c: float, kappa: float
) -> Images:
    """CW as in TorchAttacks 3.5.1: one c, a margin that ignores logits <= 0, one stopping point.

    The whole batch stops when its summed loss has risen between two checks; images that do not fool
    the victim by then are returned unchanged.
    """
    # at the border the published inverse is infinite, and such pixels never move
    scaled = (2 * x - 1).clamp(-1.0, 1.0)
    w = (0.5 * torch.log((1 + scaled) / (1 - scaled))).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=rate)
    # 1e10 is the library's initial distance
    best, best_size, last = x.clone(), torch.full((len(x),), 1e10, dtype=x.dtype), math.inf
    best_size = best_size.to(x.device)
    for step in range(steps):
        with torch.enable_grad():
            point = to_box(w)
            size = F.mse_loss(point.flatten(1), x.flatten(1), reduction="none").sum(1)
            logits = cast(Tensor, victim(point))
            true = F.one_hot(y, logits.shape[1]).to(logits.dtype)
            own, other = (true * logits).max(1)[0], ((1 - true) * logits).max(1)[0]
            loss = size.sum() + c * (own - other).clamp_min(-kappa).sum()
            with differentiating():
                (w.grad,) = torch.autograd.grad(loss, w)
        optimizer.step()
        better = ~correct(logits.detach(), y) & (size.detach() < best_size)
        best_size = torch.where(better, size.detach(), best_size)
        best = torch.where(per_image(better, x), point.detach(), best)
        if step % max(steps // 10, 1) == 0:
            if loss.item() > last:
                break
            last = loss.item()
    return best


@dataclass(frozen=True, kw_only=True)
class CW(Attack):
    """Smallest L2 change by gradient descent (Carlini & Wagner, 2017).

    Minimises |x' - x|^2 + c * max(z_y - max_{k != y} z_k + kappa, 0) over tanh-transformed pixels
    with Adam; c is bisected per image, the smallest success of all descents is moved back to the
    boundary and returned. On failure the point of the highest margin is returned. Valid for logits
    of any sign, including log-probabilities.

    Attributes:
        searches: number of descents, each with another c.
        steps: Adam steps of a descent; each costs a forward and a backward pass.
        rate: Adam's learning rate.
        c: first trade-off; times 10 until an image is fooled, then bisected on a log scale.
        kappa: lead in logits that a wrong class must have before an image counts as a success.
        preset: published settings: a single descent, the library's margin and stopping rule.
    """

    searches: int = 6
    steps: int = 50
    rate: float = 0.02
    c: float = 1.0
    kappa: float = 0.0
    preset: str | None = None

    bounded: ClassVar[bool] = False
    stated: ClassVar[Distortion | None] = ("l2", 0.5)
    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "smallest L2 change by Adam on distance and margin, c bisected"
    presets: ClassVar[Presets] = {
        TORCHATTACKS: {"searches": 1, "steps": 50, "rate": 0.01, "c": 1.0, "kappa": 0.0},
        RED_RELEASED: {"searches": 1, "steps": 50, "rate": 0.01, "c": 0.1, "kappa": 0.0},
    }

    def check(self) -> None:
        at_least(1, steps=self.steps, searches=self.searches)
        positive(rate=self.rate, c=self.c)
        not_negative(kappa=self.kappa)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        if self.preset is not None:
            return carlini_wagner_published(
                victim, x, y, steps=self.steps, rate=self.rate, c=self.c, kappa=self.kappa
            )
        return in_blocks(
            x, y,
            lambda x, y: carlini_wagner(
                victim, x, y, searches=self.searches, steps=self.steps, rate=self.rate, c=self.c,
                kappa=self.kappa,
            ),
        )  # fmt: skip
