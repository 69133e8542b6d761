"""Layers shared by all networks: normalisation, activations by name, initialisation."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.errors import ConfigError
from redefense.models.double_backward import silu
from redefense.types import Images

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Final[Mapping[str, Activation]] = MappingProxyType(
    {
        "relu": F.relu,
        # GAL's slope: a penalty on input gradients trains only active units
        "leaky": partial(F.leaky_relu, negative_slope=0.1),
        "silu": silu,
    }
)


def activation_named(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ConfigError: if the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@runtime_checkable
class Tapped(Protocol):
    """A network with access to intermediate features by name."""

    tap_names: tuple[str, ...]

    def tap(self, x: Tensor, name: str) -> Tensor:
        """Features of the layer `name`; later layers are not computed."""
        ...


class Normalise(nn.Module):
    """Subtract a mean and divide by a deviation per channel; both are saved with the weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x: Images) -> Images:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


def initialise(net: nn.Module, rng: torch.Generator) -> None:
    """Set every parameter and statistic of `net`, drawing from `rng` in the order of the modules.

    Convolutions get He's normal law by fan-out, linear layers torch's default law, batch norms
    1 and 0.

    Raises:
        TypeError: for unsupported layers, which would stay uninitialised.
    """
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=rng)
            elif isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=rng)
                module.bias.uniform_(-bound, bound, generator=rng)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, Normalise):
                module.mean.zero_()
                module.std.fill_(1.0)
            elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                raise TypeError(f"no initialisation for {type(module).__name__}")
