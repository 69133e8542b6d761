"""Named runs: `FAMILY-METHOD`, each one line of a mapping. Imports no torch."""

from collections.abc import Callable
from typing import Any, Final

from redefense.config import Run
from redefense.errors import ConfigError, suggestion
from redefense.plugins import Registry
from redefense.radius import eps_text
from redefense.recipes.cifar10 import CIFAR10, CIFAR10_MINI, CIFAR10_SWIFT
from redefense.recipes.digits import DIGITS
from redefense.recipes.tiny_imagenet import TINY_IMAGENET

__all__ = ["RECIPES", "recipe", "summary"]


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


def summary(run: Run) -> str:
    """One line for `redefense list recipes`."""
    ensemble, defence = run.ensemble, run.defence
    kinds = [defence[key] for key in ("preset", "variant", "apart") if key in defence]
    method = " ".join([defence["name"], *kinds])
    weights = [f"{key} {defence[key]:g}" for key in ("similarity", "smoothness") if key in defence]
    if defence.get("adversarial_training"):
        weights.append("adversarial training")
    if weights:
        method += f" with {' and '.join(weights)}"
    members = f"{ensemble['num_members']} x {ensemble['model']}"
    if ensemble["name"] == "hyper":
        members += " written by a hypernetwork"
    if (noise := ensemble.get("noise", "none")) != "none":
        place = {"image": "the image", "layers": "the layers' inputs"}.get(noise, noise)
        members += f" with Gaussian noise on {place}"
    return (
        f"{method}, {members}, "
        f"{run.epochs} epochs on {run.data.spec.partition(':')[0]}, eps {eps_text(run.threat.eps)}"
    )
