"""Settings of ensembles, by name, from which an untrained ensemble is built."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Final, Literal, Protocol, runtime_checkable

from torch import nn

from redefense.ensembles import Ensemble, Hyper, Independent
from redefense.errors import ConfigError
from redefense.limits import at_least, not_negative, one_of
from redefense.models import build
from redefense.models.randomized import GaussianNoise, NoiseLayers
from redefense.rng import stream

MAX_MEMBERS: Final = 100_000
"""More members are a mistake, and would exhaust the memory before any is trained."""


@runtime_checkable
class EnsembleConfig(Protocol):
    """Settings from which an untrained ensemble can be built."""

    @property
    def num_members(self) -> int: ...

    def build(self, *, num_classes: int, shape: tuple[int, int, int], seed: int) -> Ensemble: ...

    def plain(self) -> "IndependentConfig": ...


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Settings of the members' networks.

    Attributes:
        model: architecture of every member, a name in `MODELS`.
        num_members: M.
        width: channels of the first stage; the architecture's own if None.
        activation: "relu", "leaky" (slope 0.1), which GAL needs, or the smooth "silu".
        mean: of each channel of the images, subtracted by the first layer; 0.5 if None.
        std: of each channel, divided by in the first layer; 0.25 if None.
    """

    model: str = "resnet8"
    num_members: int = 3
    width: int | None = None
    activation: Literal["relu", "leaky", "silu"] = "relu"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        at_least(1, num_members=self.num_members)
        if self.num_members > MAX_MEMBERS:
            raise ConfigError(f"num_members must be at most {MAX_MEMBERS}, got {self.num_members}")

    def networks(self, num_classes: int, shape: tuple[int, int, int], seed: int) -> list[nn.Module]:
        """M plain networks, each from the stream named by (seed, member)."""
        return [
            build(
                self.model, num_classes=num_classes, shape=shape, width=self.width,
                activation=self.activation, mean=self.mean, std=self.std,
                generator=stream(seed, "member", m), member=m,
            )
            for m in range(self.num_members)
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IndependentConfig(Networks):
    """M separate networks with different initialisations; further settings as in `Networks`.

    Attributes:
        noise: "image" adds Gaussian noise to the image, "layers" before each convolution and fully
            connected layer (RSE), both in training and afterwards; "none" adds none.
        sigma: standard deviation of the noise, in units of the images; half of it before layers
            other than the first.
    """

    noise: Literal["none", "image", "layers"] = "none"
    sigma: float = 0.25

    def __post_init__(self) -> None:
        Networks.__post_init__(self)
        one_of("noise", self.noise, ("none", "image", "layers"))
        not_negative(sigma=self.sigma)

    def build(self, *, num_classes: int, shape: tuple[int, int, int], seed: int) -> Ensemble:
        """Members initialised from streams named by (seed, member)."""
        return Independent([self._noisy(net) for net in self.networks(num_classes, shape, seed)])

    def _noisy(self, network: nn.Module) -> nn.Module:
        if self.noise == "image":
            return GaussianNoise(network, sigma=self.sigma)
        if self.noise == "layers":
            return NoiseLayers(network, first=self.sigma, inner=self.sigma / 2)
        return network

    def plain(self) -> "IndependentConfig":
        """Itself."""
        return self


@dataclass(frozen=True, kw_only=True)
class HyperConfig(Networks):
    """PS-RED: M networks with kernels from hypernetworks; further settings as in `Networks`.

    Attributes:
        embedding: dimension of a unit's embedding.
        hidden: width of a hypernetwork between its two layers, per output channel of a unit.
            ResNet-18 keeps 10.66 % of its parameters with 128, 5.60 % with 64.
        unit: channels of a unit, 16, 32 or 64; must divide those of all generated kernels.
        taps: reduction of nine taps to a 1x1 kernel: "mean", "max" or "sum".
        shared: one hypernetwork for all members in place of one each.
    """

    model: str = "resnet18"
    embedding: int = 128
    hidden: int = 128
    unit: int = 64
    taps: Literal["mean", "max", "sum"] = "mean"
    shared: bool = False

    def build(self, *, num_classes: int, shape: tuple[int, int, int], seed: int) -> Ensemble:
        """Members and hypernetworks initialised from streams of the seed."""
        return Hyper(
            self.networks(num_classes, shape, seed),
            unit=self.unit, embedding=self.embedding, hidden=self.hidden, taps=self.taps,
            shared=self.shared, rng=stream(seed, "hypernetwork"),
        )  # fmt: skip

    def plain(self) -> IndependentConfig:
        """The same networks with separate kernels."""
        return IndependentConfig(**{f.name: getattr(self, f.name) for f in fields(Networks)})


ENSEMBLES: Final[Mapping[str, type[EnsembleConfig]]] = MappingProxyType(
    {"independent": IndependentConfig, "hyper": HyperConfig}
)
