"""The attack on subsets of members, and the points that it is handed to start from."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.subset import Subset
from redefense.ensembles import Independent
from redefense.errors import ConfigError, InputError
from redefense.rng import stream
from redefense.threat import Threat, norms

LINF = Threat(eps=0.1)


class Plane(nn.Module):
    """Class 0 where w . x > offset."""

    def __init__(self, w: Tensor, offset: float) -> None:
        super().__init__()
        self.w, self.offset = w, offset

    def forward(self, x: Tensor) -> Tensor:
        value = x.flatten(1) @ self.w - self.offset
        return torch.stack([value, -value], dim=1)


def planes(count: int, seed: int, pixels: int = 6) -> list[Plane]:
    """Members right on grey, each of which the budget can fool, but seldom all of them at once."""
    rng = stream(seed, "planes")
    w = torch.randn(count, pixels, dtype=torch.float64, generator=rng)
    share = 0.2 + 0.6 * torch.rand(count, dtype=torch.float64, generator=rng)
    reach = LINF.eps * w.abs().sum(1)
    offsets = w.sum(1) / 2 - share * reach
    return [Plane(a, float(b)) for a, b in zip(w, offsets, strict=True)]


def expected(members: Independent, x: Tensor, y: Tensor) -> Tensor:
    return members.mixture @ (members.member_logits(x).argmax(-1) == y).double()


def starting_points(count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(count, 1, 1, 6, dtype=torch.float64, generator=stream(1, "x"))
    y = torch.zeros(count, dtype=torch.long)
    noise = torch.rand(3, count, 1, 1, 6, dtype=torch.float64, generator=stream(2, "x"))
    return x, y, (x + LINF.noise(noise)).clamp(0, 1)


def test_the_result_is_never_worse_than_a_start() -> None:
    x, y, starts = starting_points()
    victim = Independent(planes(3, 0))
    x_adv = Subset(steps=1, num_targets=0)(victim, x, y, LINF, rng=stream(0, "a"), starts=starts)
    for start in starts:
        assert (expected(victim, x_adv, y) <= expected(victim, start, y) + 1e-9).all()
    assert (norms(x_adv - x, math.inf) <= LINF.eps + 1e-9).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s[0], "of shape"),
        (lambda s: s[:0], "of shape"),
        (lambda s: s[:, :2], "of shape"),
        (lambda s: (s + 0.2).clamp(0, 1), "within 0.1"),
        (lambda s: s + 2, "starts"),
    ],
)
def test_starts_that_are_no_points_of_the_ball_are_refused(change: Any, told: str) -> None:
    x, y, starts = starting_points()
    with pytest.raises(InputError, match=told):
        Subset()(planes(1, 0)[0], x, y, LINF, rng=stream(0, "a"), starts=change(starts))


@pytest.mark.parametrize("name", sorted(n for n, a in ATTACKS.items() if not a.takes_starts))
def test_other_attacks_refuse_starts(name: str) -> None:
    x, y, starts = starting_points()
    threat = Threat(norm=ATTACKS[name].norms[0], eps=0.1)
    with pytest.raises(ConfigError, match="takes no starts"):
        ATTACKS[name]()(planes(1, 0)[0], x, y, threat, rng=stream(0, "a"), starts=starts)
