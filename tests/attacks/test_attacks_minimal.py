"""CW, DeepFool and SparseFool find known smallest changes; presets do what TorchAttacks does."""

import math
from typing import cast

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from redefense.attacks.base import Attack
from redefense.attacks.cw import CW
from redefense.attacks.minimal import DeepFool, deepfool_published
from redefense.attacks.objectives import margin
from redefense.attacks.sparse import SparseFool, cross_hyperplane
from redefense.errors import ConfigError
from redefense.rng import stream
from redefense.threat import Threat, norms

PRESET = "torchattacks-3.5.1"
THREAT = Threat()


def attacked(attack: Attack, victim: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return attack(victim, x, y, THREAT, rng=stream(0, "test"))


def linear_victim(classes: int = 4, pixels: int = 27, shift: float = 0.0) -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()
    linear = cast(nn.Linear, net[1])
    rng = stream(3, "linear")
    linear.weight.data = torch.randn(classes, pixels, dtype=torch.float64, generator=rng)
    linear.bias.data = -linear.weight.sum(1) / 2 + shift  # the boundaries meet in the grey image
    return net.requires_grad_(False)


def grey_images(net: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 3, 3) so near to grey that no smallest change reaches the box."""
    rng = stream(4, "images")
    x = 0.4 + 0.2 * torch.rand(count, 3, 3, 3, dtype=torch.float64, generator=rng)
    return x, net(x).argmax(1)


def exact_distance(net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """(B,) L2 distance to the nearest boundary of a linear victim."""
    weight, logits = cast(nn.Linear, net[1]).weight, net(x)
    gap = logits.gather(1, y[:, None]) - logits
    length = (weight[y][:, None] - weight).norm(dim=2)
    distance: Tensor = gap.div(length.clamp_min(1e-12)).scatter(1, y[:, None], math.inf).amin(1)
    return distance


@pytest.mark.parametrize("attack", [DeepFool(), CW()])
def test_the_distance_to_a_linear_boundary_is_found(attack: Attack) -> None:
    net = linear_victim()
    x, y = grey_images(net)
    x_adv = attacked(attack, net, x, y)
    exact, found = exact_distance(net, x, y), norms(x_adv - x, 2.0)
    assert (net(x_adv).argmax(1) != y).all()
    assert (found >= exact * (1 - 1e-6)).all()
    assert (found / exact).mean() <= 1.03
    assert (found <= exact * 1.15).all()  # some images stand within 0.01 of the boundary


def test_two_classes_are_enough() -> None:
    net = linear_victim(classes=2)
    x, y = grey_images(net)
    for attack in (DeepFool(), CW(), SparseFool()):
        assert (net(attacked(attack, net, x, y)).argmax(1) != y).all()


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_cw_does_not_mind_logits_below_zero_nor_log_probabilities(shift: float) -> None:
    plain = linear_victim()
    x, y = grey_images(plain)
    victim = nn.Sequential(linear_victim(shift=shift), nn.LogSoftmax(1))
    torch.testing.assert_close(attacked(CW(), victim, x, y), attacked(CW(), plain, x, y))


def test_the_published_cw_is_inert_on_log_probabilities() -> None:
    plain = linear_victim()
    x, y = grey_images(plain)
    victim = nn.Sequential(plain, nn.LogSoftmax(1))
    x_adv = attacked(CW(preset=PRESET), victim, x, y)
    assert (norms(x_adv - x, math.inf) < 1e-6).all()


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_cw_is_content_only_with_the_lead_asked_for(kappa: float) -> None:
    net = linear_victim()
    x, y = grey_images(net)
    lead = margin(net(attacked(CW(kappa=kappa), net, x, y)), y)
    assert (lead > kappa).all()
    assert (lead < kappa + 0.05).all()


@pytest.mark.parametrize("attack", [DeepFool(), CW(), SparseFool()])
def test_images_already_wrong_stay_as_they_are(attack: Attack) -> None:
    net = linear_victim()
    x, y = grey_images(net)
    wrong = (y + 1) % 4
    assert torch.equal(attacked(attack, net, x, wrong), x)


class Flat(nn.Module):
    """The same answer to everything, but part of the graph: gradients are exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = x.flatten(1)[:, :4] * 0 + torch.arange(4, 0, -1).to(x)
        return logits


@pytest.mark.parametrize("preset", [None, PRESET])
@pytest.mark.parametrize("kind", [DeepFool, CW, SparseFool])
def test_without_a_gradient_nothing_becomes_nan(kind: type[Attack], preset: str | None) -> None:
    x, _ = grey_images(linear_victim())
    attack = kind(preset=preset)  # type: ignore[call-arg]  # all three have presets
    x_adv = attacked(attack, Flat(), x, torch.zeros(len(x), dtype=torch.long))
    torch.testing.assert_close(x_adv, x)


def test_deepfool_looks_at_its_last_step() -> None:
    net = linear_victim()
    x, y = grey_images(net)
    assert (net(attacked(DeepFool(steps=1), net, x, y)).argmax(1) != y).all()


def test_deepfool_spares_pixels_that_cannot_move() -> None:
    # the heaviest pixel is black and would have to become darker: a plain step is lost on it
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double().requires_grad_(False)
    linear = cast(nn.Linear, net[1])
    linear.weight.data = torch.tensor([[9.0, 1, 1, 1], [-9, -1, -1, -1]], dtype=torch.float64)
    linear.bias.data = torch.tensor([-1.2, 1.2], dtype=torch.float64)
    x = torch.tensor([0.0, 0.6, 0.6, 0.6], dtype=torch.float64).view(1, 1, 2, 2)
    x_adv = attacked(DeepFool(steps=2), net, x, torch.tensor([0]))
    assert net(x_adv).argmax(1).item() == 1
    assert norms(x_adv - x, 2.0).item() == pytest.approx(0.6 / 3**0.5, rel=0.03)


def test_sparsefool_moves_the_single_most_useful_coordinate() -> None:
    net = linear_victim()
    x, _ = grey_images(net)
    linear = cast(nn.Linear, net[1])
    linear.weight[:, 5] = torch.tensor([9.0, 3.0, -3.0, -9.0])  # one that can do it alone
    linear.bias.copy_(-linear.weight.sum(1) / 2)
    y = net(x).argmax(1)
    x_adv = attacked(SparseFool(), net, x, y)
    moved = (x_adv != x).flatten(1)
    assert (net(x_adv).argmax(1) != y).all()
    assert (moved.sum(1) == 1).all()
    assert moved[:, 5].all()


def by_coordinates(x: Tensor, normal: Tensor, point: Tensor) -> Tensor:
    """The published solver, one coordinate after the other, for one image of flat pixels."""
    x, left = x.clone(), normal.clone()
    first = torch.dot(normal, x - point).sign()
    now = first
    while now == first and bool(left.any()):
        value = torch.dot(normal, x - point) + 0.001 * first
        i = int(left.abs().argmax())
        x[i] = (x[i] + (value.abs() / left[i].abs()).clamp_min(1e-4) * left[i].sign()).clamp(0, 1)
        now, left[i] = torch.dot(normal, x - point).sign(), 0
    return x


@pytest.mark.parametrize("reach", [0.3, 3.0, 40.0, 0.0, -0.5])
def test_the_closed_form_solver_is_the_published_loop(reach: float) -> None:
    # 0.3: a few coordinates; 3: many; 40: out of reach; 0: on the plane; -0.5: beyond it
    rng = stream(8, "solver")
    x = torch.rand(20, 3, 4, 4, dtype=torch.float64, generator=rng)
    normal = torch.randn(20, 3, 4, 4, dtype=torch.float64, generator=rng)
    normal[:, 0, 0] = 0
    normal /= norms(normal, 2.0).view(-1, 1, 1, 1)
    point = x + reach * normal
    ours = cross_hyperplane(x, normal, point).flatten(1)
    for i in range(len(x)):
        loop = by_coordinates(x[i].flatten(), normal[i].flatten(), point[i].flatten())
        torch.testing.assert_close(ours[i], loop, atol=2e-6, rtol=0.0)


def test_sparsefool_reads_channels_last_images() -> None:
    net = small_network(0)
    x, y = labelled_images(net)
    one = attacked(SparseFool(), net, x, y)
    other = attacked(SparseFool(), net, x.contiguous(memory_format=torch.channels_last), y)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CW, {"c": 0.0}),
        (CW, {"searches": 0}),
        (CW, {"preset": PRESET, "c": 5.0}),
        (DeepFool, {"steps": 0}),
        (DeepFool, {"overshoot": -0.1}),
        (DeepFool, {"preset": "autoattack-official"}),
        (DeepFool, {"preset": PRESET, "num_targets": 3}),
        (SparseFool, {"lam": 0.5}),
        (SparseFool, {"inner_steps": 0}),
    ],
)
def test_senseless_settings_are_refused(kind: type[Attack], settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        kind(**settings)


def test_the_released_evaluation_of_red_has_its_own_trade_off() -> None:
    released = CW(preset="red-released")
    assert (released.c, released.steps, released.searches) == (0.1, 50, 1)
    assert DeepFool(preset="red-released").steps == 50


# ---- parity with TorchAttacks 3.5.1

# of the library's own: its SparseFool hands tensors to numpy in a way that numpy 2 warns about
old_numpy = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def small_network(seed: int) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 16, 10),
    )  # fmt: skip
    rng = stream(seed, "net")
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng) * (2 / max(1, p[0].numel())) ** 0.5
    return net.double().eval()


def labelled_images(net: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    """Images with the network's own labels, two of them made wrong."""
    x = torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=stream(6, "images"))
    y = net(x).argmax(1)
    y[::6] = (y[::6] + 1) % 10
    return x, y


class Recorded(nn.Module):
    """Answers the n-th call with the n-th member of a list, over and over."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.members = nn.ModuleList([small_network(s) for s in range(3)])
        self.order, self.calls = order, 0

    def forward(self, x: Tensor) -> Tensor:
        member = self.members[self.order[self.calls % len(self.order)]]
        self.calls += 1
        logits: Tensor = member(x)
        return logits


ORDER = [0, 2, 1, 1, 0, 2, 2, 0, 1, 0, 0]


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_the_cw_preset_is_bit_for_bit_theirs(shift: float) -> None:
    # in float32, with logits of both signs and all above zero: their margin is right only there
    net = small_network(0).float()
    x, y = labelled_images(small_network(0))
    cast(nn.Linear, cast(nn.Sequential, net)[-1]).bias.data += shift
    theirs = torchattacks.CW(net)(x.float(), y)
    assert torch.equal(attacked(CW(preset=PRESET), net, x.float(), y), theirs)


def test_the_cw_preset_is_theirs_on_recorded_members() -> None:
    x, y = labelled_images(small_network(0))
    theirs, ours = Recorded(ORDER), Recorded(ORDER)
    expected = torchattacks.CW(theirs)(x, y)
    assert torch.equal(attacked(CW(preset=PRESET), ours, x, y), expected)
    assert ours.calls == theirs.calls


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 2.4e-7)])
def test_the_deepfool_preset_takes_their_steps(dtype: torch.dtype, atol: float) -> None:
    net = small_network(0).to(dtype)
    x, y = labelled_images(small_network(0))
    x = x.to(dtype)
    expected, targets = torchattacks.DeepFool(net).forward_return_target_labels(x, y)
    ours, reached = deepfool_published(net, x, y, steps=50, overshoot=0.02)
    assert torch.equal(reached, targets)
    torch.testing.assert_close(ours, expected, atol=atol, rtol=0.0)
    assert torch.equal(attacked(DeepFool(preset=PRESET), net, x, y), ours)


@old_numpy
def test_the_sparsefool_preset_moves_the_coordinates_theirs_moves() -> None:
    net = small_network(0)
    x, y = labelled_images(net, count=6)
    expected = torchattacks.SparseFool(net)(x, y)
    ours = attacked(SparseFool(preset=PRESET), net, x, y)
    assert torch.equal(ours != x, expected != x)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0.0)
    assert torch.equal(net(ours).argmax(1), net(expected).argmax(1))


@old_numpy
@pytest.mark.parametrize(
    ("attack", "theirs"),
    [
        (DeepFool(preset=PRESET), torchattacks.DeepFool),
        (SparseFool(preset=PRESET), torchattacks.SparseFool),
    ],
)
def test_single_images_meet_the_recorded_members_in_their_order(
    attack: Attack, theirs: type[torchattacks.attack.Attack]
) -> None:
    x, y = labelled_images(small_network(0), count=6)
    for i in range(len(x)):
        victim, other = Recorded(ORDER), Recorded(ORDER)
        expected = theirs(other)(x[i : i + 1], y[i : i + 1])
        ours = attacked(attack, victim, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0.0)
        assert victim.calls == other.calls
