"""The threat model: norm and radius of the allowed perturbation."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from redefense.errors import ConfigError
from redefense.radius import check_linf, read_eps, read_norm
from redefense.types import Float, Images

TINY = 1e-12


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) values, one per image, so that they broadcast over `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def norms(delta: Tensor, p: float) -> Float[Tensor, " B"]:
    """(B,) p-norm of each image's perturbation, p = 0 counts changed pixels of (B, ch, H, W)."""
    if p == 0:
        return (delta != 0).any(1).flatten(1).sum(1).to(delta.dtype)
    lengths: Tensor = torch.linalg.vector_norm(delta.flatten(1), ord=p, dim=1)
    return lengths


def steepest(grad: Tensor, norm: float) -> Tensor:
    """Steepest ascent direction of unit length in `norm` (inf or 2), per image; 0 where grad is."""
    if norm == math.inf:
        return grad.sign()
    # scaled first: squares of tiny gradients underflow
    scaled = grad / per_image(norms(grad, math.inf).clamp_min(torch.finfo(grad.dtype).tiny), grad)
    return scaled / per_image(norms(scaled, 2.0).clamp_min(TINY), scaled)


def checked_threat(threat: object) -> "Threat":
    """A threat given by a user.

    Raises:
        ConfigError: for another object.
    """
    if not isinstance(threat, Threat):
        raise ConfigError(
            "threat must be a redefense.Threat, such as Threat(norm='linf', eps='8/255'), "
            f"got {threat!r}"
        )
    return threat


@dataclass(frozen=True, kw_only=True, slots=True, init=False)
class Threat:
    """The adversary may move an image at most `eps` in `norm`, within [0, 1].

    Args:
        norm: `math.inf` or 2, or text such as "linf", "Linf", "inf", "l2", "2".
        eps: in pixel units of [0, 1]; a number, or text such as "8/255".

    Attributes:
        norm: inf or 2.0.
        eps: the radius as a number.

    Raises:
        ConfigError: if norm is not inf or 2, or eps is negative, not finite or, for L-inf, above 1.
    """

    norm: float
    eps: float

    def __init__(self, *, norm: float | str = math.inf, eps: float | str = 8 / 255) -> None:
        object.__setattr__(self, "norm", float(read_norm(norm, "threat norm")))
        object.__setattr__(self, "eps", read_eps(eps, "threat eps"))
        if self.eps < 0:
            raise ConfigError(f"threat eps must be finite and not negative, got {self.eps}")
        if self.norm == math.inf:
            check_linf(self.eps)

    def with_radius(self, eps: Float[Tensor, ""]) -> "Threat":
        """The same ball with a radius on the device. The radius is not checked."""
        # without the constructor, which would read the value from the device
        ball = copy.copy(self)
        object.__setattr__(ball, "eps", eps)
        return ball

    def project(self, x_adv: Images, x: Images) -> Images:
        """Nearest point of the ball, then of [0, 1]; allowed points are not changed."""
        delta = x_adv - x
        if self.norm == math.inf:
            delta = delta.clamp(-self.eps, self.eps)
        else:
            shrink = (self.eps / norms(delta, 2.0).clamp_min(TINY)).clamp_max(1.0)
            delta = delta * per_image(shrink, delta)
        # clamping moves each pixel towards that of `x`, so the result stays in the ball
        return (x + delta).clamp(0.0, 1.0)

    def noise(self, uniform: Tensor, share: Tensor | None = None) -> Tensor:
        """A random start inside the ball: uniform in L-inf, for L2 a uniform cube direction.

        Args:
            uniform: (B, ch, H, W) numbers in [0, 1).
            share: (B,) fractions in [0, 1) of the radius for L2 starts; 1 by default. They must be
                independent of `uniform`.
        """
        cube = 2 * uniform - 1
        if self.norm == math.inf:
            return self.eps * cube
        out = steepest(cube, 2.0) * self.eps
        return out if share is None else out * per_image(share, out)
