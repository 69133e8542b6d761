"""Attacks that leave images early: nothing in reach is left, what is out of reach costs little."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.base import Attack, OracleResult
from redefense.attacks.early_stop import early_stopping, out_of_reach
from redefense.attacks.square import OwnDraws, Square
from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.rng import ImageStreams, stream
from redefense.threat import Threat
from redefense.types import correct

LINF, L2, SMALL = Threat(eps=0.02), Threat(norm=2.0, eps=0.1), Threat(eps=0.004)


class Planes(nn.Module):
    """Four linear classes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.randn(36, 4, dtype=torch.float64, generator=stream(0, "planes"))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (x - 0.5).flatten(1) @ self.w
        return logits


def made(name: str, **settings: Any) -> Attack:
    return ATTACKS[name](**settings)


def reach(x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """(B,) distance to the nearest other class, in units of eps: exact away from the box's edge."""
    w, value = Planes().w, Planes()(x)
    slope = (w[:, y].T[:, None] - w.T).norm(p=1 if threat.norm == math.inf else 2, dim=2)
    gap: Tensor = (value.gather(1, y[:, None]) - value) / slope.clamp_min(1e-9)
    return gap.scatter(1, y[:, None], math.inf).amin(1) / threat.eps


def images(threat: Threat) -> tuple[Tensor, Tensor, Tensor]:
    """Images in the middle of the box, their labels, and their distances in eps."""
    x = 0.35 + 0.3 * torch.rand(16, 1, 6, 6, dtype=torch.float64, generator=stream(1, "x"))
    y = Planes()(x).argmax(1)
    return x, y, reach(x, y, threat)


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("name", ["apgdt", "fab", "autoattack"])
def test_on_linear_classes_exactly_what_is_in_reach_is_fooled(name: str, threat: Threat) -> None:
    x, y, distance = images(threat)
    settings = {"steps": 50, "queries": 50} if name == "autoattack" else {}
    x_adv = made(name, early_stop=True, **settings)(Planes(), x, y, threat, rng=stream(0, "a"))
    clear = (distance - 1).abs() > 0.02
    assert torch.equal(correct(Planes()(x_adv), y)[clear], (distance > 1)[clear])


@pytest.mark.parametrize(("name", "most"), [("apgdt", 0.5), ("fab", 0.3), ("autoattack", 0.5)])
def test_what_is_out_of_reach_is_left_early(name: str, most: float) -> None:
    x, y, distance = images(SMALL)
    far = distance > 2
    passes = []
    for early in (False, True):
        meter = Meter()
        victim = Metered(Independent([Planes()]), meter).averaged()
        settings = {"steps": 20, "queries": 300} if name == "autoattack" else {}
        attack = made(name, early_stop=early, **settings)
        attack(victim, x[far], y[far], SMALL, rng=stream(0, "a"))
        passes.append(meter.forwards)
    assert passes[1] < most * passes[0]


@pytest.mark.parametrize("name", ["apgd", "autoattack"])
def test_it_finds_nothing_that_it_would_not_find_without(name: str) -> None:
    x, y, _ = images(LINF)
    settings = {"steps": 10, "queries": 300} if name == "autoattack" else {}
    fooled = []  # the way of an image is the same until it is left
    for early in (False, True):
        attack = made(name, early_stop=early, **settings)
        fooled.append(~correct(Planes()(attack(Planes(), x, y, LINF, rng=stream(0, "a"))), y))
    assert fooled[1].any()
    assert (fooled[0] | ~fooled[1]).all()


def test_a_settled_image_is_not_looked_at_again() -> None:
    asked: list[list[int]] = []
    rising = torch.tensor([0.2, 0.001, 0.2])  # the last one is fooled at the third look

    def look_of(rows: Tensor) -> "object":
        def oracle(x: Tensor, with_grad: bool) -> OracleResult:
            asked.append(rows.tolist())
            time = len(asked)
            right = 1 - ((rows == 2) & (time >= 3)).double()
            return OracleResult(-2 + rising[rows] * time, right, None)

        return oracle

    oracle = early_stopping(look_of, 3, steps=10)  # type: ignore[arg-type]
    for _ in range(6):
        oracle(torch.zeros(3, 1, 1, 1), False)
    assert asked == [[0, 1, 2]] * 3 + [[0, 1]] + [[0]] * 2


def test_out_of_reach_is_what_a_multiple_of_the_gain_does_not_reach() -> None:
    value, before = torch.tensor([-1.0, -1.0, 0.5]), torch.tensor([-1.1, -1.3, 0.4])
    assert out_of_reach(value, before, 0.0).tolist() == [True, False, False]
    assert out_of_reach(value, before, 0.0, factor=2.5).tolist() == [True, True, False]


def test_early_stop_is_no_part_of_published_settings() -> None:
    with pytest.raises(ConfigError, match="fixes early_stop"):
        made("autoattack", preset="autoattack-official", early_stop=True)


class Masked(nn.Module):
    """Four linear classes without gradients, whose probabilities rise only near a boundary."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = Planes()((x * 1000).round() / 1000)
        return (6 * logits).softmax(1)


def test_where_gradients_are_masked_the_random_search_leaves_nothing_that_it_would_fool() -> None:
    x, y, _ = images(LINF)
    square = Square(queries=400)

    def robust(by_gradients: float | None) -> Tensor:
        draws = OwnDraws(ImageStreams.of(stream(0, "a"), x, y))
        known = None if by_gradients is None else torch.full((len(x),), by_gradients)
        with torch.no_grad():
            point = square.search(Masked(), x, y, LINF, draws, by_gradients=known)
        return correct(Masked()(point), y)

    assert (
        robust(math.inf) & ~robust(None)
    ).any()  # its gains alone do not say who is out of reach
    left = []
    for early in (False, True):
        attack = made("autoattack", steps=4, queries=400, early_stop=early)
        point = attack(Masked(), x, y, LINF, rng=stream(0, "a"))
        left.append(correct(Masked()(point), y))
    assert torch.equal(left[0], left[1])
