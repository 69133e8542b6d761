"""Layers that are quick to differentiate twice are torch's own, up to rounding."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.models import build
from redefense.models.double_backward import BatchNorm2d, Conv2d, input_gradients, silu
from redefense.models.resnet import Block

LAST, FIRST = torch.channels_last, torch.contiguous_format


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain(net: nn.Module) -> nn.Module:
    """The same network with torch's layers."""
    for module in net.modules():
        if isinstance(module, Conv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # its base, with its state
        elif isinstance(module, BatchNorm2d):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]  # as above
    return net


def network() -> nn.Module:
    net = build("resnet8", num_classes=5, shape=(3, 8, 8), generator=rng(), width=8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=rng(1))
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=rng(2))
    return net.train()


def penalised(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of a loss that holds the norms of input gradients."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(net(x), torch.arange(len(x)) % 5, reduction="sum")
    with input_gradients():
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + 3 * grad.flatten(1).norm(dim=1).sum()
    return list(torch.autograd.grad(total, list(net.parameters())))


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_penalised_input_gradients_train_as_torch_trains_them(layout: torch.memory_format) -> None:
    x = torch.rand(6, 3, 8, 8, generator=rng(3), dtype=torch.float64)
    ours = network().double().to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    theirs = plain(network().double())
    for mine, other in zip(penalised(ours, x), penalised(theirs, x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_evaluation_with_frozen_weights_has_torchs_second_derivatives(
    layout: torch.memory_format,
) -> None:
    def roughness(net: nn.Module) -> Tensor:
        net.eval().requires_grad_(False)
        x = torch.rand(6, 3, 8, 8, generator=rng(3), dtype=torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    ours = roughness(network().double().to(memory_format=layout))  # type: ignore[call-overload]  # as above
    torch.testing.assert_close(ours, roughness(plain(network().double())), rtol=1e-9, atol=1e-9)


def test_half_precision_is_as_near_to_full_as_torchs_is() -> None:
    x = torch.rand(16, 3, 8, 8, generator=rng(3))

    def error(net: nn.Module) -> float:
        exact = torch.cat([g.flatten() for g in penalised(net, x)])
        with torch.autocast("cpu", torch.bfloat16):
            rounded = torch.cat([g.flatten() for g in penalised(net, x)])
        return float((rounded - exact).norm() / exact.norm())

    assert error(network()) < 1.2 * error(plain(network()))


# channels x images x pixels: a multiple of a row of numbers, and not
@pytest.mark.parametrize("shape", [(2, 3, 3, 2), (8, 2, 4, 16), (3, 1, 2, 2)])
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_batch_norm_has_the_first_two_derivatives(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    layer = BatchNorm2d(shape[1]).double().train()
    x = torch.randn(shape, generator=rng(), dtype=torch.float64).to(memory_format=layout)
    weight = torch.rand(shape[1], generator=rng(1), dtype=torch.float64) + 0.5
    bias = torch.randn(shape[1], generator=rng(2), dtype=torch.float64)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        values = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, values, (x,))  # type: ignore[no-any-return]  # torch returns Any

    _second_derivatives(forward, x, weight, bias, fast_mode=x.numel() > 100)


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_convolution_has_the_first_two_derivatives(stride: int, groups: int) -> None:
    layer = Conv2d(4, 6, 3, stride, padding=1, groups=groups, bias=False).double().train()
    x = torch.randn(2, 4, 3, 3, generator=rng(), dtype=torch.float64)
    weight = torch.randn(layer.weight.shape, generator=rng(1), dtype=torch.float64)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))  # type: ignore[no-any-return]  # as above

    _second_derivatives(forward, x, weight)


def _second_derivatives(
    forward: Callable[..., Tensor], *inputs: Tensor, fast_mode: bool = False
) -> None:
    """Against finite differences: each first derivative differentiated by every input.

    In fast mode along random directions, in place of one number after the other.
    """
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=fast_mode)
    assert torch.autograd.gradgradcheck(forward, inputs, fast_mode=fast_mode)


def test_only_input_gradients_leaves_kernels_alone_and_ends() -> None:
    layer = Conv2d(2, 2, 3, bias=False).train()
    x = torch.rand(1, 2, 4, 4, generator=rng(), requires_grad=True)
    with input_gradients():
        layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("changes", [{"momentum": None}, {"affine": False}])
def test_batch_norm_steps_aside_for_what_it_does_not_know(changes: dict[str, bool | None]) -> None:
    x = torch.randn(4, 3, 2, 2, generator=rng()).requires_grad_()
    ours, theirs = BatchNorm2d(3, **changes), nn.BatchNorm2d(3, **changes)  # type: ignore[arg-type]  # one of either
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.0, atol=0.0)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=0.0, atol=0.0)


def test_evaluation_and_no_grad_are_torchs_to_the_bit() -> None:
    x = torch.rand(3, 8, 6, 6, generator=rng())
    ours, theirs = Block(8, 16, 2, "relu"), Block(8, 16, 2, "relu")
    theirs.load_state_dict(ours.state_dict())
    plain(theirs)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    with torch.no_grad():
        assert torch.equal(ours.train()(x), theirs.train()(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"momentum": None}, {"track_running_stats": False}])
def test_a_frozen_norm_is_known_to_be_affine(changes: dict[str, bool | None]) -> None:
    x = torch.randn(4, 3, 2, 2, generator=rng()).requires_grad_()
    norm = BatchNorm2d(3, **changes).requires_grad_(False).eval()
    (grad,) = torch.autograd.grad(norm(x).sum(), x, create_graph=True)
    assert grad.requires_grad == (not norm.track_running_stats)  # moments of the batch move with x


def test_one_value_a_channel_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        BatchNorm2d(3).train()(torch.rand(1, 3, 1, 1).requires_grad_())


def test_silu_has_torchs_value_and_the_first_two_derivatives() -> None:
    x = (4 * torch.randn(40, generator=rng(), dtype=torch.float64)).requires_grad_()
    assert torch.equal(silu(x), F.silu(x))
    assert torch.autograd.gradcheck(silu, (x,))
    assert torch.autograd.gradgradcheck(silu, (x,))


def test_smooth_networks_train_on_penalised_input_gradients_as_torch_trains_them() -> None:
    x = torch.rand(6, 3, 8, 8, generator=rng(3), dtype=torch.float64)
    ours, theirs = (
        build(
            "resnet8", num_classes=5, shape=(3, 8, 8), generator=rng(), width=8, activation="silu"
        )
        .double()
        .train()
        for _ in range(2)
    )
    for module in plain(theirs).modules():
        if getattr(module, "activation", None) is silu:
            module.activation = F.silu  # type: ignore[assignment]  # a callable, not a module
    for mine, other in zip(penalised(ours, x), penalised(theirs, x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
