"""Convolution and batch norm with a fast double backward.

Penalties on input gradients differentiate the backward pass once more. Torch composes that second
derivative from dozens of passes over memory, more than all convolutions cost together; here each
layer has a closed form. Values and gradients are torch's, up to rounding.

With x^ = (x - mu) r the normalised input, m(.) the mean over images and pixels of a channel, gy the
gradient of the output and w the scale, batch norm's backward pass is

    gx = w r (gy - m(gy) - x^ m(gy x^)),

symmetric in the sense that <a, gx(gy)> = <gx(a), gy>. With A = m(a x^), G = m(gy x^) and
C = m(a gy) - m(a) m(gy), the derivatives of <a, gx> are

    by gy:  gx(a)
    by w:   N r (C - A G)
    by x:   -w r^2 ((a - m(a)) G + (gy - m(gy)) A + x^ (C - 3 A G)).

These layers have the names and the state of torch's. They call torch's where no gradient is needed
and for unsupported options, and for batch norm in evaluation mode unless its weights are frozen,
where it is a scale and a shift.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx, once_differentiable

_aten = torch.ops.aten
ROW: Final = 1024
"""Row length in channels-last layout: long enough for vector instructions for any C."""

_inputs_only = False


@contextmanager
def input_gradients() -> Iterator[None]:
    """Context in which backward passes compute gradients of images only, not of kernels.

    `autograd.grad(loss, images)` skips unneeded gradients, but a `Function` does not know which are
    needed. One flag for all threads: an accelerator's backward pass runs in another thread.
    """
    global _inputs_only
    before, _inputs_only = _inputs_only, True
    try:
        yield
    finally:
        _inputs_only = before


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with a second derivative of three convolutions."""

    def forward(self, input: Tensor) -> Tensor:
        simple = self.bias is None and self.padding_mode == "zeros"
        if not (simple and _differentiates(self, input)):
            return super().forward(input)
        x, weight = input, self.weight
        # autocast does not reach into a `Function`
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        sizes = (self.stride, self.padding, self.dilation, self.groups)
        return cast(Tensor, _apply(_Convolution, x, weight, sizes))


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the second derivative of the module's text, in two fused passes.

    Attributes:
        zero: (C,) zeros, the mean and shift of the backward pass with frozen weights. Creating them
            there would be a tenth of the operations of an attack.
    """

    zero: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("zero", torch.zeros(self.num_features), persistent=False)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "zero" in self._buffers:  # not yet when torch's constructor calls this
            self.zero.zero_()  # a layer created on the meta device has uninitialised memory

    def forward(self, input: Tensor) -> Tensor:
        # torch's layer raises for a single value per channel, and knows momentum None
        known = self.affine and self.momentum is not None and input.numel() > input.shape[1]
        if not self.training and self._is_frozen() and _differentiates(self, input):
            state = (self.weight, self.bias, self.running_mean, self.running_var, self.zero)
            return cast(Tensor, _apply(_FrozenNorm, input, state, self.eps))
        if not (known and self.training and torch.is_grad_enabled()):
            return super().forward(input)
        running: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.track_running_stats:
            cast(Tensor, self.num_batches_tracked).add_(1)
            running = (self.running_mean, self.running_var)
        settings = (self.momentum, self.eps)
        y, *_ = _apply(_BatchNorm, input, self.weight, self.bias, running, settings)
        return cast(Tensor, y)

    def _is_frozen(self) -> bool:
        """Whether scale, shift and moments are constants, and only images need a gradient."""
        constant = self.affine and not (self.weight.requires_grad or self.bias.requires_grad)
        return constant and self.running_mean is not None


def silu(x: Tensor) -> Tensor:
    """`F.silu`, x s(x) with s the sigmoid, with a second derivative in one expression."""
    return cast(Tensor, _apply(_SiLU, x)) if x.requires_grad else F.silu(x)


def _apply(function: type[Function], *args: object) -> Any:
    return function.apply(*args)


def _differentiates(layer: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (layer.training or x.requires_grad)


def _convolution_backward(
    gy: Tensor, x: Tensor, weight: Tensor, sizes: tuple[Any, ...], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = sizes
    outputs = _aten.convolution_backward(
        gy, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False)
    )
    return cast(tuple[Tensor | None, Tensor | None], outputs[:2])


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return torch.conv2d(x, weight, None, *sizes)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not _inputs_only)
        return (*_apply(_ConvolutionBackward, gy, x, weight, ctx.sizes, wanted), None)


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        weight: Tensor,
        sizes: tuple[Any, ...],
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(gy, x, weight)
        ctx.sizes = sizes
        ctx.set_materialize_grads(False)
        return _convolution_backward(gy, x, weight, sizes, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, a: Tensor | None, b: Tensor | None) -> Any:
        """Derivatives of <a, gx> + <b, gw>; both are bilinear in gy and the other factor."""
        gy, x, weight = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub lacks it
        sizes = ctx.sizes  # type: ignore[attr-defined]  # set in forward
        need_gy, need_x, need_weight = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]  # as above
        by_gy = by_x = by_weight = None
        if a is not None:
            by_gy = torch.conv2d(a, weight, None, *sizes) if need_gy else None
            by_weight = _convolution_backward(gy, a, weight, sizes, (False, need_weight))[1]
        if b is not None:
            more = torch.conv2d(x, b, None, *sizes)
            by_gy = more if by_gy is None else by_gy + more
            by_x = _convolution_backward(gy, x, b, sizes, (need_x, False))[0]
        return by_gy, by_x, by_weight, None, None


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        settings: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        momentum, eps = settings
        y, mu, r = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mu, r)
        ctx.eps = eps
        ctx.mark_non_differentiable(mu, r)
        ctx.set_materialize_grads(False)  # or zeros would be made for mu and r
        return y, mu, r

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, *_: Any) -> Any:
        if gy is None:
            return None, None, None, None, None
        x, weight, mu, r = ctx.saved_tensors
        return (*_apply(_BatchNormBackward, gy, x, weight, mu, r, ctx.eps), None, None)


def _pull(
    gy: Tensor, x: Tensor, weight: Tensor, mu: Tensor, r: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """gx, and the sums over a channel of gy x^ and gy."""
    outputs = _aten.native_batch_norm_backward(
        gy, x, weight, None, None, mu, r, True, eps, (True, True, True)
    )
    return cast(tuple[Tensor, Tensor, Tensor], outputs)


class _BatchNormBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, weight: Tensor, mu: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, gw, gb = _pull(gy, x, weight, mu, r, eps)
        ctx.save_for_backward(gy, x, weight, mu, r, gw, gb)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return gx, gw, gb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> Any:
        """Derivatives of <a, gx> + <b, gw> + <c, gb>."""
        gy, x, weight, mu, r, gw, gb = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        by_gy = by_x = by_weight = None
        if a is not None:
            by_gy, a_sum_x, a_sum = _pull(a, x, weight, mu, r, ctx.eps)
            # A, G, m(a) and m(gy) of the text: gw and gb are the sums that the first pass made
            # anyway
            big_a, big_g, mean_a, mean_g = (t / count for t in (a_sum_x, gw, a_sum, gb))
            # a sum over a batch of half-precision pixels would overflow or lose its small terms
            wide = torch.promote_types(x.dtype, torch.float32)
            big_c = (a * gy).sum((0, 2, 3), dtype=wide) / count - mean_a * mean_g
            by_weight = (count * r * (big_c - big_a * big_g)).to(weight.dtype)
            k = -weight * r.square()
            of_x = k * r * (big_c - 3 * big_a * big_g)
            # the means and mu are constants of a channel: one offset, so three passes over memory
            # suffice
            constant = -(k * (mean_a * big_g + mean_g * big_a) + of_x * mu)
            by_x = _combine(((a, k * big_g), (gy, k * big_a), (x, of_x)), constant)
        if b is not None:
            # gw = sum of gy x^, its derivative in x is batch norm's, with b as the scale
            x_part = _pull(gy, x, b.to(weight.dtype), mu, r, ctx.eps)[0]
            by_x = x_part if by_x is None else by_x + x_part
            gy_part = _combine(((x, b * r),), -b * r * mu)
            by_gy = gy_part if by_gy is None else by_gy + gy_part
        if c is not None:
            ones = c.to(x.dtype)[:, None, None].expand_as(x)
            by_gy = ones if by_gy is None else by_gy + ones
        return by_gy, by_x, by_weight, None, None, None


class _FrozenNorm(Function):
    """Batch norm of constants: its backward pass is itself, without the shift and the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: tuple[Tensor, ...], eps: float) -> Tensor:
        weight, bias, mean, var, zero = state
        ctx.state, ctx.eps = (weight, zero, zero, var, zero), eps
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        return _apply(_FrozenNorm, gy, ctx.state, ctx.eps), None, None


class _SiLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        return _apply(_SiLUBackward, gy, *ctx.saved_tensors)


class _SiLUBackward(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gy, x)
        return cast(Tensor, _aten.silu_backward(gy, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a: Tensor) -> Any:
        """Derivatives of <a, gy f'(x)>, where f'' = s (1 - s) (2 + x (1 - 2 s))."""
        gy, x = ctx.saved_tensors
        s = x.sigmoid()
        # in place on own memory: this layer is bound by memory, not by arithmetic
        bend = torch.addcmul(x, x, s, value=-2).add_(2).mul_(s).mul_(s.neg_().add_(1))
        return _aten.silu_backward(a, x), bend.mul_(gy).mul_(a)


def _combine(parts: tuple[tuple[Tensor, Tensor], ...], constant: Tensor) -> Tensor:
    """Sum of (B, C, H, W) tensors times per-channel factors, plus a per-channel offset.

    In channels-last layout rows of few channels are too short for vector instructions (15 times
    slower): rows then hold several pixels, and the factors are repeated.
    """
    first = parts[0][0]
    channels = first.shape[1]
    rows = max(1, ROW // channels)
    flat = (
        first.numel() % (rows * channels) == 0
        and channels > 1
        and all(t.is_contiguous(memory_format=torch.channels_last) for t, _ in parts)
    )

    def row(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 2, 3, 1).reshape(-1, rows * channels) if flat else tensor

    def numbers(values: Tensor) -> Tensor:
        values = values.to(first.dtype)
        return values.repeat(rows) if flat else values[:, None, None]

    total = numbers(constant)
    for tensor, values in parts:
        total = torch.addcmul(total, row(tensor), numbers(values))
    if not flat:
        return total
    batch, _, height, width = first.shape
    return total.view(batch, height, width, channels).permute(0, 3, 1, 2)
