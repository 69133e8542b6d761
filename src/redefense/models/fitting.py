"""Hypernetworks fitted by least squares to existing kernels.

Slice s of unit u is K_us = W_out (W_s z_u + b_s) + b_out: two linear layers without an activation.
With the units as a tensor (units, slices, taps) that is

    K = 1 b_out + (1, Z) x G x W_out,

a Tucker decomposition of rank e along the units and d along the taps, in which a constant is free.
Given the span of W_out, the best Z is a principal component analysis along the units, and given Z
the best W_out is one along the taps; the two in turn never get worse (De Lathauwer, De Moor &
Vandewalle, 2000). They start from the truncated higher-order SVD, whose squared error is at most
the sum of what each truncation alone costs, while no fit is below the larger of the two: within a
factor of sqrt(2) of the best error from the first turn on, and the best itself where one of the two
truncations cuts nothing off.

Every kernel has the same weight: batch norm removes the scale of a kernel, so its error relative to
its norm is minimised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redefense.models.hyper import Grid, gain, untile
from redefense.types import Bool, Float

ROUNDS = 50
ENOUGH = 1e-4
"""Iterations stop when the squared error falls by less than this fraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Target kernels of a hypernetwork.

    Attributes:
        units: (U, n, 9 n) slices in float64; nine equal taps where the kernel has one.
        weight: (U,) one over the norm of the kernel that a unit belongs to.
        free: (U,) whether only the mean of each nine taps counts.
    """

    units: Float[Tensor, "U n t"]
    weight: Float[Tensor, " U"]
    free: Bool[Tensor, " U"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Embeddings and hypernetwork of units; e' and d' are the ranks that the kernels can use.

    Attributes:
        z: (U, e') embeddings, e' at most U - 1; columns of mean square 1.
        first: (n, d', e') maps of the slices, d' at most 9 n.
        first_bias: (n, d').
        second: (9 n, d') of mean square 1 / d'.
        second_bias: (9 n,).
    """

    z: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


def target_of(grids: Sequence[Grid], kernels: Sequence[Tensor], unit: int, taps: str) -> Target:
    """The units of these kernels."""
    units, weight, free = [], [], []
    for grid, kernel in zip(grids, kernels, strict=True):
        own = untile(kernel.detach().double(), grid.rows, grid.columns) / gain(grid, unit, taps)
        if grid.size == 1:
            own = own.expand(-1, -1, -1, 3, 3) / (9 if taps == "sum" else 1)
        units.append(own.flatten(2))
        # a kernel of zeros has no norm to divide by
        weight.append(own.new_full((len(own),), 1 / (float(own.norm()) or 1.0)))
        # the largest of nine is not linear: there all nine are fitted
        mean_counts = grid.size == 1 and taps != "max"
        free.append(torch.full((len(own),), mean_counts, device=own.device))
    return Target(units=torch.cat(units), weight=torch.cat(weight), free=torch.cat(free))


def joined(targets: Sequence[Target]) -> Target:
    """One target of several members, for a hypernetwork that they share."""
    return Target(
        units=torch.cat([t.units for t in targets]),
        weight=torch.cat([t.weight for t in targets]),
        free=torch.cat([t.free for t in targets]),
    )


def fit(target: Target, embedding: int, hidden: int, rounds: int = ROUNDS) -> Fit:
    """Fit hypernetwork and embeddings to `target`, in at most `rounds` iterations.

    Rows are scaled by the target's weights, so a constant over the units becomes `one`. Taps that
    do not count are set to the fitted values in each iteration.
    """
    x = target.units * target.weight[:, None, None]
    one = target.weight / target.weight.norm()
    num_units, taps = x.shape[0], x.shape[2]
    cut = min(embedding, num_units - 1), min(hidden, taps)
    wanted = float(x.square().sum())
    base = torch.einsum("u,ust->st", one, x)
    v = _leading(
        _gram((x - torch.einsum("u,t->ut", one, base.mean(0))[:, None]).flatten(0, 1)), cut[1]
    )
    error = math.inf
    for _ in range(rounds):
        q, v = _turn(x, one, v, cut)
        base, core = torch.einsum("u,ust->st", one, x), torch.einsum("uk,ust->kst", q, x) @ v
        constant = base.mean(0)
        slices = (base - constant) @ v
        model = torch.einsum("u,st->ust", one, slices @ v.T + constant)
        model += torch.einsum("uk,kst->ust", q, core @ v.T)
        gap = x - model
        gap[target.free] = _tap_means(gap[target.free])
        x = model + gap
        before, error = error, float(gap.square().sum())
        # 1e-24: exact up to rounding in double precision
        if error < 1e-24 * wanted or before - error < ENOUGH * error:
            break
    return _sources(target.weight, q, v, core, slices, constant)


def _turn(x: Tensor, one: Tensor, v: Tensor, cut: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Update the directions (U, e') along the units, then those along the taps."""
    y = (x @ v).flatten(1)
    centred = y - torch.outer(one, one @ y)
    gram = _gram(centred.T)
    # the constant is free already: it comes last, also among directions of no use
    q = _leading(gram - (gram.trace() + 1) * torch.outer(one, one), cut[0])
    base = torch.einsum("u,ust->st", one, x)
    core = torch.einsum("uk,ust->kst", q, x)
    return q, _leading(_gram(torch.cat([base - base.mean(0), core.flatten(0, 1)])), cut[1])


def _sources(
    weight: Tensor, q: Tensor, v: Tensor, core: Tensor, slices: Tensor, constant: Tensor
) -> Fit:
    """Undo the scaling of the rows and balance norms as in an initialised hypernetwork."""
    z = q / weight[:, None]
    size = z.square().mean(0).sqrt()
    stretch = math.sqrt(v.shape[0] / max(v.shape[1], 1))
    return Fit(
        z=z / size,
        first=(core * size[:, None, None]).permute(1, 2, 0) / stretch,
        first_bias=slices / (weight.norm() * stretch),
        second=v * stretch,
        second_bias=constant / weight.norm(),
    )


def _gram(a: Tensor) -> Tensor:
    return a.T @ a


def _leading(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors (columns) of the largest eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.narrow(1, len(gram) - count, count)


def _tap_means(units: Float[Tensor, "U n t"]) -> Float[Tensor, "U n t"]:
    """Each of nine taps replaced by their mean."""
    nine = units.unflatten(2, (-1, 9))
    means: Tensor = nine.mean(-1, keepdim=True).expand_as(nine).flatten(2)
    return means
