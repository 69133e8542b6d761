"""The presets do what TorchAttacks 3.5.1 does, on one network and on a recorded run of members."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from redefense.attacks import ATTACKS, Attack
from redefense.attacks.auto import AutoAttack
from redefense.attacks.square import Square
from redefense.config import construct
from redefense.rng import stream
from redefense.threat import Threat

CLASSES = 10
PRESET = "torchattacks-3.5.1"


def network(seed: int) -> nn.Module:
    """A float32 network in eval mode whose accuracy on `batch()` is partial, before and after."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, CLASSES),
    )  # fmt: skip
    rng = stream(seed, "parity")
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng) * (2 / max(1, p[0].numel())) ** 0.5
    return net.eval()


class Recorded(nn.Module):
    """Answers each call with the next member of a list, and counts the calls."""

    def __init__(self, members: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.members, self.order, self.calls = nn.ModuleList(members), order, 0

    def forward(self, x: Tensor) -> Tensor:
        member = self.members[self.order[self.calls % len(self.order)]]
        self.calls += 1
        logits: Tensor = member(x)
        return logits


def batch(count: int = 12) -> tuple[Tensor, Tensor]:
    """Images, labelled by the network so that most are right, by more or less."""
    rng = stream(1, "images")
    x = torch.rand(count, 3, 16, 16, generator=rng)
    y = network(0)(x).argmax(1)
    y[::6] = (y[::6] + 1) % CLASSES
    return x, y


def ours(name: str, victim: nn.Module, threat: Threat, preset: str = PRESET) -> Tensor:
    attack = ATTACKS[name](preset=preset)  # type: ignore[call-arg]  # every one here has presets
    return attack(victim, *batch(), threat, rng=torch.Generator().manual_seed(3))


def theirs(name: str, victim: nn.Module, threat: Threat, **settings: Any) -> Tensor:
    """Their attack, seeded as ours; `n_queries` reaches the Square inside AutoAttack too."""
    state, (x, y) = torch.get_rng_state(), batch()
    torch.manual_seed(3)
    if name in ("APGD", "APGDT", "FAB", "Square", "AutoAttack"):
        settings |= {"norm": "L2" if threat.norm == 2 else "Linf", "eps": threat.eps, "seed": 3}
    queries = settings.pop("n_queries", None)
    attack = getattr(torchattacks, name)(victim, **settings)
    if queries is not None:
        square = attack if name == "Square" else attack._autoattack.attacks[3]
        square.n_queries = queries
    x_adv: Tensor = attack(x, y)
    torch.set_rng_state(state)
    return x_adv


LINF, L2 = Threat(eps=8 / 255), Threat(norm=2.0, eps=0.5)
SAME = [
    ("fgsm", "FGSM", LINF, {}),
    ("bim", "BIM", LINF, {}),
    ("mim", "MIFGSM", LINF, {}),
    ("pgd", "PGD", LINF, {}),
    ("di2fgsm", "DIFGSM", LINF, {}),
    ("eotpgd", "EOTPGD", LINF, {}),
    *(
        (ours, theirs, threat, settings)
        for threat in (LINF, L2)
        for ours, theirs, settings in (
            ("apgd", "APGD", {}),
            ("apgdt", "APGDT", {}),
            ("fab", "FAB", {"multi_targeted": True}),
        )
    ),
]


def recorded() -> tuple[Recorded, Recorded]:
    """Twice the same sequence of members."""
    members = [network(seed) for seed in range(3)]
    order = torch.randint(3, (997,), generator=stream(2, "order")).tolist()
    return Recorded(members, order), Recorded(members, order)


def assert_same(one: Tensor, two: Tensor, name: str, threat: Threat) -> None:
    """Bit for bit where the arithmetic is the library's.

    Not so in L2 (lengths are formed otherwise), in BIM (its own way to clip) and in FAB (closed
    form against bisection).
    """
    rounded = threat.norm == 2 or name in ("bim", "fab")
    torch.testing.assert_close(one, two, rtol=0, atol=2e-6 if rounded else 0)


@pytest.mark.parametrize(("name", "their_name", "threat", "settings"), SAME)
def test_preset_equals_torchattacks(
    name: str, their_name: str, threat: Threat, settings: dict[str, Any]
) -> None:
    net = network(0)
    x_adv = ours(name, net, threat)
    assert_same(x_adv, theirs(their_name, net, threat, **settings), name, threat)


@pytest.mark.parametrize(("name", "their_name", "threat", "settings"), SAME)
def test_preset_asks_a_random_victim_the_same_questions(
    name: str, their_name: str, threat: Threat, settings: dict[str, Any]
) -> None:
    one, two = recorded()
    x_adv = ours(name, one, threat)
    assert_same(x_adv, theirs(their_name, two, threat, **settings), name, threat)
    assert one.calls == two.calls


# these two make thousands of queries; red-released differs only in making 200
@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("random", [False, True])
def test_autoattack_preset_equals_torchattacks(threat: Threat, random: bool) -> None:
    one, two = recorded() if random else (network(0), network(0))
    x_adv = ours("autoattack", one, threat, "red-released")
    # FAB is among its parts
    assert_same(x_adv, theirs("AutoAttack", two, threat, n_queries=200), "fab", threat)


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("random", [False, True])
def test_square_preset_equals_torchattacks(threat: Threat, random: bool) -> None:
    one, two = recorded() if random else (network(0), network(0))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        x_adv = Square(queries=200).published(one, *batch(), threat, rng=rng)
    assert_same(x_adv, theirs("Square", two, threat, n_queries=200), "square", threat)


@pytest.mark.parametrize(
    ("name", "calls"),
    [("fgsm", 1), ("mim", 10), ("pgd", 10), ("eotpgd", 20), ("apgd", 12), ("apgdt", 109),
     ("fab", 208)],
)  # fmt: skip
def test_presets_cost_what_the_library_costs_on_images_that_hold(name: str, calls: int) -> None:
    (x, y), victim = batch(), Recorded([network(0)], [0])
    tiny = Threat(eps=1e-6)
    ATTACKS[name](preset=PRESET)(victim, x, y, tiny, rng=stream(0, name))  # type: ignore[call-arg]
    assert victim.calls == calls


def test_presets_are_the_published_numbers() -> None:
    assert repr(Square(preset=PRESET)) == repr(replace(Square(), preset=PRESET))
    assert AutoAttack(preset=PRESET).steps == 10
    assert AutoAttack(preset="autoattack-official").steps == 100
    assert AutoAttack(preset="red-released").queries == 200
    assert not Square(preset="autoattack-official").rescale


def test_success_filter_returns_clean_images_only_in_presets() -> None:
    x, y = batch()
    tiny = Threat(eps=1e-4)
    for name in ("apgd", "apgdt"):
        assert torch.equal(ours(name, network(0), tiny), x)
        short: Attack = construct(ATTACKS[name], {"steps": 10}, name)
        x_adv = short(network(0), x, y, tiny, rng=stream(0, name))
        assert ((x_adv - x).flatten(1).abs().amax(1) > 0.5e-4).all()
