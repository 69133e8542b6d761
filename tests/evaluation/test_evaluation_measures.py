"""Measurements of members: closed forms, and what must hold whatever the members are."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redefense.ensembles import Ensemble, Independent
from redefense.evaluation import store
from redefense.evaluation.cascade.tried import Tried
from redefense.evaluation.cells import Subject
from redefense.evaluation.member_statistics import (
    CONVENTIONS,
    Convention,
    best_mixture,
    curve,
    gradient_diversity,
    joint_measures,
    member_measures,
    worst_over,
)
from redefense.results.accuracy import pair_statistics
from redefense.rng import stream
from redefense.threat import Threat


class Ramp(nn.Module):
    """Class 1 if a pixel is above one half, class 2 never."""

    def __init__(self, pixel: int, sign: float = 1.0) -> None:
        super().__init__()
        self.pixel, self.sign = pixel, sign

    def forward(self, x: Tensor) -> Tensor:
        z = self.sign * 4 * (x.flatten(1)[:, self.pixel] - 0.5)
        return torch.stack([-z, z, -4 + 0 * z, -4 + 0 * z], 1)


def flat(*values: float) -> Tensor:
    """Images of 2 x 2 pixels, all of one value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2).clone()


def test_the_best_mixture_of_complementary_members_is_even() -> None:
    # an attacker can fool either, never both
    corrects = np.array([[[1, 1], [0, 0]], [[0, 0], [1, 1]]], dtype=bool)
    mixture, accuracy = best_mixture(corrects, np.array([1.0, 0.0]))
    assert mixture == pytest.approx([0.5, 0.5], abs=0.01)
    assert accuracy == pytest.approx(0.5, abs=0.01)


def test_the_best_mixture_drops_a_blind_member() -> None:
    corrects = np.array([[[1, 1, 1], [0, 0, 0]]], dtype=bool)
    mixture, accuracy = best_mixture(corrects, np.array([0.5, 0.5]))
    assert accuracy == 1.0
    assert mixture.tolist() == [1.0, 0.0]


def test_the_best_mixture_is_never_worse_than_what_is_there() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        corrects = rng.random((4, 3, 30)) < 0.5
        present = rng.dirichlet(np.ones(3))
        mixture, accuracy = best_mixture(corrects, present, steps=50)
        assert mixture.sum() == pytest.approx(1)
        assert (mixture >= 0).all()
        others = [present, np.full(3, 1 / 3), *np.eye(3)]
        assert accuracy >= max(float(worst_over(corrects, r).mean()) for r in others) - 1e-12


def test_joint_measures_of_a_known_record() -> None:
    worst = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=bool)
    found = joint_measures(worst, np.array([0.5, 0.5]), worst[None])
    assert found["members_fooled"] == [1, 2, 1]
    assert found["success_within_tries"][:2] == [0.5, 1 - (1 + 0.25 + 0.25) / 4]
    assert found["best_mixture"]["present"] == 0.5
    assert "evaluate again" in found["best_mixture"]["caveat"]


def test_pair_statistics_of_known_records() -> None:
    same = np.array([[1, 0, 1, 0]] * 2, dtype=bool)
    assert pair_statistics(same) == {
        "disagreement": 0.0, "double_fault": 0.5, "q_statistic": 1.0, "overlap": 1.0
    }  # fmt: skip
    opposite = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)
    assert pair_statistics(opposite) == {
        "disagreement": 1.0, "double_fault": 0.0, "q_statistic": -1.0, "overlap": 0.0
    }  # fmt: skip
    assert pair_statistics(same[:1])["disagreement"] is None
    assert pair_statistics(np.ones((2, 3), dtype=bool))["q_statistic"] is None


def test_gradient_diversity_of_aligned_opposed_and_orthogonal_members() -> None:
    x, y = flat(0.6, 0.7), torch.tensor([1, 1])

    def of(*members: nn.Module) -> dict[str, Any]:
        return gradient_diversity(Independent(list(members)), x, y)

    aligned, opposed = of(Ramp(0), Ramp(0)), of(Ramp(0), Ramp(0, -1.0))
    assert (aligned["cosine"], aligned["abs_cosine"]) == pytest.approx((1, 1))
    assert (opposed["cosine"], opposed["abs_cosine"]) == pytest.approx((-1, 1))
    orthogonal = of(Ramp(0), Ramp(1))
    assert orthogonal["abs_cosine"] == pytest.approx(0, abs=1e-6)
    assert aligned["coherence"] == pytest.approx(1)
    # equal members span one direction: the determinant is what the jitter leaves of it
    assert aligned["log_det"] == pytest.approx(np.log(2e-6), abs=0.01)
    assert of(Ramp(0))["cosine"] is None
    assert of(*[Ramp(0)] * 4)["log_det"] is None


def measured(
    convention: Convention, ensemble: Ensemble, x: Tensor, y: Tensor, threat: Threat
) -> dict[str, Any]:
    common = (ensemble.member_logits(x).argmax(-1) == y).all(0)
    tried = Tried(ensemble, x, y, threat)
    rows = [
        convention.row(ensemble, m, x, y, common, threat, tried, seed=0)
        for m in range(ensemble.num_members)
    ]
    return convention.table(rows, common, threat)


def test_transfer_follows_both_conventions() -> None:
    x, y = flat(0.55, 0.9, 0.3), torch.tensor([1, 1, 1])  # the last is wrong from the start
    members = Independent([Ramp(0), Ramp(0), Ramp(1)])
    dverge = measured(CONVENTIONS["dverge"], members, x, y, Threat(eps=0.1))
    assert dverge["images"] == 2
    # random starts move the pixel that a member does not look at: by chance beyond its boundary
    assert [row[:2] for row in dverge["matrix"][:2]] == [[0.5, 0.5]] * 2
    assert dverge["matrix"][2][2] == 0.5
    trs = measured(CONVENTIONS["trs"], members, x, y, Threat(eps=0.01))
    assert trs["images"] == 3
    assert trs["matrix"] == [[pytest.approx(1 / 3)] * 3] * 3
    assert "1 starts, eps 0.01" in trs["settings"]
    nobody = measured(CONVENTIONS["dverge"], members, x[2:], y[2:], Threat(eps=0.1))
    assert (nobody["matrix"], nobody["images"]) == (None, 0)


def test_the_curve_falls_where_the_boundaries_are_and_ends_at_zero() -> None:
    x, y = flat(0.55, 0.65, 0.9), torch.tensor([1, 1, 1])
    threat, ensemble = Threat(eps=0.1), Independent([Ramp(0)])
    tried, worst = Tried(ensemble, x, y, threat), np.ones((1, 3), dtype=bool)
    rows = curve(ensemble, x, y, threat, worst, tried, seed=0)
    accuracies = {round(row[0], 3): row[1] for row in rows}
    assert accuracies[0.0] == 1.0
    assert accuracies[0.025] == 1.0
    assert accuracies[0.1] == pytest.approx(2 / 3)
    assert accuracies[0.2] == pytest.approx(1 / 3)
    assert rows[-1][1] == 0.0
    assert all(len(row) == 4 for row in rows)
    # its points within the threat count as tried; those beyond do not
    assert tried.cell.correct.tolist() == [[False, True, True]]


def test_the_curve_takes_over_what_the_suite_found() -> None:
    x, y = flat(0.9, 0.9), torch.tensor([1, 1])
    worst = np.array([[False, True]])
    threat, ensemble = Threat(eps=0.1), Independent([Ramp(0)])
    rows = curve(ensemble, x, y, threat, worst, Tried(ensemble, x, y, threat), seed=0)
    values = [row[1] for row in rows]
    assert values[:5] == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert values == sorted(values, reverse=True)


def test_member_measures_are_plain_data() -> None:
    x, y = flat(0.55, 0.9), torch.tensor([1, 1])
    ensemble = Independent([Ramp(0), Ramp(1)])
    subject = Subject(ensemble, x, y, np.arange(2), "made up")
    worst = np.array([[True, True], [False, True]])
    found, points = member_measures(subject, Threat(eps=0.1), worst, seed=0)
    assert len(found["transfer"]) == 2
    assert found["curve"][0][1] == 1.0
    # the printed curve and the recorded points agree: each member is fooled on the first image
    assert points.alone.tolist() == [[False, True]] * 2
    assert points.correct.shape == (2, 2)


def test_measures_of_large_images_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(7, 1, 2, 2, generator=stream(0, "x"), dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    ensemble = Independent([Ramp(0), Ramp(1, -1.0), Ramp(2)]).double()
    subject = Subject(ensemble, x, y, np.arange(7), "made up")
    worst = np.ones((3, 7), dtype=bool)
    found = []
    for values in (store.VALUES, 3 * 4):
        monkeypatch.setattr(store, "VALUES", values)
        found.append(member_measures(subject, Threat(eps=0.2), worst, seed=0))
    assert subject.chunk == 3
    (whole, points), (parts, others) = found
    one, other = (it.pop("diversity") for it in (parts, whole))
    assert one.pop("clean") == other.pop("clean")
    assert one == pytest.approx(other)
    assert parts == whole
    assert np.array_equal(points.correct, others.correct)
    assert np.array_equal(points.alone, others.alone)
