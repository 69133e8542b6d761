"""Kinds of ensembles by name, as settings that build one."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, Protocol, runtime_checkable

from redefense.ensembles import Independent, Members
from redefense.errors import ConfigError
from redefense.models import build
from redefense.rng import stream


@runtime_checkable
class Kind(Protocol):
    """Settings from which an untrained ensemble can be built."""

    @property
    def num_members(self) -> int: ...

    def build(self, *, num_classes: int, shape: tuple[int, int, int], seed: int) -> Members: ...


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
        return Independent(
            [
                build(
                    self.model,
                    num_classes=num_classes,
                    shape=shape,
                    width=self.width,
                    activation=self.activation,
                    generator=stream(seed, "member", m),
                )
                for m in range(self.num_members)
            ]
        )


ENSEMBLES: Final[Mapping[str, type[IndependentKind]]] = MappingProxyType(
    {"independent": IndependentKind}
)
