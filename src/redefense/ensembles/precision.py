"""Attacks on images of half precision: they compute in single precision, and round at the end."""

import math

import torch
from torch import Tensor, nn

from redefense.ensembles import Ensemble
from redefense.networks import Asked, as_logits
from redefense.threat import Threat, norms
from redefense.types import Images, Logits


class _In(Ensemble):
    """An ensemble whose members take images of a certain type, and give usable logits."""

    def __init__(self, ensemble: Ensemble, dtype: torch.dtype) -> None:
        super().__init__(ensemble.num_members, ensemble.mixture)
        self.ensemble, self.dtype = ensemble, dtype

    def logits_of(self, m: int, x: Images) -> Logits:
        return as_logits(self.ensemble.logits_of(m, x.to(self.dtype)), x)

    def member(self, m: int) -> nn.Module:
        return Asked(self.ensemble.member(m), self.dtype)


def asked(victim: nn.Module, x: Images) -> nn.Module:
    """The victim as an attack asks it: in the type of the images, whatever that computes in."""
    if not isinstance(victim, Ensemble):
        return Asked(victim, x.dtype)
    # our own ensembles ask their members so themselves
    if isinstance(victim, Ensemble) and x.dtype.itemsize >= 4:
        return victim
    return _In(victim, x.dtype)


def rounded(points: Images, x: Images, threat: Threat | None) -> Images:
    """Points of single precision in the type of `x`, and still inside the ball.

    Args:
        points: as the victim saw them, rounded to the type of `x`.
        x: the images they are of.
        threat: what bounds them; None for attacks that nothing bounds.

    Returns:
        The nearest numbers. Where these leave the ball, those next to them on the side of `x`: in
        L-inf for single pixels, in L2 for whole images.
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
    """The next numbers on the side of `x`. None is negative, so that their bits are in order."""
    # of the two zeros one has the bits of a negative number
    bits, goal = ((part + 0.0).contiguous().view(torch.int16) for part in (near, x))
    return (bits + (goal - bits).sign()).view(near.dtype).view_as(near)
