"""DeepFool, which searches for the smallest change in L2, and functions shared with its kind.

They are not bounded by the threat: report the distortion together with the accuracy. Every image
has its own steps and stopping point and is removed from the batch when it is done. A result does
not depend on the rest of the batch, and no forward pass is spent on a finished image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from redefense.attacks.base import (
    RED_RELEASED,
    TORCHATTACKS,
    Attack,
    Distortion,
    Presets,
    input_gradient,
)
from redefense.attacks.objectives import margin
from redefense.errors import ConfigError
from redefense.limits import at_least, not_negative
from redefense.threat import Threat, per_image
from redefense.types import Float, Images, Int, Labels, Logits, Victim, correct

_BLOCK = {"cpu": 64}  # images attacked at a time: larger batches exceed a processor's cache
_BLOCK_ELSEWHERE = 512  # uses an accelerator fully and bounds the memory of the Jacobians
_NUDGE = 1e-5  # added to DeepFool's distance, in pixel units: a point on the boundary must cross it


def in_blocks(x: Images, y: Labels, run: Callable[[Images, Labels], Images]) -> Images:
    """Attack images that do not depend on each other in batches of bounded size."""
    size = _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE)
    return torch.cat(list(map(run, x.split(size), y.split(size))))


def gaps_and_slopes(
    victim: Victim, x: Images, y: Labels, targets: Int[Tensor, "B R"] | int
) -> tuple[Logits, Int[Tensor, "B R"], Float[Tensor, "B R"], Float[Tensor, "B R ch H W"]]:
    """Logit gaps of wrong classes to the true class, and their gradients.

    Args:
        victim: images to logits.
        x: points.
        y: labels.
        targets: wrong classes per image, or the number of highest wrong classes.

    Returns:
        Logits; targets; gaps z_t - z_y; the gradients of the gaps, finite.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = cast(Tensor, victim(x))
        if isinstance(targets, int):
            # the true class is no target
            wrong = logits.detach().scatter(1, y[:, None], -math.inf)
            targets = wrong.topk(min(targets, logits.shape[1] - 1), dim=1).indices
        gaps = logits.gather(1, targets) - logits.gather(1, y[:, None])
        totals = gaps.sum(0).unbind()
    slopes = [input_gradient(total, x, keep_graph=True) for total in totals]
    return logits.detach(), targets, gaps.detach(), torch.stack(slopes, dim=1)


def to_nearest(
    gaps: Float[Tensor, "B R"], slopes: Float[Tensor, "B R ch H W"], nudge: float
) -> tuple[Tensor, Int[Tensor, " B"]]:
    """The shortest step that closes a gap if gaps are linear; zero where all gradients are zero.

    Returns:
        The step (B, ch, H, W) and the position (B,) of the gap it closes.
    """
    size = torch.linalg.vector_norm(slopes.flatten(2), dim=2)
    distance = (gaps.abs() / size).nan_to_num(nan=math.inf)
    pick = distance.argmin(1)
    rows = torch.arange(len(pick), device=pick.device)
    slope, size = slopes[rows, pick], size[rows, pick]
    # this order of operations reproduces the library's steps up to the last bit but one
    length = gaps[rows, pick].abs() + nudge * size
    step = per_image(length, slope) * slope / per_image(size**2, slope)
    return torch.where(per_image(size > 0, step), step, torch.zeros_like(step)), pick


def free_slopes(slopes: Float[Tensor, "B R ch H W"], x: Images) -> Tensor:
    """Gradients, zero at pixels on the border of the box that would leave it."""
    x = x[:, None]
    return slopes.masked_fill(((x <= 0) & (slopes < 0)) | ((x >= 1) & (slopes > 0)), 0.0)


def deepfool(
    victim: Victim, x: Images, y: Labels, *, steps: int, overshoot: float, num_targets: int
) -> Images:
    """Repeated steps to the nearest linearised boundary, within the box.

    Each image stops where it is first misclassified. The point after the last step is checked, too;
    on failure the point of the highest margin is returned. Steps skip the pixels that cannot move
    further; otherwise images with many black pixels are never misclassified.
    """
    best, best_margin = x.clone(), torch.full_like(y, -math.inf, dtype=x.dtype)
    active, point = torch.arange(len(x), device=x.device), x
    for step in range(steps + 1):
        with torch.no_grad():
            reached = margin(victim(point), y[active])
        better = reached > best_margin[active]
        best[active[better]] = point[better]
        best_margin[active[better]] = reached[better].to(x.dtype)
        still = reached <= 0
        active, point = active[still], point[still]
        if step == steps or not len(active):
            break
        _, _, gaps, slopes = gaps_and_slopes(victim, point, y[active], num_targets)
        move, _ = to_nearest(gaps, free_slopes(slopes, point), _NUDGE)
        # beyond the boundary: on it neither class has the larger logit
        point = (point + (1 + overshoot) * move).clamp(0.0, 1.0)
    return best


def deepfool_published(
    victim: Victim, x: Images, y: Labels, *, steps: int, overshoot: float
) -> tuple[Images, Labels]:
    """DeepFool as in TorchAttacks 3.5.1: all classes, the last step is not checked.

    The only deviation: an image with zero gradient is not changed instead of becoming NaN.

    Returns:
        The points, and the class that each has reached or was last moved towards.
    """
    point, target = x.clone(), y.clone()
    active = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        with torch.enable_grad():
            here = point[active].requires_grad_()
            logits = cast(Tensor, victim(here))
            totals = logits.sum(0).unbind()
        predicted = logits.detach().argmax(1)
        target[active] = predicted
        still = correct(logits.detach(), y[active])
        if not bool(still.any()):
            break
        rows = [input_gradient(total, here, keep_graph=True) for total in totals]
        active, logits = active[still], logits.detach()[still]
        jacobian = torch.stack([row[still] for row in rows], dim=1)
        wrong = wrong_classes(y[active], logits.shape[1])
        each = torch.arange(len(active), device=x.device)[:, None]
        own = y[active, None]
        gaps = logits.gather(1, wrong) - logits.gather(1, own)
        move, pick = to_nearest(gaps, jacobian[each, wrong] - jacobian[each, own], 0.0)
        target[active] = wrong.gather(1, pick[:, None]).squeeze(1)
        point[active] = (point[active] + (1 + overshoot) * move).clamp(0.0, 1.0)
    return point, target


def wrong_classes(y: Labels, num_classes: int) -> Int[Tensor, "B R"]:
    """(B, C - 1) all classes but the true one, ascending."""
    k = torch.arange(num_classes - 1, device=y.device).expand(len(y), -1)
    return k + (k >= y[:, None]).long()


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """Smallest L2 change by repeated linearisation (Moosavi-Dezfooli et al., 2016).

    Misclassified images are returned unchanged.

    Attributes:
        steps: maximum number of linearisations; each costs one forward and `num_targets` backward
            passes, and one more forward pass to check the result.
        overshoot: distance of each step beyond the boundary, as a fraction of the step.
        num_targets: number of highest wrong classes that are linearised, as in the paper.
        preset: published settings: all classes, the last step not checked.
    """

    steps: int = 50
    overshoot: float = 0.02
    num_targets: int = 9
    preset: str | None = None

    bounded: ClassVar[bool] = False
    stated: ClassVar[Distortion | None] = ("l2", 0.5)
    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "smallest L2 change by steps to the nearest linearised boundary"
    presets: ClassVar[Presets] = {
        TORCHATTACKS: {"steps": 50, "overshoot": 0.02},
        RED_RELEASED: {"steps": 50, "overshoot": 0.02},
    }

    def check(self) -> None:
        at_least(1, steps=self.steps, num_targets=self.num_targets)
        if self.preset is not None and self.num_targets != 9:
            raise ConfigError(
                f"preset {self.preset!r} linearises all classes: omit num_targets, got "
                f"{self.num_targets}"
            )
        not_negative(overshoot=self.overshoot)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        steps, overshoot, num_targets = self.steps, self.overshoot, self.num_targets

        def run(x: Images, y: Labels) -> Images:
            if self.preset is not None:
                return deepfool_published(victim, x, y, steps=steps, overshoot=overshoot)[0]
            return deepfool(victim, x, y, steps=steps, overshoot=overshoot, num_targets=num_targets)

        return in_blocks(x, y, run)
