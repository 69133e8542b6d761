"""Options of the training engine that every method has: each is what its definition says."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defence_tools import assert_same, batch, engine_gradients, ensemble
from redefense.config import OptimConfig, override
from redefense.defences import DEFENCES, Adversary
from redefense.errors import ConfigError
from redefense.recipes import recipe
from redefense.train.loading import resolve
from redefense.train.optim import make_optimizer

METHODS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in DEFENCES),
    *(("at", {"variant": variant}) for variant in ("independent", "joint")),
    ("red", {"preset": "released", "differentiate": "finite"}),
    ("red", {"adversarial_training": True}),
    ("dverge", {"adversarial_training": True}),
]


@pytest.mark.parametrize(("name", "settings"), METHODS)
def test_the_loss_is_linear_in_label_smoothing(name: str, settings: dict[str, Any]) -> None:
    members, data = ensemble(2), batch()
    plain, one, two = (
        engine_gradients(members, DEFENCES[name](label_smoothing=s, **settings), data)[0]
        for s in (0.0, 0.2, 0.4)
    )
    assert_same({n: two[n] - plain[n] for n in two}, {n: 2 * (one[n] - plain[n]) for n in one})
    assert max(float((one[n] - plain[n]).abs().max()) for n in one) > 1e-4


@pytest.mark.parametrize("name", ["vanilla", "at"])
def test_smoothed_labels_are_torchs(name: str) -> None:
    members, data = ensemble(1), batch()
    settings: dict[str, Any] = {"variant": "joint"} if name == "at" else {}
    if name == "at":
        settings["adversary"] = Adversary(eps=0.0)
    _, logged = engine_gradients(members, DEFENCES[name](label_smoothing=0.3, **settings), data)
    expected = F.cross_entropy(members.logits_of(0, data.x), data.y, label_smoothing=0.3)
    assert logged["ce"] == pytest.approx(float(expected), rel=1e-12)


def test_label_smoothing_must_be_a_share() -> None:
    run = override(recipe("digits-red"), ["defence.label_smoothing=0.1"])
    with pytest.raises(ConfigError, match=r"defence.label_smoothing: .*less than 1, got 1.0"):
        resolve(override(run, ["defence.label_smoothing=1.0"]))


def trained(config: OptimConfig, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A matrix and a vector of ones after steps along given gradients."""
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    optimizer = make_optimizer(params, config)
    for gradient in gradients:
        for p in params:
            p.grad = gradient.expand_as(p).clone()
        optimizer.step()
    return params[0].detach(), params[1].detach()


def test_nesterov_looks_ahead_along_the_momentum() -> None:
    lr, mu = 0.1, 0.5
    config = OptimConfig(lr=lr, momentum=mu, nesterov=True, weight_decay=0.0)
    found, _ = trained(config, [torch.tensor(1.0), torch.tensor(2.0)])
    velocity = [1.0, mu * 1.0 + 2.0]
    steps = [1.0 + mu * velocity[0], 2.0 + mu * velocity[1]]
    torch.testing.assert_close(found, torch.full((2, 2), 1 - lr * sum(steps)))


@pytest.mark.parametrize("settings", ["optim.momentum=0", "optim.name=adam"])
def test_nesterov_without_momentum_is_refused(settings: str) -> None:
    with pytest.raises(ConfigError, match="nesterov needs name=sgd and a positive momentum"):
        override(recipe("cifar10-mini-red"), ["optim.nesterov=true", settings])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weight_decay_leaves_norms_and_biases_alone(name: str) -> None:
    settings: dict[str, Any] = {"name": name, "lr": 0.1, "weight_decay": 0.5}
    still = [torch.tensor(0.0)] * 2
    whole = trained(OptimConfig(**settings), still)
    matrix, vector = trained(OptimConfig(**settings, decay_norms_and_biases=False), still)
    assert torch.equal(matrix, whole[0])
    assert float(matrix.max()) < 1
    assert float(whole[1].max()) < 1
    assert torch.equal(vector, torch.ones(2))


def test_weight_decay_spares_all_norms_and_biases_of_a_network() -> None:
    members = ensemble(1, "digits-cnn")
    config = OptimConfig(decay_norms_and_biases=False, weight_decay=0.5)
    decayed, spared = make_optimizer(list(members.parameters()), config).param_groups
    layers = dict(members.named_modules())
    for name, p in members.named_parameters():
        layer, _, kind = name.rpartition(".")
        norm_or_bias = isinstance(layers[layer], nn.BatchNorm2d) or kind == "bias"
        assert any(p is q for q in (spared if norm_or_bias else decayed)["params"])
    assert spared["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.5
