"""The attacks that know the members: exact judgement, single-member limits, known optima."""

import math
from collections.abc import Iterator
from itertools import islice, permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.attacks.adaptive import Hinge, MeanProbPGD, Support, Transfer
from redefense.attacks.apgd import APGD, APGDT
from redefense.attacks.arc import ARC, member_orders, nearest_boundary
from redefense.attacks.gradient import PGD
from redefense.attacks.minimal import DeepFool
from redefense.config import construct
from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.rng import stream
from redefense.threat import Threat

LINF, L2 = Threat(eps=0.06), Threat(norm=2.0, eps=0.25)
ADAPTIVE = sorted(n for n, a in ATTACKS.items() if a.adaptive)


def net(seed: int, classes: int = 4) -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, classes))
    rng = stream(seed, "net")
    for p in module.parameters():
        p.data = 1.5 * torch.randn(p.shape, generator=rng) / max(1, p[0].numel()) ** 0.5
    return module.double()


def ensemble(mixture: list[float] | None = None) -> Independent:
    return Independent([net(seed) for seed in range(3)], mixture=mixture)


def batch(count: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 6, 6, dtype=torch.float64, generator=stream(1, "x"))
    return x, net(0)(x).argmax(1)


def expected(members: Independent, x: Tensor, y: Tensor) -> Tensor:
    return members.mixture @ (members.member_logits(x).argmax(-1) == y).double()


QUICK: dict[str, dict[str, Any]] = {
    "arc": {"steps": 10},
    "meanprob_apgd": {"steps": 20},
    "subset": {"steps": 10, "num_targets": 2, "mixed": 1},
    "transfer": {"attack": APGDT(steps=10, loss="targeted_margin")},
}


def run(name: str, victim: nn.Module, threat: Threat, **settings: Any) -> Tensor:
    return ATTACKS[name](**settings)(victim, *batch(), threat, rng=stream(0, "attack"))


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("mixture", [None, [0.6, 0.0, 0.4]])
@pytest.mark.parametrize("threat", [LINF, L2])
def test_no_image_is_answered_right_more_often_than_before(
    name: str, mixture: list[float] | None, threat: Threat
) -> None:  # S37
    members, (x, y) = ensemble(mixture), batch()
    after = expected(members, run(name, members, threat, **QUICK.get(name, {})), y)
    assert (after <= expected(members, x, y) + 1e-9).all()
    assert after.mean() < expected(members, x, y).mean()


class WrongAt(nn.Module):
    """Right everywhere but at one image, where no gradient says so."""

    def __init__(self, image: Tensor, label: int) -> None:
        super().__init__()
        self.image, self.label = image, label

    def forward(self, x: Tensor) -> Tensor:
        there = (x == self.image).flatten(1).all(1)
        logits = torch.zeros(len(x), 4, dtype=x.dtype) + 0.01 * x.flatten(1).mean(1, keepdim=True)
        logits[:, self.label] += torch.where(there, -1.0, 1.0) + x.flatten(1).square().mean(1)
        return logits


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_image_that_fools_all_members_untouched_is_returned_as_it_is(name: str) -> None:
    x = batch(1)[0]
    members = Independent([WrongAt(x[0], 2), WrongAt(x[0], 2)])
    attack = ATTACKS[name](**QUICK.get(name, {}))
    assert torch.equal(attack(members, x, torch.tensor([2]), LINF, rng=stream(0, "attack")), x)


@pytest.mark.parametrize("name", ["meanprob_pgd", "hinge", "arc"])
def test_more_restarts_never_help_the_victim(name: str) -> None:  # S15
    members, (_, y) = ensemble(), batch()
    one, three = (expected(members, run(name, members, LINF, restarts=r), y) for r in (1, 3))
    assert (three <= one + 1e-9).all()


@pytest.mark.parametrize("threat", [LINF, L2])
def test_on_one_member_they_are_the_plain_attacks(threat: Threat) -> None:
    (x, y), victim = batch(), net(0)
    plain = PGD()(victim, x, y, threat, rng=stream(0, "attack"))
    torch.testing.assert_close(run("meanprob_pgd", victim, threat), plain)
    torch.testing.assert_close(run("transfer", victim, threat, attack=PGD()), plain)
    auto = APGD()(victim, x, y, threat, rng=stream(0, "attack"))
    torch.testing.assert_close(run("meanprob_apgd", victim, threat), auto)


def test_mean_log_odds_are_those_of_the_averaged_view() -> None:
    members, (x, y) = ensemble([0.2, 0.0, 0.8]), batch()
    support = Support(members)
    assert list(support.indices) == [0, 2]
    p = members.averaged()(x).softmax(1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(support.log_odds(support.each(x), y), ((1 - p) / p).log())
    torch.testing.assert_close(support.correct(support.each(x), y), expected(members, x, y))


def test_equal_shares_of_different_members_compare_as_equal() -> None:
    support = Support(Independent([net(s) for s in range(7)], mixture=[1 / 7] * 7))
    y = torch.tensor([0])
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    first = support.correct([right] * 3 + [wrong] * 4, y)
    spread = support.correct([right, wrong, wrong, right, wrong, right, wrong], y)
    assert torch.equal(first, spread)


def test_transfer_is_as_good_as_every_single_members_attack() -> None:
    members, (x, y) = ensemble(), batch()
    best = expected(members, run("transfer", members, LINF), y)
    for m in range(3):
        single = APGDT(steps=50, loss="targeted_margin")(
            members.member(m), x, y, LINF, rng=stream(0, "attack")
        )
        assert (best <= expected(members, single, y) + 1e-9).all()


@pytest.mark.parametrize(("norm", "order"), [(math.inf, 1.0), (2.0, 2.0)])
def test_arc_measures_distances_to_linear_boundaries_exactly(norm: float, order: float) -> None:
    linear = nn.Linear(9, 4).double()
    members, x = (
        Independent([nn.Sequential(nn.Flatten(), linear)]),
        torch.rand(5, 1, 3, 3, dtype=torch.float64, generator=stream(0, "x")),
    )
    distance, slope = nearest_boundary(members, 0, x, Threat(norm=norm, eps=0.1), 9)
    logits = members.logits_of(0, x)
    top = logits.argmax(1)
    for i in range(5):
        t = int(top[i])
        every = [
            (logits[i, t] - logits[i, j]) / (linear.weight[t] - linear.weight[j]).norm(p=order)
            for j in range(4)
            if j != t
        ]
        assert distance[i].item() == pytest.approx(min(v.item() for v in every))
        assert slope[i].flatten().norm(p=order) > 0


def test_arc_restarts_take_every_order_of_three_equal_members() -> None:
    orders = [tuple(order) for order in islice(member_orders([1 / 3] * 3), 6)]
    assert orders[:2] == [(0, 1, 2), (2, 1, 0)]
    assert set(orders) == set(permutations(range(3)))
    assert {tuple(o) for o in islice(member_orders([0.2, 0.5, 0.3]), 6)} == {(1, 2, 0)}
    tied = {tuple(o) for o in islice(member_orders([0.25, 0.5, 0.25]), 6)}
    assert tied == {(1, 0, 2), (1, 2, 0)}


class Plane(nn.Module):
    """Class 0 where w . (x - 1/2) > 0."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        value = (x - 0.5).flatten(1) @ self.w
        return torch.stack([value, -value], dim=1)


def conflicting_pairs(count: int) -> Iterator[tuple[Independent, Tensor]]:
    """Pairs of linear members, and images whose common L2 radius is the budget over 1 to 1.3."""
    rng = stream(0, "pairs")
    w = torch.randn(8 * count, 2, 5, dtype=torch.float64, generator=rng)
    for pair in w[torch.cosine_similarity(w[:, 0], w[:, 1], dim=-1) < -0.1][:count]:
        b = 0.5 + 0.5 * torch.rand(40, 2, dtype=torch.float64, generator=rng)
        to_both = b @ torch.linalg.pinv(pair).T  # from where both boundaries meet
        share = 1 + 0.3 * torch.rand(40, dtype=torch.float64, generator=rng)
        far = to_both / to_both.norm(dim=1, keepdim=True) * (L2.eps / share)[:, None]
        yield Independent([Plane(pair[0]), Plane(pair[1])]), (0.5 + far).view(40, 1, 1, 5)


def test_hinge_fools_both_members_wherever_that_can_be_done() -> None:
    pairs = list(conflicting_pairs(5))
    y = torch.zeros(40, dtype=torch.long)

    def both(attack: Hinge | MeanProbPGD | ARC | Transfer) -> float:
        fooled = []
        for members, x in pairs:
            x_adv = attack(members, x, y, L2, rng=stream(0, "a"))
            fooled.append((expected(members, x_adv, y) == 0).double().mean())
        return torch.stack(fooled).mean().item()

    hinge = both(Hinge())
    assert hinge > 0.9
    assert hinge > both(ARC(steps=10)) > both(Transfer())
    assert hinge > both(MeanProbPGD())


class Pocket(nn.Module):
    """Right on every image below 0.6, wrong above, with a slope that leads away from there."""

    def forward(self, x: Tensor) -> Tensor:
        v = x.flatten(1)
        margin = torch.where(v < 0.6, 1 + 0.5 * (v - 0.5), 0.5 - v)
        return torch.cat([margin, torch.zeros_like(v)], dim=1)


@pytest.mark.parametrize("name", sorted({"arc", "hinge", "meanprob_pgd", "meanprob_apgd"}))
def test_a_random_start_that_fools_all_members_is_kept(name: str) -> None:
    x, y = torch.full((16, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(16, dtype=torch.long)
    x = x + torch.arange(16).view(-1, 1, 1, 1) * 1e-3  # each image has starts of its own
    attack = construct(ATTACKS[name], {"steps": 1, "restarts": 50}, name)
    x_adv = attack(Pocket(), x, y, Threat(eps=0.2), rng=stream(0, "attack"))
    assert (Pocket()(x_adv).argmax(1) != y).all()


def test_transfer_takes_bounded_attacks_alone() -> None:
    with pytest.raises(ConfigError, match=r"attack must be a bounded attack, e\.g\. PGD\(\), got"):
        Transfer(attack=DeepFool())


def test_transfer_needs_the_classes_that_its_attack_needs() -> None:
    assert Transfer(attack=PGD()).least_classes == 2
    assert Transfer(attack=APGDT(loss="targeted_dlr")).least_classes == 4
