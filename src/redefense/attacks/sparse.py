"""SparseFool: few changed coordinates, by DeepFool and a linear programme with a closed form."""

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from redefense.attacks.base import TORCHATTACKS, Attack, Distortion, Presets, input_gradient
from redefense.attacks.minimal import deepfool, deepfool_published, in_blocks
from redefense.attacks.objectives import margin
from redefense.limits import at_least, not_negative, within
from redefense.threat import Threat, norms, per_image
from redefense.types import Images, Labels, Victim, correct

_BEYOND = 1e-3  # distance beyond the hyperplane, along its unit normal
_LEAST = 1e-4  # the smallest move of a coordinate


def cross_hyperplane(x: Images, normal: Images, point: Images) -> Images:
    """Move as few coordinates as a greedy choice allows until a hyperplane is crossed.

    The hyperplane goes through `point` with unit `normal` (zero: the image is not changed).
    Coordinates move one after the other, largest component of the normal first, along the normal's
    sign and within [0, 1]: each as far as the crossing needs, or to its bound. Sorting and a
    cumulative sum compute at once what the published loop finds coordinate by coordinate.

    Returns:
        The moved images. Where `x` is already beyond the hyperplane, the result of the published
        loop: it moves every coordinate.
    """
    # sums of thousands of terms decide a sign: single precision would cross too early or too late
    flat, n = x.flatten(1).double(), normal.flatten(1).double()
    start = (n * (flat - point.flatten(1).double())).sum(1)
    share, order = n.abs().sort(dim=1, descending=True, stable=True)
    sign = n.gather(1, order).sign()
    here = flat.gather(1, order)
    # a coordinate without slope cannot help to cross
    room = torch.where(sign > 0, 1 - here, here).masked_fill(share == 0, 0.0)
    value = start[:, None] + (share * room).cumsum(1) - share * room  # before each coordinate
    side = start.sign()[:, None]
    need = ((value + side * _BEYOND).abs() / share.clamp_min(1e-300)).clamp_min(_LEAST)
    length = torch.minimum(need, room)
    crossed = (value + share * length).sign() != side
    rank = torch.arange(flat.shape[1], device=x.device)
    stop = torch.where(crossed.any(1), crossed.long().argmax(1), flat.shape[1])
    length = length.masked_fill(rank > stop[:, None], 0.0)
    beyond = start > 0
    if bool(beyond.any()):
        length[beyond] = _walk_away(start[beyond], share[beyond], room[beyond])
    moved = flat.scatter_add(1, order, sign * length)
    return moved.to(x.dtype).clamp(0.0, 1.0).view_as(x)


def _walk_away(value: Tensor, share: Tensor, room: Tensor) -> Tensor:
    """(B, D) moves of the published loop from beyond the hyperplane: the sign never changes."""
    lengths = []
    for s, r in zip(share.unbind(1), room.unbind(1), strict=True):
        need = ((value + _BEYOND) / s.clamp_min(1e-300)).clamp_min(_LEAST)
        lengths.append(torch.minimum(need, r))
        value = value + s * lengths[-1]
    return torch.stack(lengths, dim=1)


def boundary_normal(victim: Victim, x: Images, y: Labels, other: Labels) -> Images:
    """(B, ch, H, W) unit gradient of z_k - z_y, k the class at `x` or, where that is y, `other`.

    Zero where there is no gradient.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = cast(Tensor, victim(x))
        top = logits.detach().argmax(1)
        pair = torch.stack([torch.where(top == y, other, top), y], dim=1)
        chosen = logits.gather(1, pair)
        total = (chosen[:, 0] - chosen[:, 1]).sum()
    grad = input_gradient(total, x)
    size = per_image(norms(grad, 2.0), grad)
    return torch.where(size > 0, grad / size.clamp_min(torch.finfo(grad.dtype).tiny), grad)


def sparsefool(
    victim: Victim, x: Images, y: Labels, *, steps: int, lam: float, overshoot: float,
    inner_steps: int,
) -> Images:  # fmt: skip
    """SparseFool as in the paper: each round continues from the result of the last one.

    On failure the point of the highest margin is returned.
    """
    best, best_margin = x.clone(), torch.full_like(y, -math.inf, dtype=x.dtype)
    rows, point, shown = torch.arange(len(x), device=x.device), x, x
    for step in range(steps + 1):
        with torch.no_grad():
            logits = cast(Tensor, victim(shown))
        reached = margin(logits, y[rows])
        better = reached > best_margin[rows]
        best[rows[better]] = shown[better]
        best_margin[rows[better]] = reached[better].to(x.dtype)
        still = reached <= 0
        rows, point, logits = rows[still], point[still], logits[still]
        if step == steps or not len(rows):
            break
        own = y[rows]
        fooling = deepfool(
            victim, point, own, steps=inner_steps, overshoot=overshoot, num_targets=9
        )
        runner_up = logits.scatter(1, own[:, None], -math.inf).argmax(1)
        away = fooling - point
        normal = boundary_normal(victim, fooling, own, runner_up)
        # beyond a fold of the boundary its normal points back; the direction of the step is used
        back = (normal * away).flatten(1).sum(1) <= 0
        length = norms(away, 2.0).clamp_min(torch.finfo(away.dtype).tiny)
        normal = torch.where(per_image(back, x), away / per_image(length, away), normal)
        point = cross_hyperplane(point, normal, point + lam * away)
        shown = (x[rows] + (1 + overshoot) * (point - x[rows])).clamp(0.0, 1.0)
    return best


def sparsefool_published(
    victim: Victim, x: Images, y: Labels, *, steps: int, lam: float, overshoot: float,
    inner_steps: int,
) -> Images:  # fmt: skip
    """SparseFool as in TorchAttacks 3.5.1.

    The hyperplane is scaled from, and the solver restarted at, the clean image. The normal is
    computed beyond the boundary. The last round is not checked. While any image of the batch has
    never been misclassified, the whole batch is queried again, which matters for a randomized
    victim. The only deviation: an image with zero gradient is not changed.
    """
    point = x.clone()
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(steps):
        if bool(done.all()):
            break
        with torch.no_grad():
            wrong = ~correct(victim(point), y)
        done |= wrong
        rows = (~wrong).nonzero().flatten()
        if not len(rows):
            continue
        clean, own = x[rows], y[rows]
        fooling, target = deepfool_published(
            victim, point[rows], own, steps=inner_steps, overshoot=0.02
        )
        far = clean + lam * (fooling - clean)
        crossed = cross_hyperplane(clean, boundary_normal(victim, far, own, target), far)
        point[rows] = (clean + (1 + overshoot) * (crossed - clean)).clamp(0.0, 1.0)
    return point


@dataclass(frozen=True, kw_only=True)
class SparseFool(Attack):
    """Few changed coordinates, by linearised boundaries (Modas et al., 2019).

    Each round finds a boundary point with DeepFool and crosses the tangent there with a greedy
    choice of coordinates. Misclassified images are returned unchanged.

    Attributes:
        steps: rounds.
        lam: relative distance of the hyperplane beyond DeepFool's point; larger values need fewer
            rounds and more coordinates. With 3 (the paper's value) and with 1.5 all images of a
            small CIFAR ResNet are misclassified, with 33 and 20 changed pixels on average.
        overshoot: final extension of the whole change, as a fraction of it.
        inner_steps: DeepFool's steps in each round.
        preset: published settings, see `sparsefool_published`.
    """

    steps: int = 20
    lam: float = 1.5
    overshoot: float = 0.02
    inner_steps: int = 50
    preset: str | None = None

    bounded: ClassVar[bool] = False
    stated: ClassVar[Distortion | None] = ("l0", 10.0)
    randomized: ClassVar[bool] = False
    summary: ClassVar[str] = "few changed coordinates by linearised boundaries"
    presets: ClassVar[Presets] = {
        TORCHATTACKS: {"steps": 10, "lam": 3.0, "overshoot": 0.02, "inner_steps": 50}
    }

    def check(self) -> None:
        at_least(1, steps=self.steps, inner_steps=self.inner_steps)
        within("[1, inf)", lam=self.lam)
        not_negative(overshoot=self.overshoot)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        attack = sparsefool if self.preset is None else sparsefool_published

        def run(x: Images, y: Labels) -> Images:
            return attack(
                victim, x, y, steps=self.steps, lam=self.lam, overshoot=self.overshoot,
                inner_steps=self.inner_steps,
            )  # fmt: skip

        # the published form couples the images of a batch
        return in_blocks(x, y, run) if self.preset is None else run(x, y)
