"""Named runs: `FAMILY-METHOD`, each one line of a mapping. Imports no torch."""

from collections.abc import Callable
from typing import Any, Final

from redefense.config import Run
from redefense.errors import ConfigError, suggestion
from redefense.plugins import Registry
from redefense.recipes.cifar10 import CIFAR10, CIFAR10_MINI, CIFAR10_SWIFT
from redefense.recipes.digits import DIGITS
from redefense.recipes.tiny_imagenet import TINY_IMAGENET

__all__ = ["RECIPES", "recipe"]


def _maker(name: str, value: Any) -> Callable[[], Run]:
    """A recipe of the user's: a run, or a function that returns one."""
    run = value() if callable(value) else value
    if not isinstance(run, Run):
        raise ConfigError(f"the recipe {name} must be a Run, or a function returning one: {run!r}")
    return lambda: run


RECIPES: Final[Registry[Callable[[], Run]]] = Registry(
    "recipes", {**DIGITS, **CIFAR10_MINI, **CIFAR10_SWIFT, **CIFAR10, **TINY_IMAGENET}, _maker
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
