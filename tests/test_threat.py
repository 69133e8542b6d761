"""The ball: inside, on its border, outside."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redefense.attacks.gradient import random_starts
from redefense.config import ThreatConfig
from redefense.errors import ConfigError
from redefense.radius import read_eps, read_norm
from redefense.rng import stream
from redefense.threat import Threat, norms, steepest

NORMS = [2.0, math.inf]


def grey(value: float = 0.5) -> torch.Tensor:
    return torch.full((3, 1, 2, 2), value, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("length", [0.0, 0.05, 0.0999])
def test_points_inside_stay_exactly_where_they_are(norm: float, length: float) -> None:
    delta = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=stream(0))
    delta *= length / norms(delta, norm).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        Threat(norm=norm, eps=0.1).project(grey() + delta, grey()), grey() + delta,
        rtol=0, atol=1e-16,
    )  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_points_outside_land_on_the_border_and_projecting_twice_changes_nothing(
    norm: float,
) -> None:
    delta = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=stream(1))
    threat = Threat(norm=norm, eps=0.1)
    once = threat.project(grey() + 5 * delta, grey())
    torch.testing.assert_close(norms(once - grey(), norm), torch.full((3,), 0.1).double())
    torch.testing.assert_close(threat.project(once, grey()), once)


def test_the_box_holds_at_its_corners() -> None:
    threat = Threat(eps=0.3)
    assert torch.equal(threat.project(grey(1.4), grey(1.0)), grey(1.0))
    assert torch.equal(threat.project(grey(-2.0), grey(0.1)), grey(0.0))


@pytest.mark.parametrize("norm", NORMS)
@given(seed=st.integers(0, 1000))
def test_random_starts_lie_in_the_ball_and_reach_far(norm: float, seed: int) -> None:
    uniform = torch.rand(64, 1, 2, 2, dtype=torch.float64, generator=stream(seed))
    share = torch.rand(64, dtype=torch.float64, generator=stream(seed, "share"))
    lengths = norms(Threat(norm=norm, eps=0.2).noise(uniform, share), norm)
    assert float(lengths.max()) <= 0.2 + 1e-12
    assert float(lengths.max()) > 0.15


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1, 2])
def test_random_starts_lean_to_no_side(norm: float, size: int) -> None:
    x = (
        torch.full((4000, 1, size, size), 0.5, dtype=torch.float64)
        + torch.arange(4000).view(-1, 1, 1, 1) * 1e-6
    )  # each image has a stream of its own
    y, threat = torch.zeros(4000, dtype=torch.long), Threat(norm=norm, eps=0.2)
    moved = (random_starts(x, y, threat, stream(3))() - x).flatten(1)
    far = norms(moved.view_as(x), norm) > 0.1
    for some in (far, ~far):
        deviation = 0.2 / len(moved[some]) ** 0.5
        assert float(moved[some].mean(0).abs().max()) < 4 * deviation


@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_direction_gains_the_dual_norm(norm: float) -> None:
    grad = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=stream(2))
    step = steepest(grad, norm)
    torch.testing.assert_close(norms(step, norm), torch.ones(5).double())
    gain = (step * grad).flatten(1).sum(1)
    torch.testing.assert_close(gain, norms(grad, 1.0 if norm == math.inf else 2.0))


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-25])
def test_tiny_gradients_give_no_nan_and_keep_their_direction(scale: float) -> None:
    grad = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2) * scale
    step = steepest(grad, 2.0)
    assert bool(step.isfinite().all())
    if scale == 1e-25:
        torch.testing.assert_close(step.flatten(), torch.tensor([0.6, -0.8]))


def test_pixels_are_counted_once_for_all_channels() -> None:
    delta = torch.zeros(2, 3, 4, 4)
    delta[0, :, 1, 1] = 0.5
    delta[0, 2, 3, 3] = -0.1
    assert norms(delta, 0.0).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("norm", "eps", "says"),
    [
        (1.0, 0.1, "norm must be"),
        (2.0, -0.1, "eps must be"),
        (2.0, math.nan, "eps must be"),
        (math.inf, 8.0, r"L-inf eps must lie in \[0, 1\].*got 8 \(did you mean 8/255\?\)"),
        (math.inf, 300.0, r"got 300$"),
    ],
)
def test_senseless_threats_are_refused(norm: float, eps: float, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Threat(norm=norm, eps=eps)


def test_an_l2_ball_may_reach_further_than_one_pixel() -> None:
    assert Threat(norm=2.0, eps=8.0).eps == 8
    assert Threat(norm=math.inf, eps=1.0).eps == 1


@pytest.mark.parametrize(
    ("norm", "means"),
    [
        *(
            (name, math.inf)
            for name in ("inf", "linf", "Linf", "L-inf", "l_inf", "L\u221e", math.inf)
        ),
        *((name, 2.0) for name in ("2", "l2", "L2", "L-2", "\u21132", "2.0", 2.0, np.float32(2))),
    ],
)
def test_a_norm_may_be_written_in_any_usual_way(norm: Any, means: float) -> None:
    # the dataclass is what both readers, of Python and of settings, make of it
    assert Threat(norm=float(read_norm(norm)), eps=0.1) == Threat(norm=means, eps=0.1)
    assert ThreatConfig.of(norm, 0.1) == ThreatConfig.of(means, 0.1)
    if isinstance(norm, str):
        assert Threat(norm=norm).norm == means


@pytest.mark.parametrize(
    ("text", "means"), [("8/255", 8 / 255), (" 1 / 3 ", 1 / 3), ("3e-2", 0.03)]
)
def test_a_radius_may_be_written_as_a_fraction_and_means_the_quotient(
    text: str, means: float
) -> None:
    assert Threat(eps=text).eps == ThreatConfig.of("inf", text).eps == means


@pytest.mark.parametrize(
    "eps", ["", "8/0", "8/255/2", "8/", "eight", "nan", "inf", "1e999", True, None, [0.1]]
)
def test_what_is_no_radius_is_refused_as_it_was_written(eps: Any) -> None:
    with pytest.raises(ConfigError, match=rf"finite number.*got {re.escape(repr(eps))}$"):
        read_eps(eps)


@pytest.mark.parametrize(
    "norm",
    ["", "l1", "l", "3", 1, -2, "-2", -math.inf, True, None, [2], torch.tensor(2)],
)
def test_what_is_no_norm_is_refused_as_it_was_written(norm: Any) -> None:
    with pytest.raises(ConfigError, match=rf"'inf' or '2'.*got {re.escape(repr(norm))}$"):
        read_norm(norm)
