"""Options of the training engine that every method has: each is what its definition says."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defence_tools import assert_same, batch, engine_gradients, ensemble
from redefense.attacks.gradient import random_starts
from redefense.config import OptimConfig, Run, override
from redefense.data import load_dataset, train_validation
from redefense.defences import DEFENCES, RED, AdversarialTraining, Adversary, Vanilla
from redefense.defences.overfitting import one_step_accuracy, one_step_adversary, overfitted
from redefense.ensembles import Ensemble, Independent
from redefense.errors import ConfigError, Interrupted
from redefense.models.randomized import GaussianNoise, NoiseLayers
from redefense.recipes import recipe
from redefense.rng import seeded, stream
from redefense.threat import Threat
from redefense.train import loop
from redefense.train.experiment import train
from redefense.train.loading import resolve
from redefense.train.optim import WeightAverage, make_optimizer
from redefense.train.session import accuracy

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
        engine_gradients(members, DEFENCES[name](**{**settings, "label_smoothing": s}), data)[0]
        for s in (0.0, 0.2, 0.4)
    )
    assert_same({n: two[n] - plain[n] for n in two}, {n: 2 * (one[n] - plain[n]) for n in one})
    assert max(float((one[n] - plain[n]).abs().max()) for n in one) > 1e-4


@pytest.mark.parametrize("name", ["vanilla", "at"])
def test_smoothed_labels_are_torchs(name: str) -> None:
    members, data = ensemble(1), batch()
    still = Adversary(eps=0.0)
    defence = (
        Vanilla(label_smoothing=0.3)
        if name == "vanilla"
        else AdversarialTraining(variant="joint", adversary=still, label_smoothing=0.3)
    )
    _, logged = engine_gradients(members, defence, data)
    logits = members.logits_of(0, data.x).detach()
    expected = F.cross_entropy(logits, data.y, label_smoothing=0.3)
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


# averages of weights


def small(method: str, *changes: str) -> Run:
    """Two epochs of three steps, with attacks of two."""
    run = recipe(f"digits-{method}")
    few = {"adversary": "adversary.steps=2", "refit_images": "refit_images=16",
           "refit_steps": "refit_steps=2"}  # fmt: skip
    quick = [f"defence.{text}" for key, text in few.items() if key in run.defence]
    size = ["epochs=2", "batch_size=32", "data.images=96", "ensemble.num_members=2"]
    return override(run, [*size, *quick, *changes])


def decays(limit: float, count: int) -> list[float]:
    return [min(limit, (t + 1) / (t + 10)) for t in range(count)]


def averaged_by_hand(states: list[dict[str, Tensor]], limit: float) -> dict[str, Tensor]:
    """The average of states 1, 2, ..., which begins at state 0."""
    found = states[0]
    for decay, state in zip(decays(limit, len(states) - 1), states[1:], strict=True):
        found = {name: decay * found[name] + (1 - decay) * state[name] for name in found}
    return found


def test_averages_are_the_sum_with_the_published_decays() -> None:
    live = {"w": torch.zeros(3)}
    average, values = WeightAverage(live, 0.3), [{"w": torch.zeros(3)}]
    for _ in range(6):
        live["w"].normal_(generator=stream(len(values)))
        values.append({"w": live["w"].clone()})
        average.update()
    torch.testing.assert_close(average.values, averaged_by_hand(values, 0.3))
    assert decays(0.3, 6) == pytest.approx([0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3])


@pytest.mark.parametrize(
    ("method", "changes"),
    [("at", ()), ("ps-red", ()), ("red", ("ensemble.model=digits-cnn", "optim.name=sgd"))],
)
def test_a_run_with_averages_ends_with_those_of_the_run_without(
    method: str, changes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Tensor]] = []
    step = loop.take_step

    def noted(ensemble: Ensemble, *args: Any, **settings: Any) -> dict[str, float]:
        if not states:
            states.append({n: t.clone() for n, t in ensemble.state_dict().items()})
        terms: dict[str, float] = step(ensemble, *args, **settings)
        states.append({n: t.clone() for n, t in ensemble.state_dict().items()})
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", noted)
        train(small(method, *changes), tmp_path / "plain", quiet=True)
    found = train(small(method, *changes, "optim.ema=0.4"), tmp_path / "averaged", quiet=True)
    expected = averaged_by_hand(states, 0.4)
    for name, value in found.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name].to(value.dtype), msg=name)
    assert any(not torch.equal(states[-1][n], t) for n, t in found.state_dict().items())
    logged = [json.loads(s) for s in (tmp_path / "averaged/metrics.jsonl").read_text().splitlines()]
    digits = load_dataset("digits")
    validation = train_validation(digits, 0.1)[1]
    assert logged[-1]["validation_accuracy"] == accuracy(found, validation, 128)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ps-red", ["optim.ema=0.9", "optim.lr=0.01"]),
        ("barre", ["optim.ema=0.9", "optim.lr=0.01"]),
        ("image-noise", []),
        ("layer-noise", ["defence.name=at", "defence.adversary.steps=2"]),
    ],
)
def test_averages_and_noise_are_resumed_to_the_same_bits(
    method: str, changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small(method, *changes)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = train(run, tmp_path / "whole", quiet=True)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator draws on as it was
    torch.manual_seed(2)
    step, taken = loop.take_step, list[int]()

    def stopping(*args: Any, **settings: Any) -> dict[str, float]:
        terms: dict[str, float] = step(*args, **settings)
        taken.append(settings["total"])
        if len(taken) in (2, 3, 5):  # within an epoch and at its end, of the first and the second
            signal.raise_signal(signal.SIGINT)
        return terms

    monkeypatch.setattr(loop, "take_step", stopping)
    for resume in (False, True, True):
        with pytest.raises(Interrupted):
            train(run, tmp_path / "parts", resume=resume, quiet=True)
    parts = train(run, tmp_path / "parts", resume=True, quiet=True)
    assert taken == list(range(6))
    expected = whole.state_dict()
    assert [n for n, t in parts.state_dict().items() if not torch.equal(t, expected[n])] == []


def test_networks_of_the_noise_recipes_draw_as_the_published_wrappers() -> None:
    x = torch.rand(5, 1, 8, 8, generator=stream(0, "images"))
    for method, kind, sigmas in (
        ("image-noise", GaussianNoise, {"sigma": 0.25}),
        ("layer-noise", NoiseLayers, {"first": 0.2, "inner": 0.1}),
    ):
        run = recipe(f"digits-{method}")
        noisy, plain = (
            resolve(which)[1].build(num_classes=10, shape=(1, 8, 8), seed=3).member(0).eval()
            for which in (run, override(run, ["ensemble.noise=none"]))
        )
        assert isinstance(noisy, kind)
        assert all(getattr(noisy, name) == value for name, value in sigmas.items())
        with seeded(7):
            expected = kind(plain, **sigmas)(x)
        with seeded(7):
            assert torch.equal(noisy(x), expected)
        assert not torch.equal(noisy(x), noisy(x))


def test_noise_that_cannot_be_is_refused() -> None:
    for change, said in (
        ("ensemble.sigma=-1", "sigma must be finite and not negative, got -1.0"),
        ("ensemble.noise=salt", "noise"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve(small("image-noise", change))


def test_the_next_stage_meets_the_averaged_member(tmp_path: Path) -> None:
    found = train(small("barre", "optim.ema=0.9", "optim.lr=1e-12"), tmp_path / "run", quiet=True)
    # member 2 starts from member 1 as it ended, and hardly moves
    for a, b in zip(found.parameters_of(0), found.parameters_of(1), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-9)


# adversaries of one step


def test_n_fgsm_steps_by_eps_from_noise_of_twice_eps_and_clips_to_the_images_range() -> None:
    net, data, eps = ensemble(1).member(0), batch(), 0.1
    adversary = Adversary(attack="n-fgsm", eps=eps, steps=1, step_size=1.0)
    found = adversary.craft(net, data.x, data.y, stream(0, "n-fgsm"))
    noisy = random_starts(data.x, data.y, Threat(eps=2 * eps), stream(0, "n-fgsm"))()
    assert 1.8 * eps < float((noisy - data.x).abs().max()) <= 2 * eps + 1e-12
    noisy.requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(noisy), data.y), noisy)
    expected = (noisy + eps * grad.sign()).clamp(0, 1).detach()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    assert float((found - data.x).abs().max()) > 2 * eps


def test_n_fgsm_takes_one_step() -> None:
    with pytest.raises(ConfigError, match=r"set adversary.steps=1 .* got 10 and 0.25"):
        Adversary(attack="n-fgsm")


@pytest.mark.parametrize("method", ["at", "red", "mrboost", "barre", "dverge-at", "adp-at"])
def test_methods_with_an_adversary_can_have_n_fgsm(method: str, tmp_path: Path) -> None:
    changes = [f"defence.adversary.{s}" for s in ("attack=n-fgsm", "steps=1", "step_size=1")]
    train(small(method, *changes, "ensemble.model=mlp"), tmp_path / "run", quiet=True)
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert ("pgd_accuracy" in record) == (method != "red")  # which learns from clean images


class Pocket(nn.Module):
    """Errs where an image's mean lies within 0.1 of the middle of the range, and there alone."""

    def forward(self, x: Tensor) -> Tensor:
        height = x.flatten(1).mean(1)
        return torch.stack([0 * height, 0.1 - (height - 0.5).abs()], 1)


def test_overfitting_is_seen_where_pgd_finds_what_one_step_does_not() -> None:
    pair = Independent([Pocket(), Pocket()])
    # the ball reaches up to 0.45, its random points stay far below
    x, y = torch.full((4, 1, 8, 8), 0.15), torch.zeros(4, dtype=torch.int64)
    weak = Adversary(eps=0.3, steps=1, step_size=1e-3)
    found = one_step_accuracy(pair, weak, x, y, 0)
    assert found == {"one_step_accuracy": 1.0, "pgd_accuracy": 0.0}
    assert "100.0 % under the one-step" in overfitted(found)
    found = {"one_step_accuracy": 0.4, "pgd_accuracy": 0.19}
    assert "catastrophic overfitting" in overfitted(found)
    assert overfitted({**found, "pgd_accuracy": 0.21}) == ""


def test_only_one_step_adversaries_that_are_trained_on_are_watched() -> None:
    one = Adversary(steps=1)
    assert one_step_adversary(AdversarialTraining(adversary=one)) is one
    assert one_step_adversary(AdversarialTraining()) is None
    assert one_step_adversary(RED(adversary=one)) is None
    assert one_step_adversary(RED(adversary=one, adversarial_training=True)) is one
    assert one_step_adversary(Vanilla()) is None
