"""The average and the vote of a network that draws, attacked for themselves."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from redefense.config import ThreatConfig
from redefense.evaluation.cells import Subject
from redefense.evaluation.report_object import Report
from redefense.evaluation.stochastic.cells import (
    AVERAGED,
    SINGLE,
    Draws,
    less,
    ratings,
    scored,
)
from redefense.evaluation.stochastic.measure import run_drawn
from redefense.evaluation.suite import CellSpec, Suite
from redefense.results.join import join
from redefense.stochastic import GaussianNoise, Stochastic, seeds_of

EPS, SIGMA = 0.08, 0.3
Y = torch.zeros(20, dtype=torch.long)
X = torch.full((20, 1, 4, 4), 0.54)
X[10:] = 0.85


class Plane(nn.Module):
    """Class 0 where the mean of the pixels is above one half; its noise has a quarter of SIGMA."""

    def forward(self, x: Tensor) -> Tensor:
        z = 6 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([z, -z], 1)


def evaluated(suite: Suite, store: Path | None = None) -> Report:
    network = Stochastic(GaussianNoise(Plane(), sigma=SIGMA), draws=8)
    who = Subject(network, X, Y, np.arange(20), "planes")
    draws = Draws(score=128, select=32, attack=8)
    return run_drawn(who, suite, ThreatConfig(eps=EPS), draws=draws, store=store)


# steps of a thousandth of eps: its points are those it starts from
WEAK = CellSpec(attack="hinge", view="members", settings={"steps": 1, "step_size": 0.001})
STRONG = CellSpec(attack="meanprob_pgd", view="members", settings={"steps": 8})
ITSELF = Suite(name="one", cells=(WEAK,), baseline_attacks=(STRONG,))


def test_average_and_vote_are_attacked_for_themselves(tmp_path: Path) -> None:
    report = evaluated(ITSELF, tmp_path)
    # all answer right before: the average of many draws is the network without noise
    assert report.data["clean"]["averaged"] == 1.0
    assert report.cells["hinge-members-linf-0.08"].averaged.all()
    # the ball of the first half of the images reaches over the plane, that of the second does not
    headline = report.headline
    assert headline["averaged"] == headline["vote"] == 0.5
    low, high = headline["averaged_interval"]
    assert low < 0.5 < high
    assert headline["averaged_draws"] == 64
    assert report.average.value == 0.5
    # read back, not computed again
    again = evaluated(ITSELF, tmp_path)
    assert again.headline == headline
    # and a joined report names the vote
    report.save(tmp_path / "run")
    (result,) = join([tmp_path / "run"])
    assert result.averaged is not None
    assert result.averaged.value == 0.5
    assert any("majority of 64 draws is right and clear on 50.0 %" in n for n in result.notes)


def test_a_suite_without_attacks_on_baselines_has_no_figure_of_them() -> None:
    headline = evaluated(Suite(name="one", cells=(WEAK,))).headline
    assert headline["averaged"] is headline["vote"] is None


def test_halves_of_the_draws_answer_as_their_average_and_vote() -> None:
    network = Stochastic(GaussianNoise(Plane(), sigma=SIGMA))
    seeds = seeds_of(0, "score", 24)
    whole = scored(network, X, X, Y, seeds)
    for half in range(2):
        part = scored(network, X, X, Y, seeds[12 * half : 12 * half + 12])
        assert np.array_equal(whole["averaged_halves"][half], part["averaged"])
        assert np.array_equal(whole["vote_halves"][half], part["vote"] == 1)
    logs = torch.stack([network.draw(seed, X).log_softmax(1) for seed in seeds])
    right = logs.exp().mean(0).argmax(1) == Y
    assert np.array_equal(whole["averaged"], right.numpy())


def test_a_point_is_chosen_by_the_mean_probability_where_the_average_is_attacked() -> None:
    class TwoAnswers(nn.Module):
        """Right with chance 0.4 and sure of it at bright points, with chance 0.6 at dark ones."""

        def forward(self, x: Tensor) -> Tensor:
            bright = x.flatten(1).mean(1) > 0.5
            right = torch.rand(len(x)) < torch.where(bright, 0.4, 0.6)
            size = torch.where(bright & right, 9.0, torch.where(bright, 0.1, 0.3))
            z = torch.where(right, size, -size)
            z = torch.where(~bright & ~right, -9.0, z)
            return torch.stack([z, -z], 1)

    judge = Stochastic(TwoAnswers()).at(seeds_of(0, "select", 200))
    points = [torch.full((20, 1, 4, 4), 0.9), torch.full((20, 1, 4, 4), 0.1)]
    bright, dark = (ratings(judge, x, Y) for x in points)
    assert less(bright[:, SINGLE], dark[:, SINGLE]).all()
    assert less(dark[:, AVERAGED], bright[:, AVERAGED]).all()
