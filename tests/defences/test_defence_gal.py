"""GAL against slow loops from its definition, at its limits, and against the joint graph."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from defence_tools import assert_same, batch, engine_gradients, ensemble, gradients_of, identical
from redefense.defences.gal import GAL, with_noise
from redefense.defences.vanilla import Vanilla
from redefense.errors import ConfigError
from redefense.penalties import gradient_alignment
from redefense.rng import stream

MEMBERS = [2, 3, 8]


@pytest.mark.parametrize("num_members", MEMBERS)
def test_alignment_is_the_log_of_summed_exponentials_of_signed_cosines(num_members: int) -> None:
    g = torch.randn(num_members, 4, 5, dtype=torch.float64, generator=stream(0))
    slow = 0.0
    for b in range(4):
        pairs = itertools.combinations(range(num_members), 2)
        cosines = [
            float(g[i, b] @ g[j, b]) / float(g[i, b].norm() * g[j, b].norm()) for i, j in pairs
        ]
        slow += math.log(sum(math.exp(c) for c in cosines)) / 4
    assert gradient_alignment(g).item() == pytest.approx(slow)


@pytest.mark.parametrize("num_members", MEMBERS)
def test_alignment_of_known_directions(num_members: int) -> None:
    pairs = num_members * (num_members - 1) / 2
    eye = torch.eye(num_members, dtype=torch.float64)[:, None]
    assert gradient_alignment(torch.ones_like(eye)).item() == pytest.approx(math.log(pairs) + 1)
    assert gradient_alignment(eye).item() == pytest.approx(math.log(pairs))
    simplex = eye - 1 / num_members  # M vectors as far apart as M vectors can be
    lowest = math.log(pairs) - 1 / (num_members - 1)
    assert gradient_alignment(simplex).item() == pytest.approx(lowest)


def test_one_member_and_no_image_have_no_alignment() -> None:
    assert gradient_alignment(torch.ones(1, 3, 2)).item() == 0
    assert gradient_alignment(torch.ones(3, 0, 2)).item() == 0


@pytest.mark.parametrize(("preset", "sums"), [("dverge", 1 / 3), ("trs", 1.0)])
def test_terms_are_the_definition(preset: str, sums: float) -> None:
    members, data = ensemble(3), batch()
    found = GAL(preset=preset).terms(members, data.x, data.y)
    grads = []
    for m in range(3):
        x = data.x.clone().requires_grad_()
        loss = F.cross_entropy(members.logits_of(m, x), data.y, reduction="sum")
        grads.append(torch.autograd.grad(loss, x)[0].flatten(1))
    ce = sum(F.cross_entropy(members.logits_of(m, data.x), data.y).item() for m in range(3))
    alignment = gradient_alignment(torch.stack(grads)).item()
    assert found["ce"].item() == pytest.approx(sums * ce)
    assert found["alignment"].item() == pytest.approx(alignment)
    assert found["total"].item() == pytest.approx(sums * ce + 0.5 * alignment)


@pytest.mark.parametrize("model", ["mlp", "digits-cnn"])
@pytest.mark.parametrize("num_members", [1, *MEMBERS])
def test_one_member_at_a_time_gives_the_gradient_of_the_joint_graph(
    num_members: int, model: str
) -> None:
    members, data, gal = ensemble(num_members, model).train(), batch(), GAL(noise=0.0)
    expected = gradients_of(members, lambda: gal.terms(members, data.x, data.y)["total"].backward())
    found, logged = engine_gradients(members, gal, data)
    assert_same(found, expected)
    terms = gal.terms(members, data.x, data.y)
    assert logged == pytest.approx({name: value.item() for name, value in terms.items()})


def test_weight_zero_is_the_plain_ensemble() -> None:
    members, data = ensemble(3), batch()
    found, _ = engine_gradients(members, GAL(preset="trs", weight=0.0), data)
    assert_same(found, engine_gradients(members, Vanilla(), data)[0])


def test_identical_members_are_pushed_apart_from_full_alignment() -> None:
    data = batch()
    terms = GAL().terms(identical(3), data.x, data.y)
    assert terms["alignment"].item() == pytest.approx(math.log(3) + 1)


def test_half_of_the_images_get_noise_of_the_published_size() -> None:
    x = torch.full((4000, 1, 4, 4), 0.5, dtype=torch.float64)
    noise = with_noise(x, 0.045, stream(0)) - x
    noisy = noise.flatten(1).ne(0).any(1)
    assert noisy.double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert noise[noisy].std().item() == pytest.approx(0.045, rel=0.02)
    edge = with_noise(torch.zeros(100, 1, 4, 4), 0.045, stream(0))
    assert float(edge.min()) == 0.0
    assert float(edge.max()) > 0.0


def test_published_constants() -> None:
    assert (GAL().weight, GAL().noise) == (0.5, 0.045)
    assert (GAL(preset="trs").weight, GAL(preset="trs").noise) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "kariyappa"}, "preset must be dverge or trs"),
        ({"weight": -1.0}, "weight must be"),
        ({"noise": math.inf}, "noise must be"),
        ({"differentiate": "fast"}, "exact or finite"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        GAL(**settings)  # type: ignore[arg-type]  # what a user may try
