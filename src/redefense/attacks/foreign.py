"""Attacks of other libraries and plain functions, called (model, x, y) -> x_adv, as attacks."""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn

from redefense.attacks.base import Attack
from redefense.ensembles import modes_kept
from redefense.errors import ConfigError, InputError, RedefenseError, first_line
from redefense.plugins import summary_of
from redefense.rng import seed_from, seeded
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
        """Call the function with the global generators seeded, and its prints sent to stderr.

        The modes of the victim are restored afterwards.

        Raises:
            InputError: if it fails, or does not return images of the shape of `x`.
        """
        offered = {"threat": threat, "eps": threat.eps}
        given = {key: offered[key] for key in self.keywords}
        with (
            # other libraries draw from the global generators; they are restored afterwards
            seeded(int(seed_from(rng)), x.device),
            modes_kept(victim),
            # off within attacks, but other libraries expect it on
            torch.enable_grad(),
            # stdout is reserved for machine-readable output
            contextlib.redirect_stdout(sys.stderr),
        ):
            try:
                # contiguous, since many attacks call `view`
                # a copy: the function may change its arguments in place
                images = x.clone(memory_format=torch.contiguous_format)
                found = type(self).function(victim, images, y.clone(), **given)
            except RedefenseError:
                raise
            except Exception as error:  # a user's function may raise anything
                called = ", ".join(["model, x, y", *self.keywords])
                raise InputError(
                    f"the attack {self!r} failed when called with ({called}): "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        if isinstance(found, np.ndarray) and found.dtype.kind == "f":
            found = torch.from_numpy(np.ascontiguousarray(found))  # reversed axes are not accepted
        shape = tuple(x.shape)
        if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
            raise InputError(
                f"the attack {self!r} must return floating-point images of shape {shape} alone, "
                f"got {_description(found)}"
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
        ConfigError: if it cannot be called so, or has a model of its own.
    """
    plain = name or name_of(function)
    if isinstance(getattr(function, "model", None), nn.Module):
        raise ConfigError(
            f"the attack {plain} was created for a model of its own and would attack that one: "
            f"pass a function that creates it, such as lambda model, x, y, eps: "
            f"{type(function).__name__}(model, eps=eps)(x, y)"
        )
    try:
        signature = inspect.signature(function)
        # the first three are model, images and labels, whatever they are called
        keywords = tuple(key for key in _OFFERED if key in list(signature.parameters)[3:])
        signature.bind(None, None, None, **dict.fromkeys(keywords))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the attack {plain} must be callable as (model, x, y), with eps or threat as further "
            f"arguments if it needs them: {error}. Wrap it in a function that sets all others"
        ) from None
    body = {
        "function": staticmethod(function),
        "keywords": keywords,
        "norms": norms,
        "summary": summary if summary is not None else summary_of(function),
        "__module__": getattr(function, "__module__", __name__),
    }
    return dataclass(frozen=True, kw_only=True, repr=False)(
        type(_identifier(plain), (Foreign,), body)
    )


def _description(found: object) -> str:
    """A wrong result of an attack: of a sequence the kinds of its elements."""
    if isinstance(found, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(found, Tensor) else "an array"
        return f"{kind} of shape {tuple(found.shape)} and {found.dtype}"
    if isinstance(found, list | tuple):
        parts = ", ".join(_description(part) for part in found[:4])
        return f"a {type(found).__name__} of {len(found)}: {parts}"
    return f"a {type(found).__name__}"


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
            f"got {value!r}: wrap it in a function"
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
