"""Early stopping: an attack skips images that are fooled already or far from being fooled."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from redefense.attacks.base import Oracle, OracleResult
from redefense.types import Bool, Float, Images, Int

FACTOR: Final = 5.0
"""An image is skipped if this multiple of its recent gain would not reach the goal."""

CLIMB_CHECK: Final = (0.1, 0.3)
"""Shares of the ascent steps: at the second, the gain since the first is compared with the goal."""

SEARCH_CHECK: Final = 0.1
"""A random search is checked after each such share of all queries. Its recent gain is that since
this share of the queries made so far: each tenfold of queries gains about as much, or less."""

SEARCH_FACTOR: Final = 2.0
"""A random search skips an image if this multiple of the gain expected from the remaining queries
would not reach the goal. `GRADIENT_SHARE` guards against skipping too early: on 27 networks, most
with masked gradients, no multiple from 0.5 to 5 skipped an image that all queries fool."""

GRADIENT_SHARE: Final = 0.9
"""A random search skips an image only if gradient attacks gained at least this share of its own
gain. Gradients that gained less may be masked, and a search can begin to gain late: on a network
of high frequencies with rounded inputs and softmax output, 2 of 39 images were skipped wrongly."""

BOUNDARY_CHECKS: Final = ((0.1, 1.6), (0.2, 1.25), (0.4, 1.1))
"""A boundary attack continues after the first share of its steps only for images whose distance is
at most the factor times eps: later steps reduce the distance by a few percent."""

BOUNDARY_STEPS: Final = 10
"""Least number of steps before such a check."""


def out_of_reach(
    value: Float[Tensor, " B"],
    before: Float[Tensor, " B"],
    goal: Float[Tensor, " B"] | float,
    factor: float = FACTOR,
) -> Bool[Tensor, " B"]:
    """True where `factor` times the recent gain would not raise the value to the goal.

    Args:
        value: (B,) reached so far.
        before: (B,) reached at the start of the recent period.
        goal: without which an image cannot be fooled.
        factor: multiple of the gain since `before`.
    """
    return goal - value > factor * (value - before)


def reuse_unmoved(oracle_of: Callable[[Tensor], Oracle], y: Tensor) -> Oracle:
    """Oracle that queries only the images whose point moved since the last query.

    Valid for deterministic oracles, such as those of all members: equal points give equal results.

    Args:
        oracle_of: makes the oracle for some of the images, from their labels.
        y: the labels.
    """
    known: list[tuple[Images, OracleResult]] = []

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        rows = torch.arange(len(x), device=x.device)
        if known:
            rows = (x != known[0][0]).flatten(1).any(1).nonzero().flatten()
        if len(rows) == len(x) or (with_grad and known[0][1].grad is None):
            seen = oracle_of(y)(x, with_grad)
        elif len(rows) == 0:
            seen = known[0][1]
        else:
            seen = _renewed(known[0][1], rows, oracle_of(y[rows])(x[rows], with_grad))
        # one entry only: ascents do not return to earlier points
        known[:] = [(x, seen)]
        return seen

    return oracle


def early_stopping(
    oracle_of: Callable[[Tensor], Oracle],
    count: int,
    *,
    steps: int | None,
    goal: Float[Tensor, " B"] | float = 0.0,
) -> Oracle:
    """Oracle that stops querying an image once it is fooled, or far from being fooled.

    Fooled: `correct` was 0 at one of its points. Far: see `CLIMB_CHECK`; this ascent then stops for
    the image, though other ascents may still fool it.

    Args:
        oracle_of: makes the oracle for some of the images, from their indices.
        count: number of images.
        steps: number of ascent steps; None stops for fooled images only.
        goal: value without which an image cannot be fooled.
    """
    known: list[OracleResult] = []
    first, last = (int(share * (steps or 0)) for share in CLIMB_CHECK)
    queries, left, top = 0, torch.zeros(0), torch.zeros(0)
    early = top

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        nonlocal queries, left, top, early
        if not known:
            known.append(oracle_of(torch.arange(count, device=x.device))(x, with_grad))
            top = early = known[0].value
            left = known[0].correct > 0
        elif len(rows := left.nonzero().flatten()) > 0:
            known[0] = _renewed(known[0], rows, oracle_of(rows)(x[rows], with_grad))
            top = top.maximum(known[0].value)
            left = left & (known[0].correct > 0)
        if queries == first:
            early = top
        # at the second share of the steps, once; equal shares mean too few steps to judge
        if queries == last > first:
            left = left & ~out_of_reach(top, early, goal)
        queries += 1
        return known[0]

    return oracle


def _renewed(known: OracleResult, rows: Int[Tensor, " K"], part: OracleResult) -> OracleResult:
    def renewed(old: Tensor | None, new: Tensor | None) -> Any:
        return None if old is None or new is None else old.index_copy(0, rows, new)

    return OracleResult(*(renewed(old, new) for old, new in zip(known, part, strict=True)))
