"""Kinds of ensembles by name, as settings that build one."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, Protocol, runtime_checkable

from torch import nn

from redefense.ensembles import Hyper, Independent, Members
from redefense.errors import ConfigError
from redefense.models import build
from redefense.rng import stream


@runtime_checkable
class Kind(Protocol):
    """Settings from which an untrained ensemble can be built."""

    @property
    def num_members(self) -> int: ...

    def build(self, *, num_classes: int, shape: tuple[int, int, int], seed: int) -> Members: ...

    def plain(self) -> "IndependentKind": ...


@dataclass(frozen=True, kw_only=True)
class IndependentKind:
    """M separate networks that differ by their initialisation.

    Attributes:
        model: architecture of every member, a name in `MODELS`.
        num_members: M.
        width: channels of the first stage; the architecture's own if None.
        activation: "relu", or "leaky" (slope 0.1), which GAL needs.
    """

    model: str = "resnet8"
    num_members: int = 3
    width: int | None = None
    activation: Literal["relu", "leaky"] = "relu"

    def __post_init__(self) -> None:
        if self.num_members < 1:
            raise ConfigError(f"num_members must be at least 1, got {self.num_members}")

    def build(self, *, num_classes: int, shape: tuple[int, int, int], seed: int) -> Members:
        """Members initialised from streams named by (seed, member)."""
        return Independent(networks(self, num_classes, shape, seed))

    def plain(self) -> "IndependentKind":
        """Itself."""
        return self


@dataclass(frozen=True, kw_only=True)
class HyperKind:
    """PS-RED: M networks whose kernels are written by hypernetworks.

    Attributes:
        model: architecture of every member, a name in `MODELS`.
        num_members: M.
        width: channels of the first stage; the architecture's own if None.
        activation: "relu", or "leaky" (slope 0.1), which GAL needs.
        embedding: numbers from which a unit is written.
        hidden: width of a hypernetwork between its two layers, per output channel of a unit.
            ResNet-18 keeps 10.66 % of its parameters with 128, 5.60 % with 64.
        unit: channels of a unit, 16, 32 or 64; must divide those of all written kernels.
        taps: how nine taps become a 1x1 kernel.
        shared: one hypernetwork for all members in place of one each.
    """

    model: str = "resnet18"
    num_members: int = 3
    width: int | None = None
    activation: Literal["relu", "leaky"] = "relu"
    embedding: int = 128
    hidden: int = 128
    unit: int = 64
    taps: Literal["mean", "max", "sum"] = "mean"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.num_members < 1:
            raise ConfigError(f"num_members must be at least 1, got {self.num_members}")

    def build(self, *, num_classes: int, shape: tuple[int, int, int], seed: int) -> Members:
        """Members and hypernetworks initialised from streams of the seed."""
        return Hyper(
            networks(self, num_classes, shape, seed),
            unit=self.unit,
            embedding=self.embedding,
            hidden=self.hidden,
            taps=self.taps,
            shared=self.shared,
            rng=stream(seed, "hypernetwork"),
        )

    def plain(self) -> IndependentKind:
        """The same networks with kernels of their own."""
        return IndependentKind(
            model=self.model,
            num_members=self.num_members,
            width=self.width,
            activation=self.activation,
        )


def networks(
    kind: IndependentKind | HyperKind, num_classes: int, shape: tuple[int, int, int], seed: int
) -> list[nn.Module]:
    """M plain networks, each from the stream named by (seed, member)."""
    return [
        build(
            kind.model,
            num_classes=num_classes,
            shape=shape,
            width=kind.width,
            activation=kind.activation,
            generator=stream(seed, "member", m),
            member=m,
        )
        for m in range(kind.num_members)
    ]


ENSEMBLES: Final[Mapping[str, type[Kind]]] = MappingProxyType(
    {"independent": IndependentKind, "hyper": HyperKind}
)
