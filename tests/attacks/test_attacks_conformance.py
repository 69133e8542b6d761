"""Every attack in `ATTACKS`, present and future, keeps the contract of `attacks/base.py`."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import redefense.attacks
import redefense.defences
from redefense.attacks import APGDT, ATTACKS, PGD
from redefense.defences import DEFENCES
from redefense.ensembles import Independent
from redefense.errors import ConfigError, InputError
from redefense.rng import stream
from redefense.threat import Threat, norms

NAMES = sorted(ATTACKS)
# the default but for the budget, where the default takes thousands of queries
QUICK: dict[str, dict[str, Any]] = {
    "apgd": {"steps": 25},
    "apgdt": {"steps": 10},
    "autoattack": {"steps": 10, "queries": 50},
    "eotpgd": {"draws": 2},
    "fab": {"steps": 10},
    "meanprob_apgd": {"steps": 25},
    "square": {"queries": 300},
    "subset": {"steps": 25},
    "transfer": {"attack": APGDT(steps=10, loss="targeted_margin")},
}
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
    name: str,
    victim: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: float = math.inf,
    eps: float = EPS,
    **settings: Any,
) -> Tensor:
    attack = ATTACKS[name](**QUICK.get(name, {}) | settings)
    return attack(victim, x, y, Threat(norm=norm, eps=eps), rng=stream(0, name))


@cache
def plain(name: str) -> Tensor:
    """What the attack finds on one network, with which other ways of calling it are compared."""
    return run(name, small_net(0), *images())


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
    assert torch.equal(run(name, small_net(0), x, y), plain(name))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch_mates(name: str) -> None:  # S08
    x, y = images()
    together = plain(name)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(run(name, small_net(0), x[order], y[order]), together[order])
    for i in range(len(x)):
        alone = run(name, small_net(0), x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1])


def test_attacks_and_defences_are_importable_from_their_packages() -> None:
    for package, mapping in ((redefense.attacks, ATTACKS), (redefense.defences, DEFENCES)):
        for cls in mapping.values():
            assert getattr(package, cls.__name__) is cls
            assert cls.__name__ in package.__all__


def test_without_a_stream_draws_come_from_the_system() -> None:
    (x, y), net = images(), small_net(0)
    state = torch.get_rng_state()
    first, second = (PGD(steps=1)(net, x, y, Threat(norm="linf", eps="8/255")) for _ in range(2))
    assert not torch.equal(first, second)
    assert all((norms(x_adv - x, math.inf) <= 8 / 255 + 1e-12).all() for x_adv in (first, second))
    assert torch.equal(torch.get_rng_state(), state)


def numpy_state() -> object:
    return np.random.get_state(legacy=False)["state"]["key"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_no_side_effects(name: str) -> None:  # S05
    x, y = images()
    net = small_net(0)
    next(net.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    state, kept = torch.get_rng_state(), x.clone()
    kept_numpy = numpy_state()
    with torch.no_grad():
        run(name, net, x, y)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    # Python's own generator is not compared: the shape checker of this test run draws from it
    assert numpy_state() == kept_numpy
    assert torch.equal(x, kept)
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [m.training for m in net.modules()] == modes
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_train_mode_learns_nothing_from_an_attack(name: str) -> None:  # S05
    x, y = images()
    head = small_net(0)
    net = nn.Sequential(nn.BatchNorm2d(x.shape[1]).double(), head).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    run(name, net, x, y)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    net(x)
    assert net.state_dict()["0.num_batches_tracked"] == 1, "the network was left unable to learn"


@pytest.mark.parametrize("name", NAMES)
def test_one_float32_image_inside_inference_mode(name: str) -> None:
    (x, y), net = images(1), small_net(0).float()
    with torch.inference_mode():
        x_adv = run(name, net, x.float(), y)
    assert x_adv.dtype == torch.float32
    assert torch.isfinite(x_adv).all()
    assert not x_adv.is_inference()


@pytest.mark.parametrize("name", NAMES)
def test_memory_layout_and_label_type_do_not_matter(name: str) -> None:
    x, y = images()
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    torch.testing.assert_close(run(name, small_net(0), turned, y.int()), plain(name))


@pytest.mark.parametrize("name", NAMES)
def test_two_classes_suffice_or_are_refused(name: str) -> None:
    x, y = images(classes=2)
    if ATTACKS[name]().least_classes > 2:
        with pytest.raises(ConfigError, match="at least 4 classes"):
            run(name, small_net(0, classes=2), x, y)
    else:
        assert torch.isfinite(run(name, small_net(0, classes=2), x, y)).all()


class Constant(nn.Module):
    """Always the true answer, whatever it sees; no gradient at all."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.functional.one_hot(y, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[torch.arange(len(x)) % len(self.logits)]


@pytest.mark.parametrize("name", NAMES)
def test_a_victim_without_gradients_yields_images_not_nan(name: str) -> None:  # S22
    x, y = images()
    x_adv = run(name, Constant(y), x, y)
    assert torch.isfinite(x_adv).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


@pytest.mark.parametrize("name", [n for n in NAMES if ATTACKS[n].bounded])
def test_failure_is_no_reason_to_hand_back_the_image(name: str) -> None:  # S34
    x, y = images()
    net = small_net(0)
    y = net(x).argmax(1)
    x_adv = run(name, net, x, y, eps=1e-3)
    assert ((x_adv - x).flatten(1).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("name", sorted(n for n in NAMES if not ATTACKS[n].adaptive))
def test_a_pinned_draw_is_that_member(name: str) -> None:  # S29
    x, y = images()
    net = small_net(0)
    pinned = Independent([small_net(1), net], mixture=[0.0, 1.0]).sampled(rng=stream(3, "draw"))
    torch.testing.assert_close(run(name, pinned, x, y), plain(name))


def test_names_and_summaries_are_complete() -> None:
    paper = "fgsm bim mim pgd di2fgsm eotpgd apgd autoattack square cw deepfool sparsefool"
    others = "onepixel pixle apgdt fab arc hinge meanprob_pgd meanprob_apgd subset transfer"
    assert set(ATTACKS) >= {*paper.split(), *others.split()}
    for attack in ATTACKS.values():
        assert attack.summary
        assert "\n" not in attack.summary


@pytest.mark.parametrize("name", [n for n in NAMES if ATTACKS[n].presets])
def test_presets_fix_settings_and_refuse_others(name: str) -> None:
    attack: Any = ATTACKS[name]
    with pytest.raises(ConfigError, match="no preset 'mine'"):
        attack(preset="mine")
    for preset, settings in attack.presets.items():
        made = attack(preset=preset)
        assert {key: getattr(made, key) for key in settings} == dict(settings)
        for key, value in settings.items():
            if type(value) in (int, float) and value + 1 != getattr(attack(), key):
                with pytest.raises(ConfigError, match=f"fixes {key}="):
                    attack(preset=preset, **{key: value + 1})


@pytest.mark.parametrize("name", NAMES)
def test_bad_images_are_refused(name: str) -> None:
    x, y = images()
    with pytest.raises(InputError, match="lie in"):
        run(name, small_net(0), x + 1, y)
    with pytest.raises(InputError, match=r"cannot take images of \(2, 6, 6\)"):
        run(name, small_net(0), torch.rand(len(x), 2, 6, 6, dtype=x.dtype), y)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"arc"}))  # a copy is another turn to ARC
def test_copies_of_one_member_change_nothing(name: str) -> None:  # S28
    x, y = images()
    net = small_net(0)
    copies = Independent([net, small_net(0), small_net(0)])
    victim = copies if ATTACKS[name].adaptive else copies.averaged()
    # later steps of FAB start on a decision boundary, where rounding of the average decides
    few = {"steps": 3} if name == "fab" else {}
    one = run(name, net, x, y, **few) if few else plain(name)
    torch.testing.assert_close(run(name, victim, x, y, **few), one)


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


BOUNDED = [(n, p) for n, p in CASES if ATTACKS[n].bounded and not ATTACKS[n]().least_classes > 2]


@pytest.mark.parametrize(("name", "norm"), BOUNDED)
def test_a_linear_victim_falls_as_far_as_the_ball_allows(name: str, norm: float) -> None:
    (w,) = directions(1)
    x = torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.long)
    reach = EPS * torch.linalg.vector_norm(w, ord=1.0 if norm == math.inf else 2.0).item()
    # patches of 3 pixels and more cannot follow the steepest direction
    enough = 0.6 if (name, norm) == ("square", 2.0) else 0.97
    for share, fooled in ((enough, True), (1.03, False)):
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
    torch.testing.assert_close(run(name, pair, x, y), plain(name))
