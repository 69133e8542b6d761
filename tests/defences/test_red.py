"""RED's loss: against slow loops from the equations, and the engine against the definition."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defence_tools import slow_gradients
from redefense.defences.base import Adversary
from redefense.defences.coupled import directional
from redefense.defences.red import RED, WEIGHTS, WITH_ADVERSARIAL_TRAINING
from redefense.ensembles import Independent
from redefense.errors import ConfigError, InputError
from redefense.models import build
from redefense.rng import stream
from redefense.types import Batch

MEMBERS = [2, 3, 5]
PRESETS = ["printed", "released", "calibrated"]
SHAPE = (1, 4, 4)


def ensemble(num_members: int, model: str = "mlp", activation: str = "leaky") -> Independent:
    nets = [
        build(
            model, num_classes=4, shape=SHAPE, width=8, activation=activation,
            generator=stream(0, "member", m),
        ).double()
        for m in range(num_members)
    ]  # fmt: skip
    return Independent(nets)


def batch(size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x, x_adv = (
        torch.rand(size, *SHAPE, dtype=torch.float64, generator=stream(1, name))
        for name in ("x", "x_adv")
    )
    return x, torch.arange(size) % 4, x_adv


def slow_s(g: Sequence[Sequence[Tensor]], images: range) -> float:
    values = [
        abs(float(g[i][b] @ g[j][b]) / max(float(g[i][b].norm() * g[j][b].norm()), 1e-12))
        for i, j in itertools.combinations(range(len(g)), 2)
        for b in images
    ]
    return sum(values) / len(values)


def slow_n(g: Sequence[Sequence[Tensor]]) -> float:
    values = [float(v.norm()) for row in g for v in row]
    return sum(values) / len(values)


def slow_terms(
    preset: str, members: Independent, x: Tensor, y: Tensor, x_adv: Tensor
) -> dict[str, float]:
    """The table of design section 4, written out."""
    size, half, count = len(x), len(x) // 2, members.num_members
    mixed = torch.cat([x[:half], x_adv[half:]])
    g, g_adv, g_mixed = (slow_gradients(members, images, y) for images in (x, x_adv, mixed))
    ce = [
        sum(-members.logits_of(m, x[b : b + 1]).log_softmax(1)[0, y[b]].item() for b in range(size))
        / size
        for m in range(count)
    ]
    everyone = range(size)
    if preset == "printed":
        return {
            "ce": sum(ce) / count,
            "similarity": slow_s(g, everyone) + slow_s(g_adv, everyone),
            "lipschitz": (slow_n(g) + slow_n(g_adv)) / 2,
        }
    if preset == "released":
        squares = [2 * sum(float((v / size).square().sum()) for v in row) / size for row in g_mixed]
        return {
            "ce": sum(ce),
            "similarity": slow_s(g, everyone),
            "lipschitz": sum(squares) / count,
        }
    return {
        "ce": sum(ce) / count,
        "similarity": slow_s(g_mixed, range(half)) + slow_s(g_mixed, range(half, size)),
        "lipschitz": slow_n(g_mixed),
    }


def test_our_penalties_are_lighter_beside_adversarial_training_unless_given() -> None:
    def weights(**settings: Any) -> tuple[float | None, float | None]:
        red = RED(adversarial_training=True, **settings)
        return red.similarity, red.lipschitz

    assert weights() == WITH_ADVERSARIAL_TRAINING < WEIGHTS["calibrated"]
    assert weights(similarity=1.0) == (1.0, WITH_ADVERSARIAL_TRAINING[1])
    assert weights(preset="released") == WEIGHTS["released"]
    assert weights(preset="printed") == WEIGHTS["printed"]


@pytest.mark.parametrize("size", [6, 5])
@pytest.mark.parametrize("num_members", MEMBERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_terms_are_the_equations(preset: str, num_members: int, size: int) -> None:
    members, (x, y, x_adv) = ensemble(num_members), batch(size)
    terms = RED(preset=preset).terms(members, x, y, x_adv)
    expected = slow_terms(preset, members, x, y, x_adv)
    similarity, lipschitz = WEIGHTS[preset]
    expected["total"] = (
        expected["ce"] + similarity * expected["similarity"] + lipschitz * expected["lipschitz"]
    )
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(expected)


def test_the_published_weights_are_ten() -> None:
    assert WEIGHTS["printed"] == WEIGHTS["released"] == (10.0, 10.0)


@pytest.mark.parametrize("model", ["mlp", "digits-cnn"])
def test_repeating_the_batch_changes_nothing(model: str) -> None:
    members, (x, y, x_adv) = ensemble(3, model).train(), batch()
    printed = RED(preset="printed").terms(members, x, y, x_adv)
    twice = RED(preset="printed").terms(
        members, *(t.repeat(2, *[1] * (t.ndim - 1)) for t in (x, y, x_adv))
    )
    torch.testing.assert_close(twice, printed)

    def repeat_halves(t: Tensor) -> Tensor:
        return torch.cat([t[:3], t[:3], t[3:], t[3:]])

    calibrated = RED().terms(members, x, y, x_adv)
    halves = RED().terms(members, *(repeat_halves(t) for t in (x, y, x_adv)))
    torch.testing.assert_close(halves, calibrated)


def test_one_member_has_no_similarity_and_an_odd_image_is_adversarial() -> None:
    x, y, x_adv = batch(1)
    terms = RED().terms(ensemble(1), x, y, x_adv)
    assert terms["similarity"].item() == 0
    alone = slow_gradients(ensemble(1), x_adv, y)
    assert terms["lipschitz"].item() == pytest.approx(slow_n(alone))


def test_identical_members_are_as_similar_as_can_be() -> None:
    (net,) = ensemble(1).members
    x, y, x_adv = batch()
    terms = RED().terms(Independent([net, net, net]), x, y, x_adv)
    assert terms["similarity"].item() == pytest.approx(2)


def test_weights_of_zero_leave_the_cross_entropy() -> None:
    members, (x, y, x_adv) = ensemble(3), batch()
    terms = RED(similarity=0.0, lipschitz=0.0).terms(members, x, y, x_adv)
    assert terms["total"].item() == terms["ce"].item()


def gradients_of(members: nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    members.zero_grad()
    run()
    return {n: p.grad.clone() for n, p in members.named_parameters() if p.grad is not None}


class GivenAdversary(Adversary):
    """Hands out examples made beforehand."""

    def craft(
        self, victim: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator, **_: object
    ) -> Tensor:
        return (x * 0.8 + 0.1).detach()


@pytest.mark.parametrize("model", ["mlp", "digits-cnn"])
@pytest.mark.parametrize("adversarial_training", [False, True])
@pytest.mark.parametrize("num_members", [1, *MEMBERS])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_member_at_a_time_gives_the_gradient_of_the_joint_graph(
    preset: str, num_members: int, adversarial_training: bool, model: str
) -> None:
    members, (x, y, _) = ensemble(num_members, model).train(), batch()
    red = RED(
        preset=preset,
        adversary=GivenAdversary(),
        adversarial_training=adversarial_training,
    )
    made = red.adversary.craft(members, x, y, stream(0))
    x_own = made.expand(num_members, *x.shape) if adversarial_training else None
    logged: dict[str, float] = {}

    def joint() -> None:
        terms = red.terms(members, x, y, made, x_own)
        terms["total"].backward()
        logged.update({k: v.item() for k, v in terms.items()})

    def engine() -> None:
        summed: dict[str, float] = {}
        for part in red.loss(members, Batch(x, y, torch.arange(len(x))), stream(0)):
            part.total.backward()
            for name, value in part.terms.items():
                summed[name] = summed.get(name, 0.0) + value.item()
        assert summed == pytest.approx(logged)

    expected, found = gradients_of(members, joint), gradients_of(members, engine)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_in_half_precision_the_engine_has_the_gradient_of_the_joint_graph_too() -> None:
    members, (x, y, _) = ensemble(3, "digits-cnn").float().train(), batch(32)
    x, red = x.float(), RED(adversary=GivenAdversary())
    made = red.adversary.craft(members, x, y, stream(0))

    def engine() -> None:
        for part in red.loss(members, Batch(x, y, torch.arange(len(x))), stream(0)):
            part.total.backward()

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found = gradients_of(members, engine)
        expected = gradients_of(members, lambda: red.terms(members, x, y, made)["total"].backward())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_finite_difference_is_exact_to_second_order_where_the_loss_is_smooth() -> None:
    # a softmax regression has no kinks; on piecewise linear networks the two differ by design
    members, (x, y, _) = ensemble(1, "linear"), batch()
    v = torch.randn(len(x), x[0].numel(), dtype=torch.float64, generator=stream(3))

    def weight_gradient(value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, list(members.parameters()))
        return torch.cat([g.flatten() for g in grads])

    point = x.clone().requires_grad_()
    loss = F.cross_entropy(members.logits_of(0, point), y, reduction="sum")
    (g,) = torch.autograd.grad(loss, point, create_graph=True)
    exact = weight_gradient((g.flatten(1) * v).sum())
    errors = [
        float((weight_gradient(directional(members, 0, x, y, v, step)) - exact).norm())
        for step in (0.02, 0.01)
    ]
    assert errors[0] < 1e-3 * float(exact.norm())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.01)


def test_finite_differences_serve_the_same_loss() -> None:
    members, (x, y, _) = ensemble(3), batch()
    data = Batch(x, y, torch.arange(len(x)))

    def totals(differentiate: str) -> list[dict[str, float]]:
        red = RED(adversary=GivenAdversary(), differentiate=differentiate)
        parts = list(red.loss(members, data, stream(0)))
        return [{k: v.item() for k, v in part.terms.items()} for part in parts]

    for exact, finite in zip(totals("exact"), totals("finite"), strict=True):
        assert exact == pytest.approx(finite)


def test_batch_norm_remembers_the_cross_entropys_images_alone() -> None:
    x, y, _ = batch()
    trained, plain = (ensemble(2, "digits-cnn").train() for _ in range(2))
    data = Batch(x, y, torch.arange(len(x)))
    for _ in RED(adversary=GivenAdversary()).loss(trained, data, stream(0)):
        pass
    plain.member_logits(x)
    for (name, a), (_, b) in zip(trained.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_training_adversary_stays_in_its_ball_and_leaves_no_trace() -> None:
    members, (x, y, _) = ensemble(2, "digits-cnn").float().train(), batch()
    x = x.float()
    buffers = [b.clone() for b in members.buffers()]
    state = torch.get_rng_state()
    adversary = Adversary(eps=0.1, steps=3, step_size=0.5)
    x_adv = adversary.craft(members.averaged(), x, y, stream(0))
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    assert not torch.equal(x_adv, x)
    assert all(torch.equal(a, b) for a, b in zip(buffers, members.buffers(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in members.parameters())
    assert all(child.training for child in members.modules())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"preset": "best"}, "preset must be printed, released or calibrated"),
        ({"similarity": -1.0}, "similarity must be"),
        ({"differentiate": "fast"}, "exact or finite"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RED(**settings)  # type: ignore[arg-type]  # what a user may try


def test_examples_must_fit_the_images() -> None:
    x, y, x_adv = batch()
    with pytest.raises(InputError, match="shape of x"):
        RED().terms(ensemble(2), x, y, x_adv[:2])
    with pytest.raises(InputError, match="x_own"):
        RED(adversarial_training=True).terms(ensemble(2), x, y, x_adv)
