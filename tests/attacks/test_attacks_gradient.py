"""Identities between the gradient attacks, and the formulas that they climb."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.attacks.apgd import APGD, APGDT
from redefense.attacks.diverse import DI2FGSM, shrink_and_pad
from redefense.attacks.fab import to_hyperplane
from redefense.attacks.gradient import BIM, EOTPGD, FGSM, MIM, PGD, unit_mean
from redefense.attacks.objectives import OBJECTIVES, log_odds, margin, targeted_dlr, wrong_classes
from redefense.attacks.square import Square, pyramid
from redefense.errors import ConfigError, InputError
from redefense.rng import stream
from redefense.threat import Threat

LINF, L2 = Threat(eps=0.05), Threat(norm=2.0, eps=0.3)


def net(seed: int = 0, classes: int = 5) -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, classes))
    rng = stream(seed, "net")
    for p in module.parameters():
        p.data = 2 * torch.randn(p.shape, generator=rng) / max(1, p[0].numel()) ** 0.5
    return module.double()


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 6, 6, dtype=torch.float64, generator=stream(1, "x"))
    return x, net()(x).argmax(1)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def attack_with(attack: PGD | BIM | MIM | FGSM | DI2FGSM | EOTPGD, threat: Threat) -> Tensor:
    return attack(net(), *batch(), threat, rng=stream(2, "attack"))


@pytest.mark.parametrize("threat", [LINF, L2])
def test_the_gradient_attacks_are_settings_of_one_loop(threat: Threat) -> None:
    bim = attack_with(BIM(), threat)
    assert torch.equal(attack_with(EOTPGD(draws=1), threat), attack_with(PGD(), threat))
    assert torch.equal(attack_with(PGD(random_start=False), threat), bim)
    torch.testing.assert_close(attack_with(EOTPGD(draws=3), threat), attack_with(PGD(), threat))
    torch.testing.assert_close(attack_with(MIM(decay=0.0), threat), bim)
    torch.testing.assert_close(attack_with(DI2FGSM(diversity_prob=0.0), threat), bim)
    one = BIM(steps=1, step_size=1.0, keep_best=False)
    assert torch.equal(attack_with(one, threat), attack_with(FGSM(), threat))


@pytest.mark.parametrize(
    "attack", [PGD(steps=3), APGD(steps=10), APGDT(steps=5), Square(queries=20)]
)
@pytest.mark.parametrize("threat", [LINF, L2])
def test_no_visited_point_is_better_than_the_one_returned(
    attack: PGD | APGD | APGDT | Square, threat: Threat
) -> None:  # S24
    victim, seen = net(), []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 6:
                seen.append(x.detach())
            logits: Tensor = victim(x)
            return logits

    x, y = batch()
    x_adv = attack(Watched(), x, y, threat, rng=stream(2, "attack"))
    fooled = victim(x_adv).argmax(1) != y
    for point in seen[1:]:
        in_ball = ((point - x).flatten(1).norm(p=threat.norm, dim=1) <= threat.eps + 1e-9).all()
        if in_ball and not torch.equal(point, x):
            assert ((victim(point).argmax(1) != y) <= fooled).all()


def test_more_restarts_and_more_steps_never_help_the_victim() -> None:  # S14, S15
    victim, (x, y) = net(), batch(32)
    values = [
        log_odds(victim(PGD(restarts=r)(victim, x, y, LINF, rng=stream(2, "a"))), y)
        for r in (1, 2, 4)
    ]
    for fewer, more in itertools.pairwise(values):
        assert (more >= fewer).all()
    short, long = (
        BIM(steps=s)(victim, x, y, LINF, rng=stream(2, "a")) for s in (5, 10)
    )  # the longer one passes the same points
    assert (log_odds(victim(long), y) >= log_odds(victim(short), y)).all()


def test_log_odds_have_the_direction_of_cross_entropy_and_do_not_vanish() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, generator=stream(0, "logits"))
    y = torch.arange(7) % 5
    logits.requires_grad_()
    torch.testing.assert_close(
        F.softplus(log_odds(logits, y)), F.cross_entropy(logits, y, reduction="none")
    )
    (one,) = torch.autograd.grad(log_odds(logits, y).sum(), logits)
    (two,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    torch.testing.assert_close(F.normalize(one), F.normalize(two))

    sure = torch.tensor([[200.0, 0.0, -1.0]], requires_grad=True)
    zero = torch.tensor([0])
    (vanished,) = torch.autograd.grad(F.cross_entropy(sure, zero), sure)
    (kept,) = torch.autograd.grad(log_odds(sure, zero).sum(), sure)
    assert vanished.abs().sum() == 0
    assert kept.abs().sum() > 1


def test_pgd_moves_a_victim_whose_cross_entropy_gradient_is_zero() -> None:  # S22
    x, y = batch()
    x, victim = x.float(), nn.Sequential(net().float(), Scale(1e4))
    weak, strong = (
        PGD(random_start=False, loss=loss)(victim, x, y, LINF, rng=stream(0, "a"))
        for loss in ("cross_entropy", "log_odds")
    )
    assert (margin(victim(strong), y) >= margin(victim(weak), y)).all()
    assert (margin(victim(strong), y) > margin(victim(x), y)).all()
    assert ((weak - x).flatten(1).abs().amax(1) == 0).any()


def test_zero_gradients_do_not_freeze_the_momentum() -> None:
    zero, one = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert torch.equal(unit_mean(zero), zero)
    assert torch.equal(unit_mean(3 * one), one)
    assert unit_mean(zero, guard=False).isnan().all()


def test_objectives_are_positive_exactly_where_fooled() -> None:
    logits = torch.randn(200, 6, dtype=torch.float64, generator=stream(0, "z")) - 5
    y = torch.randint(6, (200,), generator=stream(0, "y"))
    fooled = logits.argmax(1) != y
    for name in ("margin", "dlr"):
        assert torch.equal(OBJECTIVES[name](logits, y) > 0, fooled), name
        shifted = OBJECTIVES[name](logits + 3, y)
        torch.testing.assert_close(shifted, OBJECTIVES[name](logits, y))
    torch.testing.assert_close(OBJECTIVES["dlr"](7 * logits, y), OBJECTIVES["dlr"](logits, y))
    targets = wrong_classes(logits, y, 9)
    assert targets.shape == (5, 200)
    assert (targets != y).all()
    values = torch.stack([targeted_dlr(logits, y, t) for t in targets])
    assert torch.equal((values > 0).any(0), fooled)


def test_transform_is_a_resize_and_a_padding() -> None:
    x = torch.rand(3, 2, 10, 8, dtype=torch.float64, generator=stream(0, "x"))
    height, width = torch.tensor([9, 7, 10]), torch.tensor([5, 8, 7])
    top, left = torch.tensor([1, 2, 0]), torch.tensor([3, 0, 1])
    ours = shrink_and_pad(x, height, width, top, left)
    for i in range(3):
        h, w, t, c = (int(v[i]) for v in (height, width, top, left))
        small = F.interpolate(x[i : i + 1], size=[h, w], mode="bilinear", align_corners=False)
        torch.testing.assert_close(
            ours[i : i + 1], F.pad(small, [c, 8 - w - c, t, 10 - h - t]), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_projection_meets_the_hyperplane_by_the_shortest_way_in_the_box(norm: float) -> None:
    rng = stream(0, "plane")
    points = torch.rand(300, 6, dtype=torch.float64, generator=rng)
    slope = torch.randn(300, 6, dtype=torch.float64, generator=rng)
    slope[:, 0] = 0
    gap = 2 * torch.randn(300, dtype=torch.float64, generator=rng)
    move = to_hyperplane(points, slope, gap, norm)
    there = points + move
    assert ((there >= -1e-12) & (there <= 1 + 1e-12)).all()
    left = gap + (slope * move).sum(1)
    room = torch.where(-slope * gap[:, None] > 0, 1 - points, points)
    reachable = (slope.abs() * room).sum(1) >= gap.abs()
    assert 0 < reachable.sum() < 300
    torch.testing.assert_close(left[reachable], torch.zeros_like(left[reachable]))
    # no other point of the hyperplane and the box is nearer: random ones are not
    length = move.norm(p=norm, dim=1)
    for _ in range(200):
        other = torch.rand(300, 6, dtype=torch.float64, generator=rng)
        crosses = (gap + (slope * (other - points)).sum(1)) * gap <= 0
        assert ((other - points).norm(p=norm, dim=1) >= length - 1e-9)[crosses & reachable].all()


def test_pyramid_has_two_halves_of_opposite_sign_and_unit_length() -> None:
    for side in (1, 2, 5, 6):
        upright, flipped = pyramid(side, torch.tensor([False, True]), torch.float64)
        assert upright.norm().item() == pytest.approx(1)
        assert torch.equal(flipped, upright.view(side, side).t().flatten())
        assert (upright.view(side, side)[: side // 2] > 0).all()
        assert (upright.view(side, side)[side // 2 :] < 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"step_size": 0.0}, {"restarts": 0}, {"loss": "none"},
        {"restarts": 2, "keep_best": False},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float | str]) -> None:
    with pytest.raises(ConfigError):
        replace(PGD(), **wrong)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=1), APGD(steps=2), Square(queries=5)])
def test_a_label_that_is_no_class_is_named(attack: FGSM | PGD | APGD | Square) -> None:
    x, y = batch()
    with pytest.raises(InputError, match=r"labels must lie in \[0, 5\), found 99"):
        attack(net(), x, torch.full_like(y, 99), LINF, rng=stream(0))
