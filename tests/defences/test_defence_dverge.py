"""DVERGE: distillation against a slow loop, the loss against its definition, its stages."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defence_tools import assert_same, batch, engine_gradients, ensemble, gradients_of
from redefense.defences.at import AdversarialTraining
from redefense.defences.base import Adversary
from redefense.defences.dverge import DVERGE
from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.models import Tapped
from redefense.rng import stream

MEMBERS = [2, 3, 8]


def slow_distillation(net: nn.Module, x: Tensor, target: Tensor, name: str) -> Tensor:
    """One image at a time, from the text: ten momentum sign steps of 0.007 within 0.07."""
    assert isinstance(net, Tapped)
    rows = []
    for image, other in zip(x.split(1), target.split(1), strict=True):
        z, velocity = image.clone(), torch.zeros_like(image)
        for _ in range(10):
            z = z.detach().requires_grad_()
            distance = (net.tap(z, name) - net.tap(other, name).detach()).square().sum()
            (grad,) = torch.autograd.grad(distance, z)
            velocity = velocity + grad / grad.abs().sum()
            z = torch.min(torch.max(z - 0.007 * velocity.sign(), image - 0.07), image + 0.07)
            z = z.clamp(0, 1)
        rows.append(z.detach())
    return torch.cat(rows)


def pairing(x: Tensor, seed: int) -> Tensor:
    roll = int(torch.randint(1, len(x), (), generator=stream(seed)))
    return x.roll(roll, 0)


@pytest.mark.parametrize("seed", range(4))
def test_distilled_images_are_the_published_iteration(seed: int) -> None:
    members, data = ensemble(2, "digits-cnn").eval(), batch(seed=seed)
    net = members.member(0)
    assert isinstance(net, Tapped)
    found = DVERGE().distil(members, data, stream(seed))[0]
    candidates = [
        slow_distillation(net, data.x, pairing(data.x, seed), name) for name in net.tap_names
    ]
    assert any(torch.allclose(found, candidate, atol=1e-12) for candidate in candidates)


def test_no_image_is_its_own_target() -> None:
    x = batch().x
    for seed in range(20):
        assert not any(torch.equal(a, b) for a, b in zip(x, pairing(x, seed), strict=True))


def test_distilled_images_stay_in_the_ball_and_come_closer_in_features() -> None:
    members, data = ensemble(3, "linear"), batch()
    target = pairing(data.x, 0)
    for net, x in zip(members.members, DVERGE().distil(members, data, stream(0)), strict=True):
        assert float((x - data.x).abs().max()) <= 0.07 + 1e-12
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        before, after = (net(z) - net(target) for z in (data.x, x))
        assert bool((after.norm(dim=1) < before.norm(dim=1)).all())


def test_the_layer_holds_for_an_epoch_and_every_one_is_drawn() -> None:
    members = ensemble(2, "digits-cnn").eval()

    def distilled(seed: int) -> Tensor:
        return DVERGE().distil(members, batch(seed=seed), stream(0))[0]

    kinds = {tuple(distilled(seed).flatten().tolist()) for seed in range(30)}
    assert len(kinds) == 4  # three convolutions and the logits
    assert torch.equal(distilled(7), distilled(7))


@pytest.mark.parametrize("num_members", MEMBERS)
def test_each_member_learns_from_the_images_of_all_others(num_members: int) -> None:
    members, data = ensemble(num_members), batch()
    distilled = DVERGE().distil(members, data, stream(0))

    def slow() -> None:
        for i in range(num_members):
            for j in range(num_members):
                if i != j:
                    F.cross_entropy(members.logits_of(i, distilled[j]), data.y).backward()

    found, logged = engine_gradients(members, DVERGE(), data)
    assert_same(found, gradients_of(members, slow))
    pairs = num_members * (num_members - 1)
    assert logged["total"] == pytest.approx(pairs * logged["distilled"])


def test_weight_zero_is_independent_adversarial_training() -> None:
    members, data, adversary = ensemble(3), batch(), Adversary(eps=0.1, steps=2)
    mixed = DVERGE(weight=0.0, adversarial_training=True, adversary=adversary)
    plain = AdversarialTraining(variant="independent", adversary=adversary)
    found, _ = engine_gradients(members, mixed, data)
    assert_same(found, engine_gradients(members, plain, data)[0])


def test_adversarial_training_adds_a_part_for_each_member() -> None:
    members, data = ensemble(3), batch()
    parts = list(DVERGE(adversarial_training=True).loss(members, data, stream(0)))
    assert len(parts) == 3 * 2 + 3
    assert sum("adversarial" in part.terms for part in parts) == 3


def test_members_of_one_kind_learn_equally_from_equal_others() -> None:
    members, data = ensemble(2), batch()
    members.member(1).load_state_dict(members.member(0).state_dict())
    first, second = (part.total.item() for part in DVERGE().loss(members, data, stream(0)))
    assert first == pytest.approx(second)


def test_stages_begin_with_plain_members() -> None:
    plain, own = DVERGE().stages(3, 400)
    assert (plain.name, plain.epochs, own.name, own.epochs) == ("plain", 200, "dverge", 200)
    with pytest.raises(ConfigError, match="at least 2 members"):
        DVERGE().stages(1, 400)


def test_published_constants() -> None:
    dverge = DVERGE()
    assert (dverge.eps, dverge.steps, dverge.step_size * dverge.eps) == (0.07, 10, 0.07 * 0.1)
    assert dverge.adversary == Adversary(eps=8 / 255, steps=10, step_size=0.25)


def test_a_network_without_taps_is_refused() -> None:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(16, 10).double()) for _ in range(2)]
    with pytest.raises(ConfigError, match="feature taps"):
        list(DVERGE().loss(Independent(nets), batch(), stream(0)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight": -1.0}, "weight must be"),
        ({"weight": 0.0}, "weight balances two losses"),
        ({"weight": 0.1}, "without adversarial_training: omit it, got 0.1"),
        ({"eps": 2.0}, "eps must lie"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"start": 1.0}, "start must lie"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DVERGE(**settings)  # type: ignore[arg-type]  # what a user may try
