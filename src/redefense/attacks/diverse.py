"""DI2-FGSM: gradient ascent on randomly resized and padded copies of the images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.attacks.base import Oracle, OracleResult, Presets, input_gradient
from redefense.attacks.gradient import PUBLISHED, TEN_STEPS, Ascent
from redefense.attacks.objectives import Objective, objective_named
from redefense.limits import not_negative, within
from redefense.rng import ImageStreams
from redefense.threat import Threat
from redefense.types import Bool, Images, Int, Labels, Victim, correct

Transform = Callable[[Tensor], Tensor]

_DIVERSE: Final[Mapping[str, object]] = {
    **TEN_STEPS, "decay": 0.0, "resize_rate": 0.9, "diversity_prob": 0.5,
}  # fmt: skip


def shrink_and_pad(
    x: Images, height: Int[Tensor, " B"], width: Int[Tensor, " B"],
    top: Int[Tensor, " B"], left: Int[Tensor, " B"],
) -> Images:  # fmt: skip
    """Each image resized (bilinear) to its own size and placed on a black canvas of the old one."""
    rows, inside_rows = _source(height, top, x.shape[2], x)
    columns, inside_columns = _source(width, left, x.shape[3], x)
    grid = torch.stack(
        torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1
    )  # (B, H, W, 2), each in [-1, 1] over the source image
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    # clamping to the border, as a resize does; pixels outside the resized image are black
    seen = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return seen * inside


def _source(
    size: Int[Tensor, " B"], offset: Int[Tensor, " B"], full: int, like: Tensor
) -> tuple[Tensor, Bool[Tensor, "B full"]]:
    """Source coordinate of each pixel of one axis, and whether it lies in the resized image."""
    place = torch.arange(full, device=like.device) - offset[:, None]
    # centres of pixels, in the coordinates of grid_sample without aligned corners
    where = (2 * place + 1).to(like.dtype) / size[:, None].to(like.dtype) - 1
    return where, (place >= 0) & (place < size[:, None])


def own_transforms(streams: ImageStreams, rate: float, prob: float) -> Transform:
    """A new transform per image and call, the identity with probability 1 - prob."""

    def transform(x: Images) -> Images:
        full = x.shape[3]
        width = streams.integers(min(int(rate * full), full - 1), full).clamp_min(1)
        height = (width * x.shape[2] / full).round().long().clamp_min(1)
        top = streams.integers(0, x.shape[2] - height + 1)
        left = streams.integers(0, full - width + 1)
        chosen = streams.uniform() < prob
        diverse = shrink_and_pad(x, height, width, top, left)
        return torch.where(chosen.view(-1, 1, 1, 1), diverse, x)

    return transform


def batch_transforms(rng: torch.Generator, rate: float, prob: float) -> Transform:
    """The published form: one transform for the batch, which preserves the aspect ratio.

    It was published for square images, for which the draws are the same.
    """

    def integer(low: int, high: int) -> int:
        draw = torch.randint(low, high, (1,), dtype=torch.int32, generator=rng, device=rng.device)
        return int(draw)

    def transform(x: Images) -> Images:
        tall, full = x.shape[2:]
        width = max(integer(int(full * rate), full), 1)
        height = max(round(width * tall / full), 1)
        spare_rows, spare_columns = tall - height, full - width
        top, left = integer(0, max(spare_rows, 1)), integer(0, max(spare_columns, 1))
        small = F.interpolate(x, size=[height, width], mode="bilinear", align_corners=False)
        padded = F.pad(small, [left, spare_columns - left, top, spare_rows - top])
        # the number is drawn in any case, which keeps the sequence of draws fixed
        chosen = float(torch.rand(1, generator=rng, device=rng.device)) < prob
        return padded if chosen else x

    return transform


def transformed_oracle(
    transform: Transform, victim: Victim, y: Labels, objective: Objective, *, judge: bool
) -> Oracle:
    """Computes gradients through a transform; one more forward pass scores the plain points."""

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        x = x.detach().requires_grad_(with_grad)
        grad = None
        if with_grad:
            with torch.enable_grad():
                value = objective(victim(transform(x)), y)
            grad = input_gradient(value, x)
        if not judge:
            return OracleResult(value.detach(), torch.ones_like(value), grad)
        with torch.no_grad():
            logits = victim(x)
            right = correct(logits, y).to(x.dtype)
            return OracleResult(objective(logits, y), right, grad)

    return oracle


@dataclass(frozen=True, kw_only=True)
class DI2FGSM(Ascent):
    """BIM through random resizing and padding (Xie et al., 2019), with momentum if `decay` > 0.

    Points are scored untransformed, with one more forward pass per step. A preset scores no points
    and uses one transform for the whole batch.

    Attributes:
        decay: momentum factor, >= 0.
        resize_rate: smallest width of the resized image as a fraction of the full one, in (0, 1).
        diversity_prob: probability with which an image is transformed at a step, in [0, 1].
    """

    decay: float = 0.0
    resize_rate: float = 0.9
    diversity_prob: float = 0.5

    summary: ClassVar[str] = "BIM through randomly resized and padded images"
    presets: ClassVar[Presets] = {name: _DIVERSE for name in PUBLISHED}

    def check(self) -> None:
        Ascent.check(self)
        not_negative(decay=self.decay)
        within("(0, 1)", resize_rate=self.resize_rate)
        within("[0, 1]", diversity_prob=self.diversity_prob)

    def perturb(
        self, victim: Victim, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        if self.preset is None:
            streams = ImageStreams.of(rng, x, y)
            transform = own_transforms(streams, self.resize_rate, self.diversity_prob)
        else:
            transform = batch_transforms(rng, self.resize_rate, self.diversity_prob)
        objective = objective_named(self.loss)
        oracle = transformed_oracle(transform, victim, y, objective, judge=self.keep_best)
        return self.ascend(oracle, [x], x, threat, decay=self.decay)
