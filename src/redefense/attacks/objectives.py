"""Objectives that attacks maximise: functions of logits (B, C) and labels (B,)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.errors import ConfigError
from redefense.types import Float, Int, Labels, Logits

Objective = Callable[[Tensor, Tensor], Tensor]

_FLOOR = 1e-12  # of the DLR's denominator, as in the paper's code


def cross_entropy(logits: Logits, y: Labels) -> Float[Tensor, " B"]:
    """-log probability of the true class, per image, >= 0."""
    return F.cross_entropy(logits, y, reduction="none")


def log_odds(logits: Logits, y: Labels) -> Float[Tensor, " B"]:
    """log((1 - p) / p) of the true class's probability p.

    Orders points as the cross-entropy does and has the same steepest direction, since
    cross-entropy = softplus(log odds); but its gradient does not vanish where p rounds to 1.
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)


def margin(logits: Logits, y: Labels) -> Float[Tensor, " B"]:
    """Best wrong logit minus the true one, of any sign; positive if misclassified."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, y[:, None]).squeeze(1)


def dlr(logits: Logits, y: Labels) -> Float[Tensor, " B"]:
    """Difference of logits ratio (Croce & Hein, 2020): the margin over the first-to-third gap.

    Invariant to shift and scale of the logits.

    Raises:
        ConfigError: with fewer than 3 classes.
    """
    need_classes(logits, "dlr")
    top = logits.topk(3, dim=1).values
    true = logits.gather(1, y[:, None]).squeeze(1)
    # the best wrong class ranks second only if the true class ranks first
    other = torch.where(true == top[:, 0], top[:, 1], top[:, 0])
    return (other - true) / (top[:, 0] - top[:, 2] + _FLOOR)


def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> Float[Tensor, " B"]:
    """Target minus true logit over the gap from first place to the mean of third and fourth.

    Raises:
        ConfigError: with fewer than 4 classes.
    """
    need_classes(logits, "targeted_dlr")
    top = logits.topk(4, dim=1).values
    gap = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _FLOOR
    return targeted_margin(logits, y, target) / gap


def targeted_margin(logits: Logits, y: Labels, target: Labels) -> Float[Tensor, " B"]:
    """Target minus true logit."""
    pair = logits.gather(1, torch.stack([y, target], dim=1))
    return pair[:, 1] - pair[:, 0]


LEAST_CLASSES: Final[Mapping[str, int]] = MappingProxyType({"dlr": 3, "targeted_dlr": 4})
"""Minimum number of classes, for objectives that need more than two."""


def need_classes(logits: Logits, name: str) -> None:
    """Check that a victim has enough classes for the objective of that name.

    Raises:
        ConfigError: naming the objective and both numbers.
    """
    if logits.shape[1] < LEAST_CLASSES[name]:
        least = LEAST_CLASSES[name]
        raise ConfigError(f"{name} needs at least {least} classes, got {logits.shape[1]}")


OBJECTIVES: Final[Mapping[str, Objective]] = MappingProxyType(
    {"log_odds": log_odds, "cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}
)


def objective_named(name: str) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: for any other name.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


TARGETED: Final[Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = MappingProxyType(
    {"targeted_dlr": targeted_dlr, "targeted_margin": targeted_margin}
)
"""Objectives towards a class, of logits, labels and targets."""


def wrong_classes(logits: Logits, y: Labels, count: int) -> Int[Tensor, "T B"]:
    """The `count` likeliest wrong classes of each image, or all of them, likeliest first."""
    others = logits.detach().scatter(1, y[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices.t()
