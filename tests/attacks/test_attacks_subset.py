"""The attack on subsets of members, and the points that it is handed to start from."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.subset import Subset, over_subsets
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


def lowest(victim: Independent, x: Tensor, eps: float) -> Tensor:
    """The lowest expected accuracy on each image in reach of `eps`, by linear programs.

    A subset of the members can be fooled by one point if its largest logit gap can be made
    negative: minimise t under w_m . (x + d) - offset_m <= t for all m of the subset.
    """
    members = [m for m in victim.members if isinstance(m, Plane)]
    w = np.stack([m.w.numpy() for m in members])
    offsets = np.array([m.offset for m in members])
    everyone = range(len(members))
    subsets = [list(c) for size in everyone for c in combinations(everyone, size + 1)]
    worst = []
    for image in x.flatten(1).numpy():
        limits = [(max(-eps, -v), min(eps, 1 - v)) for v in image] + [(None, None)]
        best, stands = 1.0, list[list[int]]()
        for chosen in subsets:
            if any(set(few) <= set(chosen) for few in stands):
                continue
            rows = np.concatenate([w[chosen], -np.ones((len(chosen), 1))], axis=1)
            goal = np.eye(len(image) + 1)[-1]
            found = linprog(goal, rows, offsets[chosen] - w[chosen] @ image, bounds=limits)
            if found.fun < 0:
                best = min(best, 1 - float(victim.mixture[chosen].sum()))
            else:
                stands.append(chosen)
        worst.append(best)
    return torch.tensor(worst, dtype=torch.float64)


@pytest.mark.parametrize("mixture", ["equal", "unequal"])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_linear_members_are_fooled_as_far_as_linear_programs_say(count: int, mixture: str) -> None:
    x, y, _ = starting_points(3)
    shares = np.ones(count) if mixture == "equal" else np.arange(1, count + 1)
    victim = Independent(planes(count, 0), mixture=(shares / shares.sum()).tolist())
    x_adv = Subset(steps=20)(victim, x, y, LINF, rng=stream(0, "a"))
    assert (norms(x_adv - x, math.inf) <= LINF.eps + 1e-9).all()
    reached = expected(victim, x_adv, y)
    assert (reached >= lowest(victim, x, LINF.eps) - 1e-9).all()
    assert (reached <= lowest(victim, x, 0.97 * LINF.eps) + 1e-9).all()
    assert (reached < expected(victim, x, y)).any()


def test_members_of_probability_zero_neither_help_nor_hurt() -> None:
    x, y, starts = starting_points()
    three, strangers = planes(3, 0), planes(2, 9)
    plain = Independent(three, mixture=[0.5, 0.3, 0.2])
    padded = Independent(
        [strangers[0], *three[:2], strangers[1], three[2]], mixture=[0.0, 0.5, 0.3, 0.0, 0.2]
    )
    for given in (None, starts):
        pair = [
            Subset(steps=8)(victim, x, y, LINF, rng=stream(0, "a"), starts=given)
            for victim in (plain, padded)
        ]
        assert torch.equal(*pair)


def test_two_copies_of_a_member_are_one_of_twice_the_probability() -> None:
    x, y, _ = starting_points()
    a, b = planes(2, 3)
    copied = Independent([a, b, b], mixture=[0.4, 0.3, 0.3])
    single = Independent([a, b], mixture=[0.4, 0.6])
    left, right = (
        expected(victim, Subset(steps=15)(victim, x, y, LINF, rng=stream(0, "a")), y)
        for victim in (copied, single)
    )
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("norm", [math.inf, 2.0])
def test_the_result_of_an_image_does_not_depend_on_its_batch(norm: float) -> None:
    x, y, starts = starting_points()
    threat = Threat(norm=norm, eps=0.1)
    starts = torch.stack([threat.project(s, x) for s in starts])
    victim = Independent(planes(3, 2), mixture=[0.5, 0.3, 0.2])
    whole = Subset(steps=8)(victim, x, y, threat, rng=stream(0, "a"), starts=starts)
    back = Subset(steps=8)(victim, x.flip(0), y, threat, rng=stream(0, "a"), starts=starts.flip(1))
    torch.testing.assert_close(back.flip(0), whole, rtol=0, atol=1e-12)
    for i in range(len(x)):
        one = slice(i, i + 1)
        alone = Subset(steps=8)(
            victim, x[one], y[one], threat, rng=stream(0, "a"), starts=starts[:, one]
        )
        torch.testing.assert_close(alone, whole[one], rtol=0, atol=1e-12)


def test_subsets_are_told_apart_by_their_bits() -> None:
    values = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    sums, least = (over_subsets(values, *how) for how in ((torch.add, 0.0), (torch.minimum, 9.0)))
    torch.testing.assert_close(sums[0].tolist(), [0.5, 0.3, 0.8, 0.2, 0.7, 0.5, 1.0])
    torch.testing.assert_close(least[0].tolist(), [0.5, 0.3, 0.3, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[0], "of shape"),
        (lambda s: s[:0], "of shape"),
        (lambda s: s[:, :2], "of shape"),
        (lambda s: (s + 0.2).clamp(0, 1), "within 0.1"),
        (lambda s: s + 2, "starts"),
    ],
)
def test_starts_that_are_no_points_of_the_ball_are_refused(change: Any, message: str) -> None:
    x, y, starts = starting_points()
    with pytest.raises(InputError, match=message):
        Subset()(planes(1, 0)[0], x, y, LINF, rng=stream(0, "a"), starts=change(starts))


@pytest.mark.parametrize("name", sorted(n for n, a in ATTACKS.items() if not a.takes_starts))
def test_other_attacks_refuse_starts(name: str) -> None:
    x, y, starts = starting_points()
    threat = Threat(norm=ATTACKS[name].norms[0], eps=0.1)
    with pytest.raises(ConfigError, match="does not accept starts"):
        ATTACKS[name]()(planes(1, 0)[0], x, y, threat, rng=stream(0, "a"), starts=starts)
