"""When an attack need not look at an image any more: it is fooled, or far from ever being so."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from redefense.attacks.base import Oracle, OracleResult
from redefense.types import Bool, Float, Images, Int

FACTOR: Final = 5.0
"""An image is left where so many times what it gained lately would not reach the goal."""

CLIMB_CHECK: Final = (0.1, 0.3)
"""Shares of a climb's steps: at the second the gain since the first is looked at."""

SEARCH_CHECK: Final = 0.1
"""A random search is looked at after each such share of all queries, and its gain since this share
of the queries so far: it gains about as much with every tenfold number of queries, or less."""

GRADIENT_SHARE: Final = 0.9
"""A random search leaves an image only where gradients gained at least this share of its own gain.
Where they gained less they may be masked, and the gains of a search can begin late: on a network of
high frequencies with rounded inputs and softmax as its logits, 2 of 39 images were left wrongly."""

BOUNDARY_STEPS: Final = 0.2
BOUNDARY_FACTOR: Final = 1.25
"""A walk along a boundary goes on after a fifth of its steps only where it came as near as 1.25
eps; what it comes nearer after that is a few percent."""


def hopeless(
    value: Float[Tensor, " B"], before: Float[Tensor, " B"], goal: Float[Tensor, " B"] | float
) -> Bool[Tensor, " B"]:
    """Where `FACTOR` times the gain since `before` would not lift the value to the goal."""
    return goal - value > FACTOR * (value - before)


def where_moved(look_of: Callable[[Tensor], Oracle], y: Tensor) -> Oracle:
    """Looks again only at images whose point moved since the last look.

    Right for deterministic looks, as those at all members are: at rest they see the same again.

    Args:
        look_of: makes, from the labels of some of the images, what looks at these.
        y: the labels.
    """
    known: list[tuple[Images, OracleResult]] = []

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        rows = torch.arange(len(x), device=x.device)
        if known:
            rows = (x != known[0][0]).flatten(1).any(1).nonzero().flatten()
        if len(rows) == len(x) or (with_grad and known[0][1].grad is None):
            seen = look_of(y)(x, with_grad)
        elif len(rows) == 0:
            seen = known[0][1]
        else:
            seen = _renewed(known[0][1], rows, look_of(y[rows])(x[rows], with_grad))
        known[:] = [(x, seen)]
        return seen

    return oracle


def until_settled(
    look_of: Callable[[Tensor], Oracle],
    count: int,
    *,
    steps: int | None,
    goal: Float[Tensor, " B"] | float = 0.0,
) -> Oracle:
    """Looks no further at an image once it is fooled, or out of reach.

    Fooled: `correct` was 0 at one of its points. Out of reach: see `CLIMB_CHECK`; it is then asked
    no more, though points of other climbs may well fool it.

    Args:
        look_of: makes, from the indices of some of the images, what looks at these.
        count: number of images.
        steps: of the climb; None never takes an image for out of reach.
        goal: value without which an image cannot be fooled.
    """
    known: list[OracleResult] = []
    first, last = (int(share * (steps or 0)) for share in CLIMB_CHECK)
    looks, left, top = 0, torch.zeros(0), torch.zeros(0)
    early = top

    def oracle(x: Tensor, with_grad: bool) -> OracleResult:
        nonlocal looks, left, top, early
        if not known:
            known.append(look_of(torch.arange(count, device=x.device))(x, with_grad))
            top = early = known[0].value
            left = known[0].correct > 0
        elif len(rows := left.nonzero().flatten()) > 0:
            known[0] = _renewed(known[0], rows, look_of(rows)(x[rows], with_grad))
            top = top.maximum(known[0].value)
            left = left & (known[0].correct > 0)
        if looks == first:
            early = top
        if looks == last > first:
            left = left & ~hopeless(top, early, goal)
        looks += 1
        return known[0]

    return oracle


def _renewed(known: OracleResult, rows: Int[Tensor, " K"], part: OracleResult) -> OracleResult:
    def renewed(old: Tensor | None, new: Tensor | None) -> Any:
        return None if old is None or new is None else old.index_copy(0, rows, new)

    return OracleResult(*(renewed(old, new) for old, new in zip(known, part, strict=True)))
