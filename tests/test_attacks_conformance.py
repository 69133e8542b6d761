"""Every attack in `ATTACKS`, present and future, keeps the contract of `attacks/base.py`."""

import math

import pytest
import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.ensembles import Independent
from redefense.errors import InputError
from redefense.rng import stream
from redefense.threat import Threat, norms

NAMES = sorted(ATTACKS)
EPS = 0.1
CASES = [(name, norm) for name in NAMES for norm in ATTACKS[name].norms]


def small_net(seed: int, classes: int = 5) -> nn.Module:
    """A convolutional net with batch norm and dropout, float64, eval mode, 1x6x6 images."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(144, classes),
    ).double()  # fmt: skip
    rng = stream(seed, "net")
    for p in net.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=rng) / max(1, p[0].numel()) ** 0.5
    return net.eval()


def images(count: int = 4, classes: int = 5) -> tuple[Tensor, Tensor]:
    rng = stream(7, "images")
    x = 0.15 + 0.7 * torch.rand(count, 1, 6, 6, dtype=torch.float64, generator=rng)
    return x, torch.arange(count) % classes


def run(
    name: str, victim: nn.Module, x: Tensor, y: Tensor, norm: float = math.inf, eps: float = EPS
) -> Tensor:
    return ATTACKS[name]()(victim, x, y, Threat(norm=norm, eps=eps), rng=stream(0, name))


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_result_is_an_image_in_the_ball(name: str, norm: float) -> None:
    x, y = images()
    x_adv = run(name, small_net(0), x, y, norm)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    if ATTACKS[name].bounded:
        assert (norms(x_adv - x, norm) <= EPS + 1e-6).all()


@pytest.mark.parametrize("name", [n for n in NAMES if ATTACKS[n].bounded])
def test_no_budget_changes_nothing(name: str) -> None:  # S02
    x, y = images()
    assert torch.equal(run(name, small_net(0), x, y, eps=0.0), x)


@pytest.mark.parametrize("name", NAMES)
def test_same_stream_gives_same_bits(name: str) -> None:  # S09
    x, y = images()
    assert torch.equal(run(name, small_net(0), x, y), run(name, small_net(0), x, y))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch_mates(name: str) -> None:  # S08
    x, y = images()
    together = run(name, small_net(0), x, y)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(run(name, small_net(0), x[order], y[order]), together[order])
    for i in range(len(x)):
        alone = run(name, small_net(0), x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1])


@pytest.mark.parametrize("name", NAMES)
def test_no_side_effects(name: str) -> None:  # S05
    x, y = images()
    net = small_net(0)
    next(net.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    state, kept = torch.get_rng_state(), x.clone()
    with torch.no_grad():
        run(name, net, x, y)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [m.training for m in net.modules()] == modes
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", NAMES)
def test_bad_images_are_refused(name: str) -> None:
    x, y = images()
    with pytest.raises(InputError, match="lie in"):
        run(name, small_net(0), x + 1, y)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"arc"}))  # a copy is another turn to ARC
def test_copies_of_one_member_change_nothing(name: str) -> None:  # S28
    x, y = images()
    net = small_net(0)
    copies = Independent([net, small_net(0), small_net(0)])
    victim = copies if ATTACKS[name].adaptive else copies.averaged()
    torch.testing.assert_close(run(name, victim, x, y), run(name, net, x, y))


def plane(weight: Tensor, offset: float) -> nn.Module:
    """Two classes; class 0 where weight . x > offset."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.numel(), 2)).double()
    linear = net[1]
    assert isinstance(linear, nn.Linear)
    linear.weight.data = torch.stack([weight, -weight])
    linear.bias.data = torch.tensor([-offset, offset], dtype=torch.float64)
    return net


def directions(count: int) -> Tensor:
    return torch.randn(count, 9, dtype=torch.float64, generator=stream(5, "directions"))


BOUNDED = [(n, p) for n, p in CASES if ATTACKS[n].bounded and not ATTACKS[n].needs_classes > 2]


@pytest.mark.parametrize(("name", "norm"), BOUNDED)
def test_a_linear_victim_falls_as_far_as_the_ball_allows(name: str, norm: float) -> None:
    (w,) = directions(1)
    x = torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.long)
    reach = EPS * torch.linalg.vector_norm(w, ord=1.0 if norm == math.inf else 2.0).item()
    for share, fooled in ((0.97, True), (1.03, False)):
        victim = plane(w, float(w.sum()) / 2 - share * reach)
        x_adv = run(name, victim, x, y, norm)
        assert ((victim(x_adv).argmax(1) != y) == fooled).all(), share
        drop = (x - x_adv).flatten(1) @ w
        assert (drop <= reach * (1 + 1e-9)).all()


ADAPTIVE = [(n, p) for n, p in CASES if ATTACKS[n].adaptive]


def expected(members: Independent, x: Tensor, y: Tensor) -> Tensor:
    right = (members.member_logits(x).argmax(-1) == y).double()
    return members.mixture @ right


@pytest.mark.parametrize(("name", "norm"), ADAPTIVE)
def test_opposite_members_are_fooled_one_at_a_time(name: str, norm: float) -> None:  # S30
    (w,) = directions(1)
    x, y = torch.full((3, 1, 3, 3), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    reach = EPS * torch.linalg.vector_norm(w, ord=1.0 if norm == math.inf else 2.0).item()
    middle = float(w.sum()) / 2
    pair = Independent([plane(w, middle - 0.8 * reach), plane(-w, -middle - 0.8 * reach)])
    assert (expected(pair, x, y) == 1).all()
    assert (expected(pair, run(name, pair, x, y, norm), y) == 0.5).all()


@pytest.mark.parametrize(("name", "norm"), ADAPTIVE)
def test_a_common_adversarial_half_space_is_found(name: str, norm: float) -> None:  # S30
    v, w = directions(2)
    x, y = torch.full((3, 1, 3, 3), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    order = 1.0 if norm == math.inf else 2.0
    members = []
    for u in (v, v + 0.5 * w):
        reach = EPS * torch.linalg.vector_norm(u, ord=order).item()
        members.append(plane(u, float(u.sum()) / 2 - 0.4 * reach))
    both = Independent(members)
    assert (expected(both, x, y) == 1).all()
    assert (expected(both, run(name, both, x, y, norm), y) == 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if ATTACKS[n].adaptive])
def test_members_that_are_never_drawn_are_ignored(name: str) -> None:
    x, y = images()
    net, other = small_net(0), small_net(1)
    pair = Independent([net, other], mixture=[1.0, 0.0])
    torch.testing.assert_close(run(name, pair, x, y), run(name, net, x, y))
