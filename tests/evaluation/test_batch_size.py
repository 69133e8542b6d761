"""`batch_size` bounds the images per call of a network, and changes nothing else."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redefense import Stochastic, evaluate
from redefense.attacks import PGD, Hinge, Square, Transfer
from redefense.ensembles import Ensemble, Hyper, Independent
from redefense.ensembles.batches import InBatches
from redefense.errors import ConfigError
from redefense.evaluation.cells import Subject
from redefense.evaluation.inputs.batches import bounded, default_batch_size, in_batches, noise_of
from redefense.evaluation.report_object import Report
from redefense.evaluation.stochastic.batching import rows_per_call
from redefense.models.tiny import digits_cnn
from redefense.rng import seeded, stream

X = torch.rand(19, 1, 6, 6, generator=stream(0, "x"), dtype=torch.float64)
Y = torch.arange(19) % 3


class Net(nn.Module):
    """A smooth network that remembers the largest batch it was called with."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = stream(seed, "net")
        weights = [torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((36, 16), (16, 3))]
        self.a, self.b = (nn.Parameter(w / 4) for w in weights)
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, len(x))
        hidden: Tensor = torch.tanh(x.flatten(1) @ self.a)
        return hidden @ self.b


def run(batch_size: int | None) -> tuple[Report, int]:
    nets = [Net(0).eval(), Net(1).eval()]
    attacks = [PGD(steps=3), Hinge(steps=3), Transfer(attack=PGD(steps=2)), Square(queries=9)]
    report = evaluate(nets, (X, Y), suite=attacks, eps=0.1, batch_size=batch_size, keep_images=True)
    return report, max(net.largest for net in nets)


@pytest.mark.filterwarnings("ignore::redefense.errors.RedCheckWarning")
def test_points_and_figures_are_those_of_undivided_batches_and_no_call_is_larger() -> None:
    (whole, most), (parts, seven) = run(None), run(7)
    assert most >= len(X)
    assert seven == 7
    assert parts.headline == whole.headline
    for one, other in zip(parts.data["cells"], whole.data["cells"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}  # counted passes included
        a, b = (report.adversarial(one["id"]) for report in (parts, whole))
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=1e-9, rtol=0)
    assert parts.data["batch_size"] == 7
    assert whole.data["batch_size"] is None


def test_second_derivatives_pass_through_batches() -> None:
    net = Net(0)
    curved = []
    for network in (net, InBatches(net, 4)):
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        curved.append(torch.autograd.grad(grad.square().sum(), [x, net.a]))
    for one, other in zip(*curved, strict=True):
        assert torch.allclose(one, other, atol=1e-10, rtol=0)


class Noisy(nn.Module):
    """Noise of three generators, each multiplied with the images."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, dtype=x.dtype) + torch.from_numpy(np.random.randn(*x.shape))
        pixels = (x * (noise + random.random())).flatten(1)
        return torch.stack([pixels.sum(1), pixels[:, ::2].sum(1).square()], 1)


def test_the_gradient_belongs_to_the_draw_that_answered() -> None:
    net, found = Noisy(), []
    for batched in (True, False):
        x = X.clone().requires_grad_()
        with seeded(3):
            if batched:
                logits = InBatches(net, 8)(x)
            else:
                logits = torch.cat([net(part) for part in x.split(8)])
        state = torch.get_rng_state(), random.getstate()
        (grad,) = torch.autograd.grad(logits.sum(), x)
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]
        found.append((logits, grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["independent", "hyper"])
def test_members_keep_their_answers_and_mixture(kind: str) -> None:
    members = [
        digits_cnn(num_classes=3, shape=(1, 12, 12), width=16, activation="relu") for _ in range(2)
    ]
    mixture = [0.25, 0.75]
    ensemble: Ensemble = Independent(members, mixture)
    if kind == "hyper":
        ensemble = Hyper(members, mixture, unit=16, embedding=4, hidden=4, rng=stream(0))
    x = X.float().repeat(1, 1, 2, 2)
    divided = in_batches(ensemble.eval(), 5)
    assert torch.allclose(divided.member_logits(x), ensemble.member_logits(x), atol=1e-6)
    assert divided.mixture.tolist() == mixture
    assert not any(part.training for part in divided.modules())


def test_the_default_bounds_values_and_leaves_small_images_undivided() -> None:
    assert default_batch_size((3, 64, 64)) is None
    assert default_batch_size((3, 224, 224)) == 8
    assert default_batch_size((3, 4000, 4000)) == 1


def test_only_where_noise_depends_on_it_is_another_batch_size_refused(tmp_path: Path) -> None:
    for size in (4, 3):
        evaluate(Net(0), (X[:5], Y[:5]), [PGD(steps=1)], out=tmp_path, batch_size=size)
    for model, kept in ((Independent([Net(0)]), {}), (Stochastic(Net(0)), {"batch_size": 4})):
        subject = Subject(model, X, Y, np.arange(len(X)), "given")
        assert noise_of(bounded(subject, 4)) == kept


def test_draws_that_share_a_number_within_divided_calls_are_not_taken_for_several() -> None:
    for size in (1, 2, 15):
        assert rows_per_call(Stochastic(InBatches(Shared(), size)), X) == 0


class Shared(nn.Module):
    """Logits with one random number per call."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] + torch.randn((), dtype=x.dtype) * x.flatten(1)[:, 3:6]


@pytest.mark.parametrize("size", [0, True])
def test_batch_sizes_that_are_none_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
        evaluate(Net(0), (X, Y), batch_size=size)
