"""ADP against slow loops from its definition, at its limits, and against the joint graph."""

import math
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defence_tools import assert_same, batch, engine_gradients, ensemble, gradients_of, identical
from redefense.defences.adp import ADP
from redefense.defences.base import Adversary
from redefense.defences.vanilla import Vanilla
from redefense.errors import ConfigError
from redefense.penalties import ensemble_entropy, log_det_diversity
from redefense.rng import stream

MEMBERS = [2, 3, 8]


def logits_and_labels(num_members: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(num_members, 4, 10, dtype=torch.float64, generator=stream(0))
    return logits, torch.tensor([0, 9, 4, 4])


@pytest.mark.parametrize("num_members", [1, *MEMBERS])
def test_entropy_and_determinant_are_the_paper_s(num_members: int) -> None:
    logits, y = logits_and_labels(num_members)
    entropy = determinant = 0.0
    for b in range(4):
        p = [[math.exp(z) for z in logits[m, b].tolist()] for m in range(num_members)]
        p = [[value / sum(row) for value in row] for row in p]
        mean = [sum(row[k] for row in p) / num_members for k in range(10)]
        entropy -= sum(v * math.log(v) for v in mean) / 4
        wrong = [[v for k, v in enumerate(row) if k != int(y[b])] for row in p]
        rows = [[v / math.hypot(*row) for v in row] for row in wrong]
        unit = torch.tensor(rows, dtype=torch.float64)
        gram = unit @ unit.T + 1e-6 * torch.eye(num_members)
        determinant += math.log(float(torch.linalg.det(gram))) / 4
    assert ensemble_entropy(logits).item() == pytest.approx(entropy)
    assert log_det_diversity(logits, y).item() == pytest.approx(determinant, rel=1e-5)


@pytest.mark.parametrize("num_members", MEMBERS)
def test_determinant_of_known_predictions(num_members: int) -> None:
    logits, y = logits_and_labels(num_members)
    same = log_det_diversity(logits[:1].expand_as(logits), y).item()
    assert same == pytest.approx((num_members - 1) * math.log(1e-6) + math.log(num_members))
    apart = torch.full((num_members, 1, 10), -1e4, dtype=torch.float64)
    for m in range(num_members):
        apart[m, 0, m + 1] = 0.0  # each member is sure of a wrong class of its own
    assert log_det_diversity(apart, torch.tensor([0])).item() == pytest.approx(0, abs=1e-4)


def test_extreme_logits_stay_finite_and_so_do_their_slopes() -> None:
    logits = torch.zeros(3, 2, 10)
    logits[:, :, 0] = 1e4  # single precision, all sure of class 0, which is right once
    logits.requires_grad_()
    y = torch.tensor([0, 1])
    total = ensemble_entropy(logits) + log_det_diversity(logits, y)
    (grad,) = torch.autograd.grad(total, logits)
    assert math.isfinite(total.item())
    assert bool(grad.isfinite().all())


def test_terms_are_the_definition() -> None:
    members, data = ensemble(3), batch()
    found = ADP().terms(members, data.x, data.y)
    logits = members.member_logits(data.x)
    ce = sum(F.cross_entropy(z, data.y).item() for z in logits)
    entropy = ensemble_entropy(logits).item()
    log_det = log_det_diversity(logits, data.y).item()
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {
            "ce": ce,
            "entropy": entropy,
            "log_det": log_det,
            "total": ce - 2 * entropy - 0.5 * log_det,
        }
    )


@pytest.mark.parametrize("model", ["mlp", "digits-cnn"])
@pytest.mark.parametrize("num_members", [1, *MEMBERS])
def test_one_member_at_a_time_gives_the_gradient_of_the_joint_graph(
    num_members: int, model: str
) -> None:
    members, data = ensemble(num_members, model).train(), batch()
    expected = gradients_of(
        members, lambda: ADP().terms(members, data.x, data.y)["total"].backward()
    )
    found, logged = engine_gradients(members, ADP(), data)
    assert_same(found, expected)
    terms = ADP().terms(members, data.x, data.y)
    assert logged == pytest.approx({name: value.item() for name, value in terms.items()})


def test_weights_zero_are_the_plain_ensemble() -> None:
    members, data = ensemble(3), batch()
    found, _ = engine_gradients(members, ADP(entropy=0.0, log_det=0.0), data)
    assert_same(found, engine_gradients(members, Vanilla(), data)[0])


def test_identical_members_have_the_lowest_determinant() -> None:
    data = batch()
    terms = ADP().terms(identical(3), data.x, data.y)
    assert terms["log_det"].item() == pytest.approx(2 * math.log(1e-6) + math.log(3))


class Shift(Adversary):
    """Records the radii it is asked for."""

    asked: ClassVar[list[float]] = []

    def craft(
        self,
        victim: nn.Module,
        x: Tensor,
        y: Tensor,
        rng: torch.Generator,
        *,
        room: int | None = None,
        eps: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        radius = self.eps if eps is None else float(eps)
        self.asked.append(radius)
        return (x + radius).clamp(0, 1)


def test_adversarial_training_adds_the_loss_at_a_radius_drawn_for_each_batch() -> None:
    members, data = ensemble(3), batch()
    adp = ADP(adversarial_training=True, adversary=Shift(eps=0.05))
    for seed in range(40):
        list(adp.loss(members, data, stream(seed)))
    radii = torch.tensor(Shift.asked)
    assert 0.01 <= float(radii.min()) < 0.02
    assert 0.04 < float(radii.max()) <= 0.05

    def both() -> None:
        for x in (data.x, (data.x + 0.05).clamp(0, 1)):
            ADP().terms(members, x, data.y)["total"].backward()

    fixed = ADP(adversarial_training=True, adversary=Shift(eps=0.05), smallest_eps=0.05)
    assert_same(engine_gradients(members, fixed, data)[0], gradients_of(members, both))


@pytest.mark.parametrize("num_members", [10, 11])
def test_as_many_members_as_classes_are_refused(num_members: int) -> None:
    data = batch()
    with pytest.raises(ConfigError, match=f"{num_members} members for 10 classes"):
        list(ADP().loss(ensemble(num_members), data, stream(0)))


def test_published_constants() -> None:
    adp = ADP()
    assert (adp.entropy, adp.log_det) == (2.0, 0.5)
    assert (adp.smallest_eps, adp.adversary) == (0.01, Adversary(eps=0.05, steps=10, step_size=0.1))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"entropy": -1.0}, "entropy must be"),
        ({"log_det": math.nan}, "log_det must be"),
        ({"smallest_eps": 0.06}, "smallest_eps must lie"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ADP(**settings)  # type: ignore[arg-type]  # what a user may try
