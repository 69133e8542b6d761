"""Attacks of other libraries and plain functions, called (model, x, y) -> x_adv, as attacks."""

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn

from redefense.attacks.base import Attack
from redefense.errors import ConfigError, InputError
from redefense.plugins import summary_of
from redefense.rng import seed_from
from redefense.threat import Threat
from redefense.types import Images, Labels

_OFFERED: Final = ("threat", "eps")


@dataclass(frozen=True, kw_only=True)
class Foreign(Attack):
    """Base of the attacks that `foreign` makes.

    Attributes:
        function: called as (model, x, y), with the keywords `threat` (a `Threat`) and `eps` (its
            radius) if its signature has them.
        keywords: the accepted ones of these two.
    """

    function: ClassVar[Callable[..., Any]]
    keywords: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        return type(self).__name__

    def perturb(
        self, victim: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: torch.Generator
    ) -> Images:
        """Call the function with torch's and numpy's global generators seeded.

        Raises:
            InputError: if it does not return images of the shape of `x`.
        """
        offered = {"threat": threat, "eps": threat.eps}
        given = {key: offered[key] for key in self.keywords}
        seed = int(seed_from(rng))
        state = np.random.get_state()
        devices = [x.device] if x.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.enable_grad():
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                found = type(self).function(victim, x.clone(), y.clone(), **given)
        finally:
            np.random.set_state(state)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"{self!r} must return a tensor of images of shape {tuple(x.shape)}, got {got}"
            )
        return found.detach().to(x)


def foreign(
    function: Callable[..., Any],
    name: str | None = None,
    *,
    summary: str | None = None,
    norms: tuple[float, ...] = Attack.norms,
) -> type[Foreign]:
    """An attack class around a callable (model, x, y) -> x_adv.

    For example, of TorchAttacks `foreign(lambda model, x, y, eps: torchattacks.PGD(model,
    eps=eps)(x, y), "torchattacks PGD")`. The model is a `torch.nn.Module` from images in [0, 1] to
    logits: the view of the ensemble that the suite names. A callable that takes a keyword `eps` or
    `threat` is given that of the run; any other uses its own budget. The evaluation checks the
    budget and scores the results.

    Args:
        function: the callable.
        name: its name in records and tables; the callable's own name by default.
        summary: one-line description; the first line of its docstring by default.
        norms: the threat norms that it attacks in.

    Raises:
        ConfigError: if it cannot be called with three arguments.
    """
    plain = name or name_of(function)
    try:
        parameters = inspect.signature(function).parameters
        inspect.signature(function).bind_partial(None, None, None)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the attack {plain} must be callable as (model, x, y), or be an attack class of "
            f"redefense: {error}"
        ) from None
    # the first three are model, images and labels, whatever they are called
    rest = list(parameters)[3:]
    body = {
        "function": staticmethod(function),
        "keywords": tuple(key for key in _OFFERED if key in rest),
        "norms": norms,
        "summary": summary if summary is not None else summary_of(function),
        "__module__": getattr(function, "__module__", __name__),
    }
    return dataclass(frozen=True, kw_only=True, repr=False)(
        type(_identifier(plain), (Foreign,), body)
    )


def name_of(value: Any) -> str:
    """The name of an object, or that of its class."""
    if isinstance(value, functools.partial):
        return name_of(value.func)
    name = getattr(value, "__name__", None)
    return type(value).__name__ if name is None else "function" if name == "<lambda>" else str(name)


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "attack"


def attack_class(name: str, value: Any) -> type[Attack]:
    """A user's attack class unchanged, or an attack class around a callable.

    Raises:
        ConfigError: if the value is neither.
    """
    if isinstance(value, type) and issubclass(value, Attack):
        if inspect.isabstract(value):
            raise ConfigError(f"the attack {name} must implement perturb")
        return value
    if isinstance(value, type) or not callable(value):
        raise ConfigError(
            f"the attack {name} must be an Attack class or a callable (model, x, y) -> x_adv, "
            f"got {value!r}"
        )
    if isinstance(value, Attack):
        raise ConfigError(f"the attack {name} must be a class, {type(value).__name__}, not {value}")
    return foreign(value, name)


def as_attack(value: Any, name: str | None = None) -> Attack:
    """An attack from an `Attack`, an `Attack` class (with its defaults), or a callable.

    Raises:
        ConfigError: if the object is none of these.
    """
    return value if isinstance(value, Attack) else attack_class(name or name_of(value), value)()
