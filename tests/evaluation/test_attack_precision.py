"""Attacks in bfloat16: they see the verdicts of single precision, and are judged in it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from redefense import evaluate
from redefense.attacks import Hinge
from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.evaluation.inputs.precision import (
    NEAR,
    InBfloat16,
    attack_precision,
    gap,
)
from redefense.evaluation.suite import SUITES
from redefense.rng import stream
from redefense.threat import Threat


def network(seed: int, scale: float = 1.0) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(3 * 400, 32), nn.ReLU(), nn.Linear(32, 5)]
    module = nn.Sequential(*layers)
    rng = stream(seed, "net")
    for p in module.parameters():
        p.data = scale * torch.randn(p.shape, generator=rng) / max(1, p[0].numel()) ** 0.5
    return module.eval()


class Offset(nn.Module):
    """Logits whose differences bfloat16 rounds away."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        return logits + torch.tensor(3000.0).to(logits.dtype)


def members() -> Independent:
    return Independent([network(seed) for seed in range(2)])


def images(count: int = 64) -> torch.Tensor:
    """Large squares, which a random network tells apart better than noise."""
    squares = torch.rand(count, 3, 2, 2, generator=stream(0, "x")).round()
    return squares.repeat_interleave(10, 2).repeat_interleave(10, 3)


def test_answers_near_a_boundary_are_those_of_single_precision() -> None:
    plain, x = members(), images(400)
    given, exact = InBfloat16(plain).logits_of(1, x), plain.logits_of(1, x)
    near = gap(exact) < NEAR / 2
    assert near.any()
    assert not near.all()
    torch.testing.assert_close(given[near], exact[near])
    assert torch.equal(given.argmax(1), exact.argmax(1))
    assert not torch.equal(given[~near], exact[~near])


def test_gradients_point_the_same_way() -> None:
    x = images(8).requires_grad_()
    slopes = [
        torch.autograd.grad(victim.logits_of(0, x)[:, 0].sum(), x)[0].flatten(1)
        for victim in (members(), InBfloat16(members()))
    ]
    assert (torch.cosine_similarity(slopes[0], slopes[1], dim=1) > 0.98).all()


def test_an_attack_returns_points_in_the_precision_of_the_images() -> None:
    x, victim = images(12), InBfloat16(members())
    y = members().logits_of(0, x).argmax(1)
    threat = Threat(eps=0.02)
    x_adv = Hinge(steps=5)(victim, x, y, threat, rng=stream(0, "a"))
    assert x_adv.dtype == torch.float32
    right = [
        (victim.logits_of(m, x_adv).argmax(1) == members().logits_of(m, x_adv).argmax(1)).all()
        for m in range(2)
    ]
    assert all(right)


def test_auto_takes_bfloat16_only_where_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from redefense.evaluation.inputs import precision

    monkeypatch.setattr(precision, "_computes_bfloat16", lambda device: True)
    x = images()
    assert attack_precision("auto", members(), x) == "bf16"
    assert attack_precision("fp32", members(), x) == "fp32"
    assert attack_precision("auto", members(), x[:, :, :8, :8]) == "fp32"
    assert attack_precision("auto", members().double(), x.double()) == "fp32"
    rounded = Independent([Offset(network(0))])
    assert attack_precision("auto", rounded, x) == "fp32"
    with pytest.warns(UserWarning, match="answers differently in bfloat16"):
        assert attack_precision("bf16", rounded, x) == "bf16"
    assert attack_precision("bf16", members(), x) == "bf16"


def test_an_evaluation_says_how_it_attacked(tmp_path: Path) -> None:
    x = images(20)
    y = members().logits_of(0, x).argmax(1)
    found = {
        precision: evaluate(members(), (x, y), "quick", Threat(eps=0.02), precision=precision)
        for precision in (None, "bf16")
    }
    assert [r.data["attack_precision"] for r in found.values()] == ["fp32", "bf16"]
    assert found[None].data["headline"]["unaware"] == found["bf16"].data["headline"]["unaware"]
    aware = [report.data["headline"]["aware"] for report in found.values()]
    assert abs(aware[0] - aware[1]) <= 0.05
    assert SUITES["aware"].precision == "fp32"
    with pytest.raises(ConfigError, match="precision must be auto, fp32 or bf16, got 'half'"):
        evaluate(members(), (x, y), precision="half")
