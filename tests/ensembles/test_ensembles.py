"""Ensembles and their views, held to closed forms and to one another."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.ensembles import (
    Ensemble,
    Independent,
    as_ensemble,
    evaluating,
    frozen_statistics,
    frozen_weights,
    logits_of_drawn,
    mean_log_probs,
)
from redefense.errors import ConfigError, InputError
from redefense.models import build
from redefense.rng import stream
from redefense.train.loading import load
from redefense.types import Per


class Constant(nn.Module):
    """Gives the same logits to every image, and counts the images it has seen."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float64)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.logits.expand(len(x), -1)


def grey(count: int) -> Tensor:
    return torch.full((count, 1, 2, 2), 0.5)


def networks(count: int) -> list[nn.Module]:
    return [
        build("mlp", num_classes=4, shape=(1, 3, 3), generator=stream(0, m)).eval()
        for m in range(count)
    ]


def test_the_average_is_the_mixture_of_probabilities() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64, generator=stream(0))
    mixture = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expected = torch.einsum("m,mbc->bc", mixture, logits.softmax(-1))
    torch.testing.assert_close(mean_log_probs(logits, mixture).exp(), expected)


def test_the_average_is_finite_for_enormous_logits_and_sums_to_one() -> None:
    logits = 1e4 * torch.randn(3, 5, 4, generator=stream(0))
    mean = mean_log_probs(logits, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert bool(mean.isfinite().all())
    torch.testing.assert_close(mean.exp().sum(-1), torch.ones(5))


def test_members_that_never_answer_leave_no_trace_in_the_average_or_its_gradient() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=stream(0)).requires_grad_()
    mean = mean_log_probs(logits, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(mean, logits[0].log_softmax(-1))
    (grad,) = torch.autograd.grad(mean[:, 0].sum(), logits)
    assert bool(grad.isfinite().all())
    assert bool((grad[1] == 0).all())


def test_one_member_is_that_member_in_every_view() -> None:
    (net,) = networks(1)
    ensemble, x = Independent([net]), torch.rand(6, 1, 3, 3, generator=stream(1))
    expected = net(x)
    for view in (ensemble, ensemble.sampled(), ensemble.sampled(per="image"), ensemble.member(0)):
        assert torch.equal(view(x), expected)
    torch.testing.assert_close(ensemble.averaged()(x), expected.log_softmax(-1))


def test_permuting_members_permutes_logits_and_leaves_the_average() -> None:
    nets, x = networks(3), torch.rand(6, 1, 3, 3, generator=stream(1))
    ensemble = Independent(nets, [0.2, 0.5, 0.3])
    turned = Independent([nets[2], nets[0], nets[1]], [0.3, 0.2, 0.5])
    assert torch.equal(turned.member_logits(x), ensemble.member_logits(x)[[2, 0, 1]])
    torch.testing.assert_close(turned.averaged()(x), ensemble.averaged()(x))


def test_per_image_sampling_gives_each_image_its_own_member_at_the_work_of_one() -> None:
    members = [Constant(*F.one_hot(torch.tensor(m), 3).tolist()) for m in range(3)]
    ensemble = Independent(members, [0.5, 0.3, 0.2])
    n = 3000
    answers = ensemble.sampled(rng=stream(0), per="image")(grey(n)).argmax(-1)
    assert sum(member.seen for member in members) == n
    shares = answers.bincount(minlength=3).double() / n
    probs = torch.tensor([0.5, 0.3, 0.2]).double()
    assert bool(((shares - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt()).all())


def test_per_call_sampling_answers_a_batch_with_one_member_and_redraws_every_call() -> None:
    members = [Constant(1.0, 0.0), Constant(0.0, 1.0)]
    view = Independent(members).sampled(rng=stream(0))
    answers = [view(grey(4)).argmax(-1) for _ in range(40)]
    assert all(len(set(a.tolist())) == 1 for a in answers)
    assert {int(a[0]) for a in answers} == {0, 1}


def test_answers_of_drawn_members_come_back_in_the_order_of_the_images() -> None:
    ensemble, x = Independent(networks(3)), torch.rand(7, 1, 3, 3, generator=stream(2))
    drawn = torch.tensor([2, 0, 1, 1, 2, 0, 2])
    expected = torch.stack(
        [ensemble.logits_of(int(m), x[i : i + 1])[0] for i, m in enumerate(drawn)]
    )
    torch.testing.assert_close(logits_of_drawn(ensemble, x, drawn), expected)


def test_padded_groups_have_few_sizes_and_give_the_same_answers() -> None:
    ensemble = Independent(networks(3)).eval()
    sizes = set()
    for count in range(1, 40):
        x = torch.rand(count, 1, 3, 3, generator=stream(count))
        drawn = torch.randint(3, (count,), generator=stream(count, "drawn"))
        handles = [
            net.register_forward_hook(lambda net, given, out: sizes.add(len(out)))
            for net in ensemble.members
        ]
        found = logits_of_drawn(ensemble, x, drawn, padded=True)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(found, logits_of_drawn(ensemble, x, drawn))
    assert sizes <= {1, 2, 3, 4, 6, 8, 12, 16, 24}


def test_sampling_is_fresh_without_a_seed_and_repeats_with_one() -> None:
    ensemble = Independent([Constant(1.0, 0.0), Constant(0.0, 1.0)])
    seeded = [ensemble.sampled(rng=stream(5), per="image")(grey(64)) for _ in range(2)]
    assert torch.equal(*seeded)
    assert not torch.equal(ensemble(grey(64)), ensemble(grey(64)))


def test_sampled_accuracy_approaches_the_exact_one() -> None:
    # member 0 and 2 are right; exact accuracy 0.5 + 0.2
    members = [Constant(1.0, 0.0), Constant(0.0, 1.0), Constant(1.0, 0.0)]
    ensemble, n = Independent(members, [0.5, 0.3, 0.2]), 100_000
    sampled = (ensemble(grey(n)).argmax(-1) == 0).double().mean()
    assert abs(float(sampled) - 0.7) < 4 * math.sqrt(0.7 * 0.3 / n)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.rand(1, 2, 2), "shape"),
        (torch.zeros(0, 1, 2, 2), "shape"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "dtype"),
        (torch.full((1, 1, 2, 2), 1.5), "1.5"),
        (torch.full((1, 1, 2, 2), -0.25), "-0.25"),
        (torch.full((1, 1, 2, 2), math.nan), "nan"),
        (torch.full((1, 1, 2, 2), math.inf), "inf"),
    ],
)
def test_calling_an_ensemble_refuses_what_is_not_an_image(x: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Independent([Constant(1.0)]).forward(x)


def test_calling_an_ensemble_names_the_shape_that_its_members_cannot_take() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"cannot take images of \(1, 3, 3\)"):
        Independent([linear])(torch.rand(2, 1, 3, 3))
    trained = load(Path(__file__).parents[1] / "fixtures" / "format-1" / "finished")
    trained(torch.rand(2, 1, 8, 8))
    # members that average over all pixels would answer this one
    with pytest.raises(InputError, match=r"must be \(1, 8, 8\) as in training, got \(1, 9, 9\)"):
        trained(torch.rand(2, 1, 9, 9))


@pytest.mark.parametrize(
    ("mixture", "says"),
    [([0.5], "each of 2"), ([0.7, 0.7], "sum to 1"), ([1.5, -0.5], "sum to 1")],
)
def test_a_mixture_must_be_a_distribution_over_the_members(mixture: list[float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Independent([Constant(1.0), Constant(2.0)], mixture)


def test_an_ensemble_needs_members() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Independent([])


def test_networks_and_lists_become_ensembles() -> None:
    ensemble = Independent([Constant(1.0), Constant(2.0)])
    assert as_ensemble(ensemble) is ensemble
    assert as_ensemble(Constant(1.0)).num_members == 1
    assert as_ensemble([Constant(1.0), Constant(2.0)]).num_members == 2
    # on every Python: one that misses the mixture, a buffer, would attack a single random network
    assert isinstance(ensemble, Ensemble)
    assert not isinstance(Constant(1.0), Ensemble)
    with pytest.raises(InputError, match="got str"):
        as_ensemble("resnet8")
    with pytest.raises(InputError, match="got str as element 1"):
        as_ensemble([Constant(1.0), "resnet8"])


def test_half_an_ensemble_is_no_single_network() -> None:
    class Gated(Constant):
        mixture = torch.ones(2)

    class Half(Gated):
        def logits_of(self, m: int, x: Tensor) -> Tensor:
            return x.flatten(1)

    with pytest.raises(InputError, match="Half has mixture and logits_of as ensembles do"):
        as_ensemble(Half(1.0))
    assert as_ensemble([Half(1.0)]).num_members == as_ensemble(Gated(1.0)).num_members == 1


def test_what_is_derived_from_the_protocol_is_asked_for_as_any_class_is() -> None:
    class Mine(Ensemble):
        pass

    assert not isinstance(Independent([Constant(1.0)]), Mine)


def test_modes_and_flags_come_back_as_they_were() -> None:
    net = build("digits-cnn", num_classes=3, shape=(1, 8, 8), generator=stream(0)).train()
    frozen_layer = next(net.children())
    frozen_layer.eval()
    before = [child.training for child in net.modules()]
    parameter = next(net.parameters())
    parameter.requires_grad_(False)
    with evaluating(net), frozen_weights(net):
        assert not any(child.training for child in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
    assert [child.training for child in net.modules()] == before
    assert [p.requires_grad for p in net.parameters()].count(False) == 1


def test_frozen_statistics_use_the_batch_and_remember_nothing() -> None:
    net = build("digits-cnn", num_classes=3, shape=(1, 8, 8), generator=stream(0)).train()
    x = torch.rand(8, 1, 8, 8, generator=stream(1))
    buffers = [b.clone() for b in net.buffers()]
    with frozen_statistics(net):
        inside = net(x)
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))
    torch.testing.assert_close(inside, net(x))
    assert not all(torch.equal(a, b) for a, b in zip(buffers, net.buffers(), strict=True))


def test_training_some_members_leaves_the_others_in_evaluation_mode() -> None:
    ensemble = Independent(networks(3))
    ensemble.train_members((0, 2))
    assert [ensemble.member(m).training for m in range(3)] == [True, False, True]


@pytest.mark.parametrize("per", ["call", "image"])
def test_no_images_have_no_answers(per: Per) -> None:
    ensemble = Independent(networks(2))
    some = torch.rand(2, 1, 3, 3)
    for view in (ensemble.sampled(per=per), ensemble.averaged()):
        assert view(some[:0]).shape == (0, view(some).shape[1])


@pytest.mark.parametrize("mixture", [None, [0.3, 0.7]])
def test_an_empty_batch_of_a_fresh_draw_has_no_answers(mixture: list[float] | None) -> None:
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)]
    view = Independent(nets, mixture).eval().sampled(per="image")
    assert view(torch.zeros(0, 1, 2, 2)).shape == (0, 3)
