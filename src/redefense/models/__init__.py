"""Networks by name: images (B, ch, H, W) in [0, 1] to logits, normalisation inside."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from redefense.errors import ConfigError, RedefenseError, first_line
from redefense.models import tiny
from redefense.models.layers import ACTIVATIONS, Normalise, Tapped, activation_named, initialise
from redefense.models.resnet import ResNet
from redefense.plugins import Registry, summary_of
from redefense.rng import draw_seed, seeded

__all__ = ["ACTIVATIONS", "MODELS", "Model", "Tapped", "build"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """How one network is built.

    Attributes:
        summary: one-line description.
        make: maps (num_classes, shape, width, activation) to an uninitialised network.
        width: default number of channels of the first stage.
    """

    summary: str
    make: Callable[[int, tuple[int, int, int], int, str], nn.Module]
    width: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """How a user's network is built; `width` and `activation` do not apply.

    Attributes:
        summary: one-line description.
        make: maps (num_classes, shape, member) to an initialised network.
    """

    summary: str
    make: Callable[[int, tuple[int, int, int], int], nn.Module]


def _own(name: str, value: Any) -> Model | Own:
    """A user's model: a function (num_classes, shape) -> module, or a list of modules."""
    if isinstance(value, Model | Own):
        return value
    if isinstance(value, nn.Module):
        value = [value]
    if isinstance(value, list | tuple) and value and all(isinstance(n, nn.Module) for n in value):
        # copies: what the caller trains later must not change what the name stands for
        nets = tuple(copy.deepcopy(net) for net in value)
        return Own(
            summary=f"{type(nets[0]).__name__}, as given",
            # with more members than networks they repeat
            make=lambda classes, shape, member: copy.deepcopy(nets[member % len(nets)]),
        )
    if not callable(value):
        raise ConfigError(
            f"the model {name} must be a callable (num_classes, shape) -> torch.nn.Module, or a "
            f"list of modules, got {value!r}"
        )
    return Own(summary=summary_of(value), make=lambda classes, shape, member: value(classes, shape))


def _resnet(
    depths: Sequence[int], *, large_stem: bool = False
) -> Callable[[int, tuple[int, int, int], int, str], nn.Module]:
    def make(num_classes: int, shape: tuple[int, int, int], width: int, act: str) -> nn.Module:
        return ResNet(
            num_classes=num_classes,
            channels=shape[0],
            widths=[width * 2**stage for stage in range(len(depths))],
            depths=depths,
            large_stem=large_stem,
            activation=act,
        )

    return make


MODELS: Final[Registry[Model | Own]] = Registry(
    "models",
    {
        "linear": Model(summary="one linear layer", make=tiny.linear),
        "mlp": Model(summary="two hidden layers", make=tiny.mlp, width=64),
        "digits-cnn": Model(
            summary="three convolutions, for small grey images", make=tiny.digits_cnn
        ),
        "resnet8": Model(summary="CIFAR ResNet-8", make=_resnet([1, 1, 1])),
        "resnet20": Model(summary="CIFAR ResNet-20", make=_resnet([3, 3, 3])),
        "resnet32": Model(summary="CIFAR ResNet-32", make=_resnet([5, 5, 5])),
        "resnet56": Model(summary="CIFAR ResNet-56", make=_resnet([9, 9, 9])),
        "resnet18": Model(
            summary="ResNet-18 with a 3x3 stem and no max-pool, for 32x32 images",
            make=_resnet([2, 2, 2, 2]),
            width=64,
        ),
        "resnet18-64": Model(
            summary="ResNet-18 with a 7x7 stem of stride 2 and max-pool, for 64x64 images",
            make=_resnet([2, 2, 2, 2], large_stem=True),
            width=64,
        ),
    },
    _own,
)


def build(
    name: str,
    *,
    num_classes: int,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    activation: str = "relu",
    member: int = 0,
) -> nn.Module:
    """A newly initialised network on the CPU; equal generators give equal weights.

    Args:
        name: a key of `MODELS`, or `timm:NAME` if timm is installed.
        num_classes: number of logits.
        shape: channels, height and width of the images.
        generator: source of all initial weights; torch's global generator is not used.
        width: channels of the first stage (hidden units of `mlp`); the model's own by default.
        mean: of each channel, subtracted by the first layer; 0.5 by default.
        std: of each channel, divided by in the first layer; 0.25 by default.
        activation: a key of `ACTIVATIONS`.
        member: of the ensemble, for models that were registered as a list of networks.

    Raises:
        ConfigError: for an unknown name or values that do not fit.
    """
    if num_classes < 1 or min(shape) < 1 or (width is not None and width < 1):
        raise ConfigError(
            f"classes, image sizes and width must be positive, got {num_classes}, {shape}, {width}"
        )
    activation_named(activation)
    if name.startswith("timm:"):
        if width is not None or activation != "relu":
            raise ConfigError(f"{name} has its own width and activation")
        net = _timm(name.removeprefix("timm:"), num_classes, shape[0], generator)
    elif name in MODELS:
        model = MODELS[name]
        if isinstance(model, Own):
            if (width, mean, std) != (None, None, None) or activation != "relu":
                raise ConfigError(f"{name} has its own width, activation and normalisation")
            return _made(name, model, num_classes, shape, member, generator)
        with torch.device("meta"):  # no values yet, so torch's global generator is not used
            net = model.make(num_classes, shape, width or model.width, activation)
        net.to_empty(device="cpu")
        initialise(net, generator)
    else:
        raise ConfigError(f"unknown model {name!r}; choose from {', '.join(MODELS)}, timm:NAME")
    _set_normalisation(net, shape[0], mean, std)
    return net


def _made(
    name: str, model: Own, num_classes: int, shape: tuple[int, int, int], member: int,
    rng: torch.Generator,
) -> nn.Module:  # fmt: skip
    """A user's network; the global generators are seeded from `rng` for it."""
    # those of the CPU only, since networks are built there
    with seeded(draw_seed(rng)):
        try:
            net = model.make(num_classes, shape, member)
        except RedefenseError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise ConfigError(
                f"the model {name} failed when called with (num_classes, shape) = "
                f"({num_classes}, {shape}): {type(error).__name__}: {first_line(error)}"
            ) from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"the model {name} must be a torch.nn.Module, got {type(net).__name__}")
    return net


def _set_normalisation(
    net: nn.Module, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    mean, std = mean or [0.5] * channels, std or [0.25] * channels
    finite = all(map(math.isfinite, (*mean, *std)))
    if len(mean) != channels or len(std) != channels or min(std) <= 0 or not finite:
        raise ConfigError(
            f"mean and std must be {channels} numbers each, std positive, got {mean} and {std}"
        )
    # every network of this package has exactly one
    (layer,) = (module for module in net.modules() if isinstance(module, Normalise))
    layer.mean.copy_(torch.tensor(mean))
    layer.std.copy_(torch.tensor(std))


def _timm(name: str, num_classes: int, channels: int, rng: torch.Generator) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        package = error.name or "timm"
        raise ConfigError(f"timm:{name} needs {package}: pip install {package}") from error
    except Exception as error:  # torchvision raises RuntimeError where its build is not torch's
        raise ConfigError(f"timm:{name}: timm cannot be imported: {first_line(error)}") from error
    # timm draws from the global generators, whose states are restored
    with seeded(draw_seed(rng)):
        try:
            net = timm.create_model(
                # nothing is downloaded, here as everywhere without --download
                name,
                pretrained=False,
                num_classes=num_classes,
                in_chans=channels,
            )
        except RuntimeError as error:
            raise ConfigError(f"timm has no model {name!r}: {error}") from error
    return nn.Sequential(Normalise(channels), net)
