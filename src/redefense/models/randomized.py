"""Published randomized defences as wrappers around any network, all drawing in the forward pass.

They draw from torch's global generator, as networks do, so that `Stochastic` repeats a draw by its
seed. The wrapped network keeps its weights and modes; layers inside it are reached by hooks that
are attached during a call only.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.errors import ConfigError, InputError
from redefense.types import Images, Logits

MIXING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class GaussianNoise(nn.Module):
    """Gaussian noise added to the image (Lecuyer et al., 2019; Cohen et al., 2019).

    The noisy image is not clipped to the box, as the certificates demand.

    Args:
        model: the network behind the noise.
        sigma: standard deviation of the noise, in units of the images, >= 0.
    """

    def __init__(self, model: nn.Module, *, sigma: float = 0.25) -> None:
        super().__init__()
        _check(sigma, lambda v: v >= 0, "sigma must be a number >= 0")
        self.model, self.sigma = model, sigma

    def forward(self, x: Images) -> Logits:
        return cast(Tensor, self.model(x + self.sigma * _noise(x)))


class _Hooked(nn.Module):
    """A network some of whose layers get other inputs during a call."""

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...], what: str) -> None:
        super().__init__()
        self.model, self._kinds = model, kinds
        if not self._layers():
            raise InputError(f"{type(self).__name__} needs {what}, {type(model).__name__} has none")

    def _layers(self) -> list[nn.Module]:
        return [child for child in self.model.modules() if isinstance(child, self._kinds)]

    def changed(self, place: int, inputs: Tensor) -> Tensor:
        """What layer number `place` gets instead of its inputs."""
        raise NotImplementedError

    def forward(self, x: Images) -> Logits:
        with _inputs_changed(self._layers(), self.changed):
            return cast(Tensor, self.model(x))


@contextmanager
def _inputs_changed(
    layers: list[nn.Module], change: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    def hook_of(place: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, inputs: (change(place, inputs[0]), *inputs[1:])

    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            # removed after the call, so that the network is unchanged for other uses
            stack.callback(layer.register_forward_pre_hook(hook_of(place)).remove)
        yield


class NoiseLayers(_Hooked):
    """Gaussian noise before each convolution and fully connected layer: RSE (Liu et al., 2018).

    Args:
        model: the network into which the noise goes.
        first: standard deviation before the first such layer, >= 0.
        inner: standard deviation before the others, >= 0.
    """

    def __init__(self, model: nn.Module, *, first: float = 0.2, inner: float = 0.1) -> None:
        super().__init__(model, MIXING, "a convolution or a fully connected layer")
        for sigma in (first, inner):
            _check(sigma, lambda v: v >= 0, "noise must be a number >= 0")
        self.first, self.inner = first, inner

    def changed(self, place: int, inputs: Tensor) -> Tensor:
        return inputs + (self.inner if place else self.first) * _noise(inputs)


class TestTimeDropout(_Hooked):
    """Dropout before each fully connected layer, whatever the mode (Gal and Ghahramani, 2016).

    Args:
        model: the network.
        p: share of the inputs that are set to zero, in [0, 1).
    """

    __test__ = False  # a network, though its name begins as those that pytest collects

    def __init__(self, model: nn.Module, *, p: float = 0.5) -> None:
        super().__init__(model, (nn.Linear,), "a fully connected layer")
        _check(p, lambda v: 0 <= v < 1, "p must be a number in [0, 1)")
        self.p = p

    def changed(self, place: int, inputs: Tensor) -> Tensor:
        return F.dropout(inputs, self.p, training=True)


class ActivationPruning(_Hooked):
    """Activations kept by chance, the larger the likelier (Dhillon et al., 2018).

    Of each image's inputs to a convolution or fully connected layer, other than the first, so many
    are drawn with replacement, each with a probability in proportion to its magnitude. Those never
    drawn become zero; the others are divided by the probability of being drawn at all.

    Args:
        model: the network.
        share: draws, as a share of the number of activations, > 0.
    """

    def __init__(self, model: nn.Module, *, share: float = 1.0) -> None:
        super().__init__(model, MIXING, "a convolution or a fully connected layer")
        _check(share, lambda v: v > 0, "share must be a number > 0")
        self.share = share

    def changed(self, place: int, inputs: Tensor) -> Tensor:
        if place == 0:
            return inputs
        size = inputs.detach().abs().flatten(1)
        total = size.sum(1, keepdim=True)
        # an image without activations keeps them: zeros
        odds = torch.where(total > 0, size / total.clamp_min(torch.finfo(size.dtype).tiny), 1.0)
        draws = max(1, round(self.share * size.shape[1]))
        drawn = torch.multinomial(odds, draws, replacement=True)
        kept = torch.zeros_like(size).scatter(1, drawn, 1.0)
        # 1 - (1 - p)^r, without losing small p to rounding
        chance = -torch.expm1(draws * torch.log1p(-odds.clamp_max(1 - 1e-6)))
        weight = kept / chance.clamp_min(torch.finfo(size.dtype).tiny)
        return inputs * weight.view_as(inputs)


class ResizeAndPad(nn.Module):
    """The image at a random size, at a random place among zeros (Xie et al., 2018).

    Size and place are drawn once a call, for all images, as published.

    Args:
        model: the network; must take images of the larger size.
        largest: height and width of what the network gets, as a multiple of the image's, >= 1;
            published for 299 pixels: 331/299.
    """

    def __init__(self, model: nn.Module, *, largest: float = 331 / 299) -> None:
        super().__init__()
        _check(largest, lambda v: v >= 1, "largest must be a number >= 1")
        self.model, self.largest = model, largest

    def forward(self, x: Images) -> Logits:
        height, width = x.shape[2:]
        # at least one pixel of room, where the multiple of a small image rounds to the image
        full = [
            max(side + (self.largest > 1), round(self.largest * side)) for side in (height, width)
        ]
        # one share for both sides, which keeps the aspect ratio
        share = float(torch.rand(()))
        size = [
            side + int(share * (end - side))
            for side, end in zip((height, width), full, strict=True)
        ]
        room = [end - side for end, side in zip(full, size, strict=True)]
        top, left = (int(torch.randint(left_over + 1, ())) for left_over in room)
        resized = F.interpolate(x, size=size, mode="nearest")
        pads = (left, room[1] - left, top, room[0] - top)
        return cast(Tensor, self.model(F.pad(resized, pads)))


def _noise(x: Tensor) -> Tensor:
    """Standard normal numbers, equal for a seed in every memory format of `x`.

    `randn_like` takes five times as long in channels-last format on a CPU.
    """
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


def _check(value: Any, holds: Callable[[float], bool], rule: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not holds(value):
        raise ConfigError(f"{rule}, and finite, got {value!r}")
