"""A network that draws as an ensemble of seeds, and published randomized defences."""

import math
import random
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

import redefense
from redefense.attacks.square import Square
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError, InputError
from redefense.evaluation.stochastic.views import Fresh, InPlace
from redefense.rng import seeded, stream
from redefense.stochastic import (
    ActivationPruning,
    GaussianNoise,
    NoiseLayers,
    ResizeAndPad,
    Stochastic,
    TestTimeDropout,
    seeds_of,
)
from redefense.threat import Threat

X = torch.rand(6, 1, 4, 4, generator=stream(0, "images"))


def linear(classes: int = 3, seed: int = 0) -> nn.Module:
    layer = nn.Linear(16, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, 16, generator=stream(seed, "weight")))
    return nn.Sequential(nn.Flatten(), layer).eval()


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()


class FromAllGenerators(nn.Module):
    """Draws from torch, numpy and Python."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.tensor([float(torch.rand(())), np.random.rand(), random.random()])
        return drawn.expand(len(x), 3)


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "noise": lambda: GaussianNoise(two_layers(), sigma=0.3),
    "layers": lambda: NoiseLayers(two_layers()),
    "dropout": lambda: TestTimeDropout(two_layers()),
    "pruning": lambda: ActivationPruning(two_layers()),
}


def test_a_stochastic_network_is_an_ensemble_of_seeds() -> None:
    network = redefense.Stochastic(FromAllGenerators(), draws=5)
    assert isinstance(network, Ensemble)
    logits = network.member_logits(X)
    assert logits.shape == (5, 6, 3)
    assert torch.equal(logits, network.member_logits(X))
    assert torch.equal(logits[3], network.member(3)(X))
    # every generator is governed: all draws differ in all three columns
    assert all(len(logits[:, 0, c].unique()) == 5 for c in range(3))
    assert torch.allclose(network.averaged()(X).exp(), logits.softmax(-1).mean(0))


def test_generators_are_as_before_after_a_call_and_after_an_error() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3), np.random.rand(3)
            raise RuntimeError("no")

    def numbers(network: nn.Module | None) -> list[float]:
        torch.manual_seed(1), np.random.seed(1)
        if network is not None:
            with suppress(InputError):
                Stochastic(network).logits_of(0, X)
        return [float(torch.rand(())), float(np.random.rand())]

    assert numbers(FromAllGenerators()) == numbers(Fails()) == numbers(None)
    # apart, since the type checks of this test run draw from Python's generator, too
    before = random.getstate()
    with suppress(RuntimeError), seeded(3):
        random.random()
        raise RuntimeError("inside")
    assert random.getstate() == before


def test_streams_of_seeds_are_disjoint_and_named() -> None:
    every = [
        number
        for seed in (0, 1)
        for purpose in ("attack", "select", "score")
        for chunk in (0, 100)
        for number in seeds_of(seed, purpose, 20, chunk)
    ]
    assert len(set(every)) == len(every) == 240
    # a longer list begins with the shorter one: doubling the draws keeps those that were there
    assert seeds_of(0, "attack", 40)[:20] == seeds_of(0, "attack", 20)


def test_fresh_draws_differ_from_each_other_and_repeat_by_their_stream() -> None:
    network = Stochastic(FromAllGenerators(), draws=2)
    view, again = (network.sampled(rng=stream(0, "fresh")) for _ in range(2))
    first, second = view(X), view(X)
    assert not torch.equal(first, second)
    assert torch.equal(again(X), first)
    assert len(first[:, 0].unique()) == 1  # one draw for the whole call
    assert len(network.sampled(rng=stream(0, "fresh"), per="image")(X)[:, 0].unique()) == 6
    # in secret, and never among the members
    assert not torch.equal(network(X), network(X))
    fresh = Fresh(network, 3, stream(0, "step"))
    assert not torch.equal(fresh.logits_of(0, X), fresh.logits_of(0, X))


def test_modes_are_part_of_the_network() -> None:
    model = nn.Sequential(nn.Dropout(0.5), linear())
    model[0].train()
    network = Stochastic(model)
    network.eval()
    assert model[0].training
    assert not model[1].training
    assert not torch.equal(network.logits_of(0, X), network.logits_of(1, X))
    model[0].eval()
    network.train()
    assert not model[0].training
    with pytest.raises(InputError, match=r"batch norm in training mode.*\.eval\(\)"):
        Stochastic(nn.Sequential(nn.BatchNorm2d(1), linear()))
    Stochastic(nn.Sequential(nn.BatchNorm2d(1).eval(), linear()))
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        Stochastic(model, draws=0)


def test_an_image_keeps_its_place_when_the_attack_goes_on_with_fewer() -> None:
    network = Stochastic(GaussianNoise(linear(), sigma=1.0), draws=2)
    view = InPlace(network, X)
    moved = (X + 0.01).clamp(0, 1)
    whole = network.member_logits(moved)
    for rows in ([0, 2, 5], [4], [1, 2, 3, 4, 5]):
        assert torch.equal(view.member_logits(moved[rows]), whole[:, rows])
    assert torch.equal(view.member_logits(moved), whole)
    # gradients reach the rows that were asked, and no copy of an image is lost
    point = moved[[1, 3]].requires_grad_()
    (grad,) = torch.autograd.grad(view.logits_of(0, point).sum(), point)
    assert bool(grad.flatten(1).any(1).all())
    twins = InPlace(network, X[[0, 0, 0, 1]])
    assert twins.member_logits(X[[0, 0, 1]]).shape == (2, 3, 3)


def test_a_black_box_asks_again_before_it_compares() -> None:
    class Slope(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.noise = noise

        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1).sum(1) + self.noise * torch.randn(len(x))
            return torch.stack([z, torch.zeros_like(z)], 1)

    x, y = torch.full((40, 1, 4, 4), 0.5), torch.zeros(40, dtype=torch.long)

    def left(noise: float, reevaluate: bool) -> Tensor:
        victim = Stochastic(Slope(noise)).sampled(rng=stream(0, "victim"))
        attack = Square(queries=100, reevaluate=reevaluate)
        found = attack(victim, x, y, Threat(eps=0.1), rng=stream(0, "square"))
        return found.flatten(1).sum(1)

    # answers that do not change are the same again
    assert torch.equal(left(0.0, True), left(0.0, False))
    assert left(1.0, True).mean() < left(1.0, False).mean() - 0.2


def test_a_vote_is_the_majority_and_abstains_as_the_binomial_test_does() -> None:
    class Coin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = (torch.rand(len(x)) < torch.linspace(0.5, 1, len(x))).double()
            return torch.stack([z, 1 - z], 1)

    network = Stochastic(Coin(), draws=60)
    votes = (network.member_logits(X).argmax(-1) == 0).sum(0)
    shares = network.vote(alpha=0.01)(X)
    for count, row in zip(votes.tolist(), shares, strict=True):
        if binomtest(max(count, 60 - count), 60).pvalue > 0.01:
            assert bool((row == -torch.inf).all())
        else:
            assert row.exp().tolist() == pytest.approx([count / 60, 1 - count / 60])


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_wrappers_draw_and_leave_the_network_as_it_was(name: str) -> None:
    model = WRAPPERS[name]()
    network = Stochastic(model)
    assert not torch.equal(network.logits_of(0, X), network.logits_of(1, X))
    assert torch.equal(network.logits_of(0, X), network.logits_of(0, X))
    inner = model.model
    assert isinstance(inner, nn.Module)
    assert torch.equal(inner(X), two_layers()(X))
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(network.logits_of(0, x).sum(), x)
    assert bool(grad.any())


def test_noise_has_its_deviation_on_a_linear_network() -> None:
    layer, x = linear(), X[:1].expand(4000, -1, -1, -1)
    weight, bias = layer[1].weight, layer[1].bias  # type: ignore[index]  # a Sequential
    mean, deviation = X[0].flatten() @ weight.T + bias, 0.3 * weight.norm(dim=1)
    for model in (GaussianNoise(layer, sigma=0.3), NoiseLayers(layer, first=0.3)):
        z = Stochastic(model).logits_of(0, x)
        assert torch.allclose(z.std(0), deviation, rtol=0.05)
        assert bool(((z.mean(0) - mean).abs() < 5 * deviation / math.sqrt(4000)).all())


def test_dropout_and_pruning_keep_the_mean_of_a_linear_layer() -> None:
    net = two_layers()
    exact, x = net(X[:1]), X[:1].expand(4000, -1, -1, -1)
    for model in (TestTimeDropout(net, p=0.3), ActivationPruning(net, share=0.5)):
        z = Stochastic(model).logits_of(0, x)
        assert bool(((z.mean(0) - exact).abs() < 5 * z.std(0) / math.sqrt(4000)).all())


@pytest.mark.parametrize(
    "wrapper", [GaussianNoise, NoiseLayers, TestTimeDropout, ActivationPruning]
)
def test_a_draw_does_not_depend_on_the_memory_format(
    wrapper: Callable[[nn.Module], nn.Module],
) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 3))
    network, x = wrapper(nn.Sequential(*layers).eval()), torch.rand(5, 3, 6, 6)
    contiguous = Stochastic(network).logits_of(0, x)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch
    last = Stochastic(network).logits_of(0, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, contiguous)


@pytest.mark.parametrize("name", [*WRAPPERS, "many"])
def test_the_noise_of_an_image_does_not_depend_on_other_images(name: str) -> None:
    wrappers = WRAPPERS | {"many": lambda: ActivationPruning(two_layers(), share=2.0)}
    network, other = Stochastic(wrappers[name](), draws=16), X.clone()
    other[[0, 1, 3, 4, 5]] = torch.rand(5, 1, 4, 4, generator=stream(1, "images")).square()
    assert torch.equal(network.member_logits(X)[:, 2], network.member_logits(other)[:, 2])


@pytest.mark.parametrize("draws", [5, 40, 200])
def test_pruning_keeps_as_many_activations_as_draws_with_replacement(draws: int) -> None:
    model = ActivationPruning(two_layers(), share=draws / 100)
    torch.manual_seed(draws)
    kept = model.changed(1, torch.ones(20000, 100)).gt(0).sum(1).double()
    # occupancy of 100 cells by as many balls: mean and variance of the number of cells hit
    none, pair = 0.99**draws, 0.98**draws
    variance = 100 * none + 9900 * pair - 1e4 * none**2
    assert abs(kept.mean() - 100 * (1 - none)) < 5 * math.sqrt(variance / 20000)
    assert abs(kept.var() / variance - 1) < 5 * math.sqrt(2 / 20000)
    assert int(kept.max()) <= draws


def test_resizing_moves_the_image_about_within_its_frame() -> None:
    class Frame(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[2:] == (6, 6)
            lit = x[:, 0] > 0
            return torch.stack([lit.any(2).sum(1), lit.any(1).sum(1)], 1).float()

    network = Stochastic(ResizeAndPad(Frame(), largest=1.5), draws=40)
    sides = network.member_logits(X.clamp_min(0.1))
    assert set(sides.flatten().tolist()) == {4.0, 5.0}
    assert bool((sides == sides[:, :1, :1]).all())  # drawn once a call


def test_wrappers_refuse_what_makes_no_sense() -> None:
    for make, said in (
        (lambda: GaussianNoise(linear(), sigma=-1.0), "sigma must be a number >= 0"),
        (lambda: NoiseLayers(linear(), inner=-1.0), "noise must be a number >= 0"),
        (lambda: TestTimeDropout(linear(), p=1.0), r"p must be a number in \[0, 1\)"),
        (lambda: ActivationPruning(linear(), share=0.0), "share must be a number > 0"),
        (lambda: ResizeAndPad(linear(), largest=0.5), "largest must be a number >= 1"),
        (lambda: TestTimeDropout(nn.Flatten()), "needs a fully connected layer, Flatten has none"),
    ):
        with pytest.raises((ConfigError, InputError), match=said):
            make()
