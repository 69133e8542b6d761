"""Attacks in bfloat16: they see the verdicts of single precision, and are judged in it."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from redefense import evaluate
from redefense.attacks import Hinge
from redefense.ensembles import Independent
from redefense.errors import ConfigError
from redefense.evaluation.cells import Subject
from redefense.evaluation.inputs.batches import in_batches
from redefense.evaluation.inputs.precision import NEAR, SMALL, InBfloat16, attack_copy, gap
from redefense.evaluation.pass_counter import Meter
from redefense.evaluation.suite import SUITES
from redefense.models.double_backward import BatchNorm2d
from redefense.models.resnet import conv
from redefense.rng import stream
from redefense.threat import Threat


def network(seed: int, scale: float = 1.0) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(3 * 400, 32), nn.ReLU(), nn.Linear(32, 5)]
    module = nn.Sequential(*layers)
    rng = stream(seed, "net")
    for p in module.parameters():
        p.data = scale * torch.randn(p.shape, generator=rng) / max(1, p[0].numel()) ** 0.5
    return module.eval()


class Changed(nn.Module):
    """A network with another answer: a function of the network and the images."""

    def __init__(
        self, network: nn.Module, answer: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.network, self.answer = network, answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer(self.network, x)


def offset(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits whose differences bfloat16 rounds away."""
    logits: torch.Tensor = network(x)
    return logits + torch.tensor(3000.0).to(logits.dtype)


def branching(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Code that torch cannot trace, since it depends on the images."""
    logits: torch.Tensor = network(x)
    return logits if bool((x >= 0).all()) else -logits


def scaled_when_traced(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Other logits in the traced code."""
    logits: torch.Tensor = network(x)
    return logits if isinstance(x, torch.Tensor) else logits + logits * logits


def failing_when_traced(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Traced code that fails, since it expects a mapping."""
    logits: torch.Tensor = network(x if isinstance(x, torch.Tensor) else x["image"])
    return logits


def members() -> Independent:
    return Independent([network(seed) for seed in range(2)])


def view() -> InBfloat16:
    return InBfloat16(members(), members())


def images(count: int = 64) -> torch.Tensor:
    """Large squares, which a random network tells apart better than noise."""
    squares = torch.rand(count, 3, 2, 2, generator=stream(0, "x")).round()
    return squares.repeat_interleave(10, 2).repeat_interleave(10, 3)


def test_answers_near_a_boundary_are_those_of_single_precision() -> None:
    plain, x = members(), images(400)
    given, exact = view().logits_of(1, x), plain.logits_of(1, x)
    near = gap(exact) < NEAR / 2
    assert near.any()
    assert not near.all()
    torch.testing.assert_close(given[near], exact[near])
    assert torch.equal(given.argmax(1), exact.argmax(1))
    assert not torch.equal(given[~near], exact[~near])
    few = x[: SMALL - 1]
    assert torch.equal(view().logits_of(1, few), plain.logits_of(1, few))


def test_gradients_point_the_same_way() -> None:
    x = images(64).requires_grad_()
    slopes = [
        torch.autograd.grad(victim.logits_of(0, x)[:, 0].sum(), x)[0].flatten(1)
        for victim in (members(), view())
    ]
    # a unit whose input rounds to the other side of 0 changes the slope of a single image
    assert torch.cosine_similarity(slopes[0], slopes[1], dim=1).mean() > 0.98
    assert not torch.equal(slopes[0], slopes[1])


def test_an_attack_returns_points_in_the_precision_of_the_images() -> None:
    x, victim = images(SMALL), view()
    y = members().logits_of(0, x).argmax(1)
    threat = Threat(eps=0.02)
    x_adv = Hinge(steps=5)(victim, x, y, threat, rng=stream(0, "a"))
    assert x_adv.dtype == torch.float32
    right = [
        (victim.logits_of(m, x_adv).argmax(1) == members().logits_of(m, x_adv).argmax(1)).all()
        for m in range(2)
    ]
    assert all(right)


def test_bfloat16_is_taken_on_request_and_warned_of_where_it_differs() -> None:
    x, rounded = images(), Independent([Changed(network(0), offset)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attack_copy("bf16", members(), x) is not None
        for precision in ("auto", "bf16"):
            assert attack_copy(precision, members().double(), x.double()) is None
        assert attack_copy("fp32", members(), x) is None
    with pytest.warns(UserWarning, match="answers differently in bfloat16"):
        assert attack_copy("bf16", rounded, x) is rounded


def test_an_average_near_its_boundary_is_that_of_single_precision() -> None:
    plain, x = Independent([network(2), network(5)]), images(400)
    given, exact = (e.averaged()(x) for e in (InBfloat16(plain, plain), plain))
    members_near = torch.stack([gap(logits) < NEAR for logits in plain.member_logits(x)]).any(0)
    near = (gap(exact) < NEAR / 2) & ~members_near
    assert near.any()
    torch.testing.assert_close(given[near], exact[near])
    assert torch.equal(given.argmax(1), exact.argmax(1))


def normalised(seed: int) -> nn.Module:
    """A convolutional network whose batch norms have statistics and weights of their own."""
    rng = stream(seed, "norms")
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(
        conv(3, 4, 3), BatchNorm2d(4), nn.ReLU(), shared, nn.ReLU(), shared, nn.BatchNorm2d(4),
        nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    for values in net.state_dict().values():
        if values.is_floating_point():
            spread = torch.rand(values.shape, generator=rng) + 0.5 * (values.ndim == 1)
            values.copy_(spread - 0.5 * (values.ndim > 1))
    return net.eval()


@pytest.mark.parametrize("size", [None, 7])
def test_batch_norms_become_part_of_the_convolutions(size: int | None) -> None:
    ensemble = in_batches(Independent([normalised(0), Changed(normalised(1), branching)]), size)
    before = deepcopy(ensemble.state_dict())
    x = images(20).requires_grad_()
    folded = attack_copy("auto", ensemble, x.detach())
    assert folded is not None
    # not the norm behind a convolution with two callers, nor the one behind an activation
    for m, norms in enumerate((2, 4)):
        found = [part for part in folded.member(m).modules() if isinstance(part, nn.BatchNorm2d)]
        assert len(found) == norms
        exact, given = (e.logits_of(m, x) for e in (ensemble, folded))
        torch.testing.assert_close(given, exact, rtol=1e-4, atol=1e-4)
        slopes = [torch.autograd.grad(logits.amax(1).sum(), x)[0] for logits in (exact, given)]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-4)
    assert all(torch.equal(values, before[name]) for name, values in ensemble.state_dict().items())


@pytest.mark.parametrize("answer", [scaled_when_traced, failing_when_traced])
def test_a_copy_that_answers_differently_is_not_used(
    answer: Callable[[nn.Module, torch.Tensor], torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    assert attack_copy("auto", Independent([Changed(network(0), answer)]), images()) is None
    assert capfd.readouterr().err == ""


def test_attacks_that_are_not_aware_and_those_of_users_query_the_ensemble_itself() -> None:
    ensemble, x = Independent([normalised(0)]), images(20)
    copy = attack_copy("auto", ensemble, x)
    subject = Subject(ensemble, x, torch.zeros(20).long(), np.arange(20), "squares", copy=copy)
    exact = ensemble.logits_of(0, x)
    meter = Meter()
    assert torch.equal(subject.metered(meter, aware=False).logits_of(0, x), exact)
    assert torch.equal(subject.metered(meter, foreign=True).logits_of(0, x), exact)
    folded = subject.metered(meter).logits_of(0, x)
    assert not torch.equal(folded, exact)
    torch.testing.assert_close(folded, exact, rtol=1e-4, atol=1e-4)
    assert meter.forwards == 60


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
    assert SUITES["aware"].precision == "auto"
    with pytest.raises(ConfigError, match="precision must be auto, fp32 or bf16, got 'half'"):
        evaluate(members(), (x, y), precision="half")
