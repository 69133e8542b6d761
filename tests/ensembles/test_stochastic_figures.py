"""Figures from draws: unbiased choices, coverage of both intervals, tries; against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.evaluation.stochastic.cells import scored
from redefense.results.draws import (
    draws_interval,
    folded_success_within,
    interval,
    lowest_cell,
    pair,
    success_within,
    worst_per_image,
)
from redefense.rng import stream
from redefense.stochastic import GaussianNoise, Stochastic, seeds_of
from redefense.threat import Threat

SIGMA, EPS, SCALE = 0.3, 0.05, 4.0


class Plane(nn.Module):
    """Two classes on the sides of a plane through the middle of the box."""

    def __init__(self) -> None:
        super().__init__()
        self.normal: Tensor = torch.randn(16, generator=stream(0, "normal"))

    def distance(self, x: Tensor) -> Tensor:
        along: Tensor = (x.flatten(1) - 0.5) @ self.normal
        return along.div(self.normal.norm())

    def forward(self, x: Tensor) -> Tensor:
        z = SCALE * self.distance(x)
        return torch.stack([z, -z], 1)


PLANE = Plane()


def images(count: int, name: str) -> Tensor:
    """Far enough from the faces of the box that no ball is cut by it."""
    return 0.2 + 0.6 * torch.rand(count, 1, 4, 4, generator=stream(0, name))


def chance(x: Tensor, threat: Threat | None = None) -> NDArray[np.float64]:
    """(n,) probability that the noisy plane answers 0: at x, or at the worst point of its ball."""
    reach = 0.0
    if threat is not None:
        unit = PLANE.normal / PLANE.normal.norm()
        reach = threat.eps * float(unit.abs().sum() if threat.norm == math.inf else 1.0)
    found: NDArray[np.float64] = ndtr((PLANE.distance(x).double().numpy() - reach) / SIGMA)
    return found


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_the_interval_over_draws_covers_the_closed_form(norm: str) -> None:
    threat = Threat(norm=norm, eps=EPS if norm == "inf" else 0.2)
    x, y = images(40, "fixed"), torch.zeros(40, dtype=torch.long)
    network = Stochastic(GaussianNoise(PLANE, sigma=SIGMA), draws=8)
    # as suites have it: the last point, since the best one of single draws was the luckiest
    unaware = ATTACKS["pgd"](keep_best=False)  # type: ignore[call-arg]  # PGD's own settings
    points = torch.cat(
        [
            unaware(network.sampled(rng=stream(0, "u")), x, y, threat, rng=stream(0, "a")),
            ATTACKS["meanprob_pgd"]()(network, x, y, threat, rng=stream(0, "a")),
            x,
        ]
    )
    truth = {"aware": chance(x, threat).mean(), "clean": chance(x).mean()}
    covered = {"aware": 0, "unaware": 0, "clean": 0}
    # all repetitions as one batch: every copy of an image meets noise of its own
    many, labels = points.repeat(100, 1, 1, 1), y.repeat(300)
    answers = scored(network, many, many, labels, seeds_of(0, "score", 32))["correct"]
    for repetition in np.split(answers, 100, axis=1):
        corrects = np.stack(np.split(repetition, 3, axis=1))
        figures = {
            "aware": (worst_per_image(corrects), True),
            "unaware": (lowest_cell(corrects[:1]), True),
            "clean": (corrects[2], False),
        }
        for name, (correct, folded) in figures.items():
            low, high = draws_interval(correct, folded=folded)
            covered[name] += int(low <= truth["aware" if folded else "clean"] <= high)
        assert figures["aware"][0].mean() < figures["clean"][0].mean()
    assert min(covered.values()) >= 90
    assert covered["clean"] < 100  # the interval of a single cell is not merely wide


def test_the_wider_interval_covers_the_population() -> None:
    population = images(200_000, "population")
    clean, attacked = chance(population), chance(population, Threat(eps=EPS))
    rng, covered = np.random.default_rng(0), 0
    for repetition in range(100):
        rows = rng.integers(len(clean), size=60)
        corrects = np.stack([rng.random((32, 60)) < p[rows] for p in (attacked, clean)])
        low, high = interval(worst_per_image(corrects), folded=True, seed=repetition)
        covered += int(low <= attacked.mean() <= high)
    assert covered >= 90


def test_a_draw_for_the_whole_batch_widens_both_intervals() -> None:
    # a fair coin decides for all images at once: 32 draws are 32 trials, not 32 x 200
    rng = np.random.default_rng(0)
    truth, covered = 0.5, 0
    for repetition in range(100):
        correct = np.repeat(rng.random((32, 1)) < truth, 200, axis=1)
        low, high = draws_interval(correct)
        covered += int(low <= truth <= high)
        if repetition < 3:
            wide = interval(correct)
            assert wide[0] <= low
            assert high <= wide[1]
    assert covered >= 90


def test_choosing_on_one_half_and_scoring_on_the_other_is_unbiased() -> None:
    # all attacks are equally strong: the minimum over the same draws would lie far below 0.5
    rng = np.random.default_rng(0)
    corrects = rng.random((8, 64, 4000)) < 0.5
    error = 0.5 / math.sqrt(64 * 4000)
    assert abs(worst_per_image(corrects).mean() - 0.5) < 4 * error
    assert abs(lowest_cell(corrects).mean() - 0.5) < 4 * error
    assert corrects.mean(1).min(0).mean() < 0.5 - 50 * error
    # where one attack is plainly the worst it is found on both halves
    corrects[3, :, :2000] &= rng.random((64, 2000)) < 0.1
    corrects[5, :, 2000:] = False
    assert worst_per_image(corrects)[:, 2000:].mean() == 0
    assert np.array_equal(worst_per_image(corrects)[:, :2000], corrects[3, :, :2000])
    assert np.array_equal(lowest_cell(corrects), corrects[5])


def test_figures_of_certain_answers_are_those_of_one_draw() -> None:
    one = np.random.default_rng(0).random((3, 50)) < 0.6
    corrects = np.repeat(one[:, None], 32, axis=1)
    assert np.array_equal(worst_per_image(corrects)[0], one.all(0))
    found = pair({"a": corrects[0], "b": corrects[1], "clean": corrects[2]}, ["a"], 10)
    assert found["aware"] == one.all(0).mean()
    assert found["unaware"] == one[0].mean()
    assert found["success_within"] == pytest.approx([1 - one.all(0).mean()] * 10)
    # equal draws exclude no answer that one draw in nine would give
    low, high = found["aware_interval_draws"]
    assert low < found["aware"] < high


def test_tries_are_counted_without_replacement() -> None:
    correct = np.random.default_rng(1).random((6, 9)) < np.linspace(0, 1, 9)
    for k in range(1, 7):
        sets = list(itertools.combinations(range(6), k))
        brute = 1 - np.mean([correct[list(chosen)].all(0).mean() for chosen in sets])
        assert success_within(correct, 6)[k - 1] == pytest.approx(brute)
    assert np.isnan(success_within(correct, 7)[6])
    halves = (success_within(correct[:3], 3) + success_within(correct[3:], 3)) / 2
    assert folded_success_within(correct, 3) == pytest.approx(halves)
