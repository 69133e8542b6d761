"""Several draws in one call: where copies of an image are independent, and the same figures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import Tensor, nn

import redefense
from redefense.attacks.adaptive import Hinge, MeanProbAPGD
from redefense.config import ThreatConfig
from redefense.ensembles import Independent
from redefense.errors import InputError
from redefense.evaluation.cells import Subject
from redefense.evaluation.report_object import Report
from redefense.evaluation.stochastic.batching import check_alone, rows_per_call
from redefense.evaluation.stochastic.cells import Draws, scored
from redefense.evaluation.stochastic.measure import run_drawn
from redefense.evaluation.stochastic.recognise import check_draws
from redefense.evaluation.stochastic.views import Fresh, InCalls
from redefense.evaluation.suite import CellSpec, Suite
from redefense.results.draws import draws_interval
from redefense.rng import stream
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

X = 0.2 + 0.6 * torch.rand(40, 1, 4, 4, generator=stream(0, "images"))
Y = torch.zeros(40, dtype=torch.long)


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), *layers).eval()


class Shared(nn.Module):
    """Noise, a share of whose variance is drawn once a call."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.network = share, small()

    def forward(self, x: Tensor) -> Tensor:
        common, own = torch.randn_like(x[:1]), torch.randn_like(x)
        noise = self.share**0.5 * common + (1 - self.share) ** 0.5 * own
        answer: Tensor = self.network(x + 0.2 * noise)
        return answer


class Opposite(nn.Module):
    """The second half of a batch gets the negated noise of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, x: Tensor) -> Tensor:
        noise, half = torch.randn_like(x), len(x) // 2
        noise[half : 2 * half] = -noise[:half]
        answer: Tensor = self.network(x + 0.2 * noise)
        return answer


class Plane(nn.Module):
    """Two classes on the sides of a plane through the middle of the box."""

    def forward(self, x: Tensor) -> Tensor:
        z = x.flatten(1).mean(1) - 0.5
        return torch.stack([z, -z], 1)


TOGETHER: dict[str, Callable[[], nn.Module]] = {
    "noise": lambda: GaussianNoise(small(), sigma=0.2),
    "layers": lambda: NoiseLayers(small()),
    "dropout": lambda: TestTimeDropout(small()),
    "pruning": lambda: ActivationPruning(small()),
}
APART: dict[str, Callable[[], nn.Module]] = {
    "size drawn once a call": lambda: ResizeAndPad(small()),
    "a tenth drawn once a call": lambda: Shared(0.1),
    "copies of opposite noise": Opposite,
    "no noise": small,
}


@pytest.mark.parametrize("name", [*TOGETHER, *APART])
def test_draws_share_a_call_only_where_copies_are_independent(name: str) -> None:
    network = Stochastic((TOGETHER | APART)[name]())
    assert rows_per_call(network, X) == (64 * 3072 // 16 if name in TOGETHER else 0)


class Scaled(nn.Module):
    """Noise whose standard deviation is a function of the place in the batch and of its size."""

    def __init__(self, sigma: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.sigma, self.network = sigma, small()

    def forward(self, x: Tensor) -> Tensor:
        sigma = self.sigma(torch.arange(len(x)), len(x)).view(-1, 1, 1, 1)
        answer: Tensor = self.network(x + sigma * torch.randn_like(x))
        return answer


@pytest.mark.parametrize(
    "sigma",
    [
        lambda place, size: 0.5 * (place == 0),
        lambda place, size: 0.5 * (place == size - 1),
        lambda place, size: 0.5 / (size + 0 * place) ** 0.5,
        lambda place, size: 0.1 + 0.4 * (place > 0),
    ],
    ids=["first only", "last only", "less in large batches", "less for the first"],
)
def test_noise_that_depends_on_the_place_or_the_batch_is_refused(
    sigma: Callable[[Tensor, int], Tensor],
) -> None:
    with pytest.raises(InputError, match="alone and in a batch of 32"):
        check_draws(Stochastic(Scaled(sigma)), X)


def test_a_refused_network_leaves_neither_files_nor_folders(tmp_path: Path) -> None:
    model = Scaled(lambda place, size: 0.5 * (place == 0))
    with pytest.raises(InputError, match="alone and in a batch of 32"):
        redefense.evaluate(model, (X, Y), stochastic="on", out=tmp_path / "new" / "one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*TOGETHER, *APART])
def test_draws_of_one_distribution_alone_and_in_a_batch_are_taken(name: str) -> None:
    check_alone(Stochastic((TOGETHER | APART)[name]()), X)
    check_alone(Stochastic((TOGETHER | APART)[name]()), X[:1])


def test_an_ensemble_that_draws_a_member_once_a_call_is_asked_by_separate_calls() -> None:
    torch.manual_seed(1)
    both = Independent([GaussianNoise(small(), sigma=0.2), GaussianNoise(Shared(0.0), sigma=0.2)])
    both.member(1).model.network.load_state_dict(small().state_dict())  # type: ignore[union-attr]  # a module
    with torch.no_grad():
        both.member(1).model.network[-1].weight.mul_(-1)  # type: ignore[union-attr,index]  # a module
    assert rows_per_call(Stochastic(both), X) == 0


def test_resizing_needs_no_fixed_positions_and_noise_does() -> None:
    for model, placed in ((ResizeAndPad(small()), False), (GaussianNoise(small()), True)):
        network = Stochastic(model)
        check_draws(network, X)
        assert network.placed is placed


def together(model: nn.Module, draws: int = 20) -> Stochastic:
    network = Stochastic(model, draws=draws)
    network.rows = 64  # several calls for 40 images
    return network


def test_the_interval_over_draws_covers_the_closed_form() -> None:
    sigma, network = 0.3, together(GaussianNoise(Plane(), sigma=0.3))
    network.rows = 4096
    # the mean of 16 pixels has a quarter of their noise
    truth = ndtr((X.flatten(1).double().mean(1).numpy() - 0.5) / (sigma / 4)).mean()
    # all repetitions as one batch: every copy of an image meets noise of its own
    many, labels = X.repeat(100, 1, 1, 1), Y.repeat(100)
    found = scored(network, many, many, labels, seeds_of(0, "score", 36))["correct"]
    ends = [draws_interval(correct) for correct in np.split(found, 100, axis=1)]
    covered = sum(low <= truth <= high for low, high in ends)
    assert 90 <= covered < 100


def test_an_image_keeps_its_noise_when_the_attack_goes_on_with_fewer() -> None:
    network = together(GaussianNoise(small(), sigma=0.5))
    view, moved = InCalls(network, X), X + 0.01
    whole = view.member_logits(moved)
    assert whole.shape == (20, 40, 3)
    assert len(whole[:, 0, 0].unique()) == 20
    assert len(whole[:, :, 0].unique()) == 800
    for rows in ([0, 2, 5], [39], list(range(1, 40))):
        assert torch.equal(view.member_logits(moved[rows]), whole[:, rows])
        assert torch.equal(view.logits_of(17, moved[rows]), whole[17, rows])


def test_calls_that_compute_no_image_of_the_attack_are_skipped() -> None:
    sizes: list[int] = []

    class Noted(GaussianNoise):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    view = InCalls(together(Noted(small()), draws=16), X)
    view.member_logits(X)
    assert sizes == [64] * 10
    sizes.clear()
    view.member_logits(X[[1, 3, 30]])
    assert sizes == [64] * 2


def test_gradients_are_those_of_each_draw() -> None:
    network = together(NoiseLayers(small()), draws=3)
    view = InCalls(network, X)
    points = [X + 0.01 * k for k in range(3)]
    copies = torch.cat(points).requires_grad_()
    logits = view.logits_of_each(range(3), copies.split(40))
    (found,) = torch.autograd.grad(torch.cat(list(logits))[:, 0].sum(), copies)
    for m, grad in enumerate(found.split(40)):
        point = points[m].clone().requires_grad_()
        (alone,) = torch.autograd.grad(view.logits_of(m, point)[:, 0].sum(), point)
        assert torch.allclose(grad, alone, atol=1e-6)


@pytest.mark.parametrize("attack", [Hinge(steps=10), MeanProbAPGD(steps=10)], ids=repr)
def test_attacks_on_members_of_one_call_are_those_on_members_one_by_one(attack: Hinge) -> None:
    class Each(Independent):
        together = 1

    class AtOnce(Independent):
        together = 2

        def logits_of_each(self, members: Sequence[int], xs: Sequence[Tensor]) -> Sequence[Tensor]:
            calls.append(len(members))
            return super().logits_of_each(members, xs)

    calls: list[int] = []
    torch.manual_seed(3)
    members = [small(), nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), small()]
    threat = Threat(eps=0.05)
    found = [
        attack(kind(members), X, Y, threat, rng=stream(0, "attack")) for kind in (Each, AtOnce)
    ]
    assert torch.equal(found[0], found[1])
    assert calls


def test_an_evaluation_says_what_a_call_computes_and_repeats_to_the_same_bits() -> None:
    short = CellSpec(attack="hinge", view="members", settings={"steps": 8})
    suite = Suite(name="one", cells=(short,))

    def evaluated(model: nn.Module) -> Report:
        network = Stochastic(model, draws=4)
        who = Subject(network, X, Y, np.arange(40), "planes")
        few = Draws(score=32, select=8, attack=4)
        return run_drawn(who, suite, ThreatConfig(eps=0.02), draws=few)

    model = GaussianNoise(Plane(), sigma=0.3)
    first, again = evaluated(model), evaluated(model)
    assert first.data["draws_per_call"] == {"draws": 16, "rows": 64 * 3072 // 16}
    assert first.headline == again.headline
    for name, cell in first.cells.items():
        assert np.array_equal(cell.correct, again.cells[name].correct)
    assert evaluated(Shared(1.0)).data["draws_per_call"] is None
    worst = ndtr((X.flatten(1).double().mean(1).numpy() - 0.52) / (0.3 / 4)).mean()
    low, high = first.headline["aware_interval_draws"]
    assert low <= worst <= high


def test_fresh_draws_of_one_call_come_from_one_seed_of_their_stream() -> None:
    network = together(GaussianNoise(small(), sigma=0.5))
    view, again = (Fresh(network, 20, stream(0, "step")) for _ in range(2))
    first, second = view.member_logits(X), view.member_logits(X)
    assert torch.equal(again.member_logits(X), first)
    assert not (first == second).any()
    assert len(first[:, 0, 0].unique()) == 20
