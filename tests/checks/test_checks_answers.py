"""Questions asked of a model before its first attack: layouts, batches, modes and derivatives."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from redefense.checks.answers import Answers, check_modes, check_outputs
from redefense.checks.derivative import derivatives_agree
from redefense.checks.victim import before_run
from redefense.ensembles import Independent
from redefense.errors import InputError
from redefense.rng import stream

X = torch.rand(24, 1, 4, 4, generator=stream(0, "images"))
Y = torch.arange(24) % 3


class Net(nn.Module):
    """A network with a hidden layer, and a change to its images and its logits."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x,
                 after: Callable[[Tensor], Tensor] = lambda z: z) -> None:  # fmt: skip
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        rng = stream(0, "weights")
        for p in self.body.parameters():
            nn.init.normal_(p, generator=rng)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(cast(Tensor, self.body(self.before(x))))


class Lie(torch.autograd.Function):
    """The identity, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grads[0]), None


def lying(change: Callable[[Tensor], Tensor]) -> Net:
    return Net(before=lambda x: cast(Tensor, Lie.apply(x, change)))  # type: ignore[no-untyped-call]  # torch's decorator


@pytest.mark.parametrize(
    "change",
    [
        torch.neg,
        torch.ones_like,
        lambda g: torch.randn(g.shape, generator=stream(0, "lie")),
        lambda g: 10 * g,
        lambda g: 0.1 * g,
        lambda g: g * (torch.arange(4) % 2),
        lambda g: g * (torch.arange(4) < 2)[:, None],
    ],
    ids=["reversed", "constant", "random", "too large", "too small", "columns", "upper half"],
)
def test_gradients_that_are_not_those_of_the_answers_are_red(
    change: Callable[[Tensor], Tensor],
) -> None:
    assert derivatives_agree(Independent([lying(change)]), X, Y).passed is False
    # one member of a list is enough
    found = derivatives_agree(Independent([Net(), lying(change)]), X, Y)
    assert found.passed is False
    assert "member 1" in found.detail


SORTED = 0.5 * torch.rand(80, 1, 4, 4, generator=stream(0, "sorted"))
SORTED[-8:, 0, 0, 0] = 1.0  # marks the last of ten classes


def lying_about_the_last_class(change: Callable[[Tensor], Tensor]) -> Net:
    def before(x: Tensor) -> Tensor:
        last = x.detach()[:, :1, :1, :1] > 0.7
        lie: Any = Lie
        return cast(Tensor, lie.apply(x, lambda g: torch.where(last, change(g), g)))

    return Net(before=before)


@pytest.mark.parametrize(
    ("change", "name"), [(torch.neg, "S41"), (lambda g: 10 * g, "S41"), (torch.zeros_like, "S22")],
    ids=["reversed", "too large", "zero"],
)  # fmt: skip
def test_gradients_that_are_wrong_for_one_class_of_sorted_images_are_red(
    change: Callable[[Tensor], Tensor], name: str
) -> None:
    y = torch.arange(80) % 3

    def passed(network: Net) -> bool | None:
        found = before_run(Independent([network]), SORTED, y)
        return next(check.passed for check in found if check.id == name)

    assert passed(lying_about_the_last_class(change)) is False
    assert passed(lying_about_the_last_class(lambda g: g))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_probabilities_of_any_precision_are_no_logits(dtype: torch.dtype) -> None:
    soft = Net(after=lambda z: z.softmax(1).to(dtype).float())
    found = {check.id: check for check in before_run(Independent([Net(), soft]), X, Y)}
    assert found["S07"].passed is False
    assert "members 1 return probabilities" in found["S07"].detail


@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 1e3, 1e6])
def test_honest_gradients_of_logits_of_any_scale_are_green(scale: float) -> None:
    assert derivatives_agree(Independent([Net(after=lambda z: scale * z)]), X, Y).passed
    assert derivatives_agree(Independent([Net(after=lambda z: z + 100)]), X, Y).passed
    half = Net(after=lambda z: z.bfloat16())
    assert derivatives_agree(Independent([half]), X, Y).passed is not False


@pytest.mark.parametrize("levels", [3, 15, 255])
def test_gradients_that_pass_straight_through_rounded_images_are_green(levels: int) -> None:
    rounded = Net(before=lambda x: x + ((x * levels).round() / levels - x).detach())
    assert derivatives_agree(Independent([rounded]), X, Y).passed


def test_a_part_of_the_image_without_a_gradient_is_red() -> None:
    left = torch.arange(4) < 2
    detached = Net(before=lambda x: x * left + (x * ~left).detach())
    found = derivatives_agree(Independent([detached]), X, Y)
    assert found.passed is False
    assert "squared length of the missing part" in found.detail


def test_gradients_that_are_zero_are_not_compared() -> None:
    constant = Net(after=lambda z: z * 0)
    assert derivatives_agree(Independent([constant]), X, Y).passed is None


def test_answers_that_depend_on_the_batch_are_refused() -> None:
    for change in (lambda z: z - z.mean(0), lambda z: z * len(z), lambda z: z.flip(0)):
        with pytest.raises(InputError, match="depends on the other images in its batch"):
            check_outputs(Independent([Net(after=change)]), X, Y)
    unnormed = nn.Sequential(Net(), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(InputError, match="value per channel"):
        check_outputs(Independent([unnormed]), X, Y)


def test_an_active_layer_that_evaluation_would_switch_off_is_refused() -> None:
    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(3)):
        model = Independent([nn.Sequential(Net(), layer)])
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(InputError, match=r"training mode.*call \.eval\(\)"):
            check_modes(model, X)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        check_modes(model.eval(), X)
    # in training mode without a layer that minds it: nothing to say
    check_modes(Independent([Net()]), X)


def test_an_answer_that_depends_on_the_memory_layout_is_red() -> None:
    colours = X.expand(-1, 3, -1, -1) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1)
    x = colours.clone(memory_format=torch.contiguous_format)

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.net(torch.as_strided(x, (len(x), 1, 4, 4), (48, 48, 4, 1))))

    assert Answers.to(Independent([Strided()]), x).elsewhere().passed is False
    plain = Independent([nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3))])
    assert Answers.to(plain, x).elsewhere().passed


@pytest.mark.parametrize("images", [X[:1], X[:1].expand(5, -1, -1, -1)], ids=["one", "equal"])
def test_rounding_between_batches_is_no_difference_for_images_without_a_range(
    images: Tensor,
) -> None:
    rounding = Net(before=lambda x: x * (1 + 1e-6 * len(x)))
    assert Answers.to(Independent([rounding]), images).elsewhere().passed
    rank = Net(after=lambda z: z * (1 + 0.1 * len(z)))
    assert Answers.to(Independent([rank]), images).elsewhere().passed is False


def test_answers_that_change_while_attacks_run_are_red() -> None:
    scale = [1.0]
    asked = Answers.to(Independent([Net(after=lambda z: z * scale[0])]), X)
    assert asked.later().passed
    scale[0] = -math.pi
    assert asked.later().passed is False
