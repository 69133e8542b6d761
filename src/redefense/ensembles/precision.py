"""Attacks on images in half precision: they compute in single precision and round at the end."""

import math

import torch
from torch import Tensor, nn

from redefense.ensembles import Ensemble
from redefense.networks import Queried, as_logits
from redefense.threat import Threat, norms
from redefense.types import Images, Logits


class _CastInput(Ensemble):
    """An ensemble whose members are queried with images of one dtype."""

    def __init__(self, ensemble: Ensemble, dtype: torch.dtype) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble, self.dtype = ensemble, dtype
        self.training = ensemble.training

    def logits_of(self, m: int, x: Images) -> Logits:
        return as_logits(self.ensemble.logits_of(m, x.to(self.dtype)), x)

    def member(self, m: int) -> nn.Module:
        return Queried(self.ensemble.member(m), self.dtype)


def cast_input(victim: nn.Module, x: Images) -> nn.Module:
    """The victim, queried in the dtype of the images, whatever dtype the attack computes in."""
    if not isinstance(victim, Ensemble):
        return Queried(victim, x.dtype)
    # these ensembles already query their members so
    if x.dtype.itemsize >= 4:
        return victim
    return _CastInput(victim, x.dtype)


def rounded(points: Images, x: Images, threat: Threat | None) -> Images:
    """Round points of single precision to the dtype of `x`, inside the ball.

    Args:
        points: perturbed images in single precision.
        x: the clean images.
        threat: the bound; None for attacks that are not bounded.

    Returns:
        The nearest numbers. Where these leave the ball, the adjacent ones towards `x`: in L-inf for
        single pixels, in L2 for whole images.
    """
    if points.dtype == x.dtype:
        return points
    near = points.to(x.dtype)
    if threat is None:
        return near
    moved, allowed = near.to(points.dtype) - x.to(points.dtype), points - x.to(points.dtype)
    if threat.norm == math.inf:
        outside = moved.abs() > threat.eps
    else:
        outside = (norms(moved, 2.0) > threat.eps).view(-1, 1, 1, 1)
        outside = outside & (moved.abs() > allowed.abs())
    return torch.where(outside, _towards(near, x), near)


def _towards(near: Tensor, x: Tensor) -> Tensor:
    """The next numbers towards `x`. All are non-negative, so their bit patterns are ordered."""
    # of the two zeros one has the bits of a negative number
    bits, goal = ((part + 0.0).contiguous().view(torch.int16) for part in (near, x))
    return (bits + (goal - bits).sign()).view(near.dtype).view_as(near)
