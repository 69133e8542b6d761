"""Checks the signatures of redefense in the test run, as jaxtyping does but in less time.

jaxtyping's import hook decorates every function. The decorator of its own checks the arguments of
a call twice, and compiles its checks again whenever a function within a function is defined.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from functools import wraps
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable

CONF = BeartypeConf(violation_type=TypeError)
SHAPES = jaxtyping.jaxtyped("context")
"""A scope of axis names: within it, equal names stand for equal sizes."""

_known: dict[CodeType, tuple[dict[str, Any], inspect.Signature, dict[str, Any]]] = {}


def install() -> None:
    """Make jaxtyping's import hook, which looks its decorator up by name, use `checked`."""
    jaxtyping.jaxtyped = lambda **_: checked  # type: ignore[assignment]


def checked(made: Any) -> Any:
    """A function, or a class whose `__init__` a dataclass wrote, whose calls are checked.

    A call whose arguments or result break the annotations raises a TypeError.
    """
    if isinstance(made, FunctionType):
        return _checked(made)
    init = vars(made).get("__init__")
    if dataclasses.is_dataclass(made) and not hasattr(init, "__wrapped__"):
        made.__init__ = _checked(init)  # type: ignore[method-assign, misc]  # a class's own
    return made


def _checked(fn: Any) -> Callable[..., Any]:
    if "<locals>" in fn.__qualname__ or inspect.isgeneratorfunction(fn):
        return _uncompiled(fn)
    annotations, fn.__annotations__ = fn.__annotations__, _hints(fn)
    found: Callable[..., Any] = beartype(fn, conf=CONF)  # type: ignore[call-overload]  # any function
    hints = fn.__annotations__
    fn.__annotations__ = found.__annotations__ = annotations
    if not _has_shapes(*hints.values()):
        return found

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with SHAPES:
            return found(*args, **kwargs)

    return call


def _uncompiled(fn: FunctionType) -> Callable[..., Any]:
    """For functions within functions, which are defined often and seldom called."""
    known = _known.get(fn.__code__)
    if known is None or known[0] != fn.__annotations__:
        known = _known[fn.__code__] = fn.__annotations__, inspect.signature(fn), _hints(fn)
    _, signature, hints = known

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with SHAPES:
            for name, value in _arguments(signature, args, kwargs):
                die_if_unbearable(value, hints.get(name, Any), conf=CONF)
            result = fn(*args, **kwargs)
            die_if_unbearable(result, hints.get("return", Any), conf=CONF)
            return result

    return call


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((name, one) for one in value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from ((name, one) for one in value.values())
        else:
            yield name, value


def _hints(fn: FunctionType) -> dict[str, Any]:
    """Annotations as objects; Any where a name is not known, as that of an unfinished class."""
    found = {}
    for name, hint in fn.__annotations__.items():
        one = type("one", (), {"__annotations__": {name: hint}})
        try:
            found[name] = typing.get_type_hints(one, fn.__globals__, include_extras=True)[name]
        except NameError:
            found[name] = Any
    return found


def _has_shapes(*hints: Any) -> bool:
    return any(
        (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray))
        or _has_shapes(*typing.get_args(hint))
        for hint in hints
    )
