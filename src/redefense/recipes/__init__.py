"""Named runs: `FAMILY-METHOD`, each one line of a mapping. Imports no torch."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from redefense.config import Run, suggestion
from redefense.errors import ConfigError
from redefense.recipes.cifar10 import CIFAR10, CIFAR10_MINI, CIFAR10_SWIFT
from redefense.recipes.digits import DIGITS
from redefense.recipes.tiny_imagenet import TINY_IMAGENET

__all__ = ["RECIPES", "recipe"]

RECIPES: Final[Mapping[str, Callable[[], Run]]] = MappingProxyType(
    {**DIGITS, **CIFAR10_MINI, **CIFAR10_SWIFT, **CIFAR10, **TINY_IMAGENET}
)


def recipe(name: str) -> Run:
    """The run of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"unknown recipe {name!r}{suggestion(name, list(RECIPES))}; "
            "see `redefense list recipes`"
        )
    return RECIPES[name]().model_copy(update={"recipe": name})
