"""MRBoost and BARRE: their loss, their stages, and the optimal mixture."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from defence_tools import SHAPE, assert_same, batch, engine_gradients, ensemble, gradients_of
from redefense.defences.barre import (
    ATTACK,
    BARRE,
    LogMeanProbability,
    begin,
    first_images,
    project_simplex,
)
from redefense.defences.base import Adversary
from redefense.defences.mrboost import MeanLogits, MRBoost, boosted_examples, copy_member
from redefense.ensembles import Hyper, Independent
from redefense.errors import ConfigError
from redefense.models import build
from redefense.penalties import margin_cross_entropy
from redefense.rng import stream
from redefense.types import Batch

MEMBERS = [2, 3, 8]
ADVERSARY = Adversary(eps=0.1, steps=3)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_margin_cross_entropy_is_its_definition(weight: float) -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=stream(0))
    y = torch.tensor([0, 6, 3, 3, 1])
    slow = []
    for row, label in zip(logits.tolist(), y.tolist(), strict=True):
        ce = -math.log(math.exp(row[label]) / sum(map(math.exp, row)))
        low = sum(math.exp(-z) for z in row)
        others = [-math.log(math.exp(-z) / low) for k, z in enumerate(row) if k != label]
        slow.append(ce + weight * sum(others) / 6)
    assert margin_cross_entropy(logits, y, weight).tolist() == pytest.approx(slow)


@pytest.mark.parametrize("individual", [True, False])
@pytest.mark.parametrize("num_members", [1, *MEMBERS])
def test_the_newest_member_learns_from_examples_on_all_so_far(
    num_members: int, individual: bool
) -> None:
    members, data = ensemble(num_members, "digits-cnn"), batch()
    newest = num_members - 1
    members.train_members([newest])
    view = MeanLogits(members, range(num_members))
    x = boosted_examples(view, data.x, data.y, ADVERSARY, 1.0, stream(0))
    assert float((x - data.x).abs().max()) <= 0.1 + 1e-12

    def slow() -> None:
        logits = members.logits_of(newest, x)
        if not individual:
            elders = [members.logits_of(m, x).detach() for m in range(newest)]
            logits = torch.stack([*elders, logits]).mean(0)
        margin_cross_entropy(logits, data.y, 1.0).mean().backward()

    boost = MRBoost(adversary=ADVERSARY, individual=individual)
    found, _ = engine_gradients(members, boost, data)
    assert_same(found, gradients_of(members, slow))


def test_without_wrong_classes_it_is_the_cross_entropy() -> None:
    members, data = ensemble(1), batch()
    x = boosted_examples(members.member(0), data.x, data.y, ADVERSARY, 0.0, stream(0))

    def slow() -> None:
        F.cross_entropy(members.logits_of(0, x), data.y).backward()

    for boost in (
        MRBoost(adversary=ADVERSARY, other_weight=0.0),
        BARRE(adversary=ADVERSARY, other_weight=0.0),
    ):
        assert_same(engine_gradients(members, boost, data)[0], gradients_of(members, slow))


def test_examples_raise_the_loss_they_climb() -> None:
    members, data = ensemble(3), batch()
    view = MeanLogits(members, range(3))
    x = boosted_examples(view, data.x, data.y, ADVERSARY, 1.0, stream(0))
    with torch.no_grad():
        before, after = (margin_cross_entropy(view(z), data.y, 1.0).mean() for z in (data.x, x))
    assert after.item() > before.item()


@pytest.mark.parametrize("defence", [MRBoost(), BARRE()])
def test_epochs_are_shared_and_too_few_are_refused(defence: MRBoost | BARRE) -> None:
    assert [stage.epochs for stage in defence.stages(3, 11)] == [4, 4, 3]
    assert [stage.members for stage in defence.stages(3, 11)] == [(0,), (1,), (2,)]
    with pytest.raises(ConfigError, match="at least as many epochs"):
        defence.stages(3, 2)


@pytest.mark.parametrize("persistent", [True, False])
def test_mrboost_gives_no_query_to_members_to_come(persistent: bool) -> None:
    members = ensemble(3, "digits-cnn")
    stages = MRBoost(persistent=persistent).stages(3, 3)
    assert stages[1].before is not None
    stages[1].before(members)
    assert members.mixture.tolist() == [0.5, 0.5, 0.0]
    first, second = (members.member(m).state_dict() for m in (0, 1))
    same = all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    assert same is persistent


def test_barre_starts_each_member_from_the_one_before_and_keeps_proportions() -> None:
    members = ensemble(3, "digits-cnn")
    begin(0, members)
    assert members.mixture.tolist() == [1.0, 0.0, 0.0]
    members.set_mixture([0.2, 0.8, 0.0])
    for _ in range(2):  # twice gives the same
        begin(2, members)
        assert members.mixture.tolist() == pytest.approx([0.4 / 3, 1.6 / 3, 1 / 3])
    x = batch().x
    assert torch.equal(members.logits_of(2, x), members.logits_of(1, x))


def test_a_written_member_can_start_from_another() -> None:
    nets = [
        build("digits-cnn", num_classes=4, shape=SHAPE, width=16, generator=stream(0, m))
        for m in range(2)
    ]
    members = Hyper(nets, unit=16, embedding=4, rng=stream(0, "hyper")).eval()
    x = batch().x.float()
    assert not torch.allclose(members.logits_of(0, x), members.logits_of(1, x))
    copy_member(members, 0, 1)
    torch.testing.assert_close(members.logits_of(0, x), members.logits_of(1, x))


def test_a_member_cannot_start_from_one_of_another_shape() -> None:
    members = Independent([nn.Linear(2, 3), nn.Linear(3, 3)])
    with pytest.raises(ConfigError, match="their tensors have other shapes"):
        copy_member(members, 0, 1)


def test_barre_attacks_the_mean_probability_under_the_mixture() -> None:
    members, x = ensemble(3), batch().x
    members.set_mixture([0.25, 0.75, 0.0])
    probs = 0.25 * members.logits_of(0, x).softmax(1) + 0.75 * members.logits_of(1, x).softmax(1)
    torch.testing.assert_close(LogMeanProbability(members)(x), probs.log())
    torch.testing.assert_close(LogMeanProbability(members)(x), members.averaged()(x))


@settings(max_examples=50)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_the_projection_is_the_nearest_probability_vector(values: list[float]) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    p = project_simplex(v)
    assert float(p.sum()) == pytest.approx(1)
    assert float(p.min()) >= 0
    for corner in torch.eye(len(values), dtype=torch.float64):
        # no way from the projection to any corner leads closer
        assert float((v - p) @ (corner - p)) <= 1e-9


class Threshold(nn.Module):
    """Answers 1 where one pixel, times a sign, lies above a level, else 0."""

    def __init__(self, pixel: int, level: float) -> None:
        super().__init__()
        self.pixel, self.level = pixel, level
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        z = self.weight * (x.flatten(1)[:, self.pixel] - self.level)
        return torch.stack([-z, z], dim=1)


def always_one(pixels: list[list[float]]) -> list[Batch]:
    x = torch.full((len(pixels), 1, 2, 2), 0.5, dtype=torch.float64)
    x.flatten(1)[:, :2] = torch.tensor(pixels, dtype=torch.float64)
    y = torch.ones(len(pixels), dtype=torch.long)
    return [Batch(x, y, torch.arange(len(pixels)))]


def test_the_mixture_moves_to_the_member_that_holds() -> None:
    members = Independent([Threshold(0, 0.5), Threshold(1, 0.1)])
    data = always_one([[0.52, 0.9], [0.55, 0.8], [0.51, 0.7]])  # the first falls, the second holds
    barre = BARRE(adversary=Adversary(eps=0.1), refit_rate=0.8)
    barre.refit(2, members, iter(data), stream(0))
    assert members.mixture.tolist() == pytest.approx([0.0, 1.0])


def test_the_mixture_stays_level_where_members_fall_apart() -> None:
    """Half of the images fool one member, half the other: 1/2 each is optimal."""
    members = Independent([Threshold(0, 0.5), Threshold(1, 0.5)])
    data = always_one([[0.52, 0.9], [0.9, 0.52], [0.55, 0.9], [0.9, 0.55]])
    BARRE(adversary=Adversary(eps=0.1)).refit(2, members, iter(data), stream(0))
    assert members.mixture.tolist() == pytest.approx([0.5, 0.5])


def test_a_last_batch_of_refitting_may_be_shorter() -> None:
    members = ensemble(2, "digits-cnn")
    barre = BARRE(adversary=Adversary(eps=0.1), refit_steps=1, refit_images=5)
    barre.refit(2, members, iter([batch(4), batch(4)]), stream(0))
    assert float(members.mixture.sum()) == pytest.approx(1.0)


def test_refitting_never_raises_the_risk_it_measures() -> None:
    members = ensemble(3)
    barre = BARRE(adversary=Adversary(eps=0.1), refit_steps=4, refit_rate=0.5)
    images = first_images(iter([batch(12)]), 12)
    start = members.mixture.clone()
    before = float(start @ barre.errors(members, 3, images, stream(0)))
    barre.refit(3, members, iter([batch(12)]), stream(0))
    after = float(members.mixture @ barre.errors(members, 3, images, stream(0)))
    assert after <= before + 1e-12


def test_optimal_sampling_looks_at_as_many_images_as_asked() -> None:
    batches = [batch(6), batch(6), batch(6)]
    assert [len(y) for _, y in first_images(iter(batches), 8)] == [6, 2]
    assert [len(y) for _, y in first_images(iter(batches), 99)] == [6, 6, 6]


def test_published_constants() -> None:
    boost, barre = MRBoost(), BARRE()
    published = Adversary(eps=8 / 255, steps=10, step_size=0.25)
    assert (boost.adversary, barre.adversary) == (published, published)
    assert (boost.other_weight, boost.individual, boost.persistent) == (1.0, True, False)
    assert (barre.other_weight, barre.refit_images, barre.refit_steps) == (1.0, 4096, 10)
    assert (ATTACK.steps, ATTACK.radius, ATTACK.competitors) == (10, 1.0, 2)


@pytest.mark.parametrize(
    ("cls", "values", "says"),
    [
        (MRBoost, {"other_weight": -1.0}, "other_weight must be"),
        (BARRE, {"other_weight": math.inf}, "other_weight must be"),
        (BARRE, {"refit_rate": -0.1}, "refit_rate must be"),
        (BARRE, {"refit_images": 0}, "refit_images must be"),
        (BARRE, {"refit_steps": -1}, "refit_steps must be"),
    ],
)
def test_senseless_settings_are_refused(cls: type, values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cls(**values)
