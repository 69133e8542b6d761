"""The presets do what TorchAttacks 3.5.1 does, on one network and on a recorded run of members."""

from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from redefense.attacks import ATTACKS
from redefense.rng import stream
from redefense.threat import Threat

EPS, CLASSES = 8 / 255, 10
PRESET = "torchattacks-3.5.1"
L2 = {"norm": "L2", "eps": 0.5}


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


def batch(count: int = 24) -> tuple[Tensor, Tensor]:
    """Images, labelled by the network so that most are right, by more or less."""
    rng = stream(1, "images")
    x = torch.rand(count, 3, 16, 16, generator=rng)
    y = network(0)(x).argmax(1)
    y[::6] = (y[::6] + 1) % CLASSES
    return x, y


def ours(name: str, victim: nn.Module, seed: int = 3, threat: Threat | None = None) -> Tensor:
    attack = ATTACKS[name](preset=PRESET)  # type: ignore[call-arg]  # every one here has presets
    rng = torch.Generator().manual_seed(seed)
    return attack(victim, *batch(), threat or Threat(eps=EPS), rng=rng)


def theirs(name: str, victim: nn.Module, **settings: Any) -> Tensor:
    state, (x, y) = torch.get_rng_state(), batch()
    torch.manual_seed(3)
    x_adv: Tensor = getattr(torchattacks, name)(victim, **settings)(x, y)
    torch.set_rng_state(state)
    return x_adv


SAME = [
    ("fgsm", "FGSM", {}),
    ("bim", "BIM", {}),
    ("mim", "MIFGSM", {}),
    ("pgd", "PGD", {}),
    ("di2fgsm", "DIFGSM", {}),
    ("eotpgd", "EOTPGD", {}),
    ("apgd", "APGD", {"seed": 3}),
    ("apgdt", "APGDT", {"seed": 3}),
]


@pytest.mark.parametrize(("name", "their_name", "settings"), SAME)
def test_preset_equals_torchattacks(name: str, their_name: str, settings: dict[str, Any]) -> None:
    net = network(0)
    torch.testing.assert_close(
        ours(name, net), theirs(their_name, net, **settings), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("name", "their_name", "settings"), SAME)
def test_preset_asks_a_random_victim_the_same_questions(
    name: str, their_name: str, settings: dict[str, Any]
) -> None:
    members = [network(seed) for seed in range(3)]
    order = torch.randint(3, (997,), generator=stream(2, "order")).tolist()
    one, two = Recorded(members, order), Recorded(members, order)
    torch.testing.assert_close(
        ours(name, one), theirs(their_name, two, **settings), rtol=0, atol=1e-6
    )
    assert one.calls == two.calls


@pytest.mark.parametrize(("name", "their_name"), [("apgd", "APGD"), ("apgdt", "APGDT")])
def test_l2_preset_equals_torchattacks(name: str, their_name: str) -> None:
    net = network(0)
    threat = Threat(norm=2.0, eps=0.5)
    torch.testing.assert_close(
        ours(name, net, threat=threat), theirs(their_name, net, seed=3, **L2), rtol=0, atol=1e-5
    )
