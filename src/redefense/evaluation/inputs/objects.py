"""Suites from objects: a name, a `Suite`, or the attacks themselves."""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from redefense.attacks import ATTACKS, Attack
from redefense.attacks.foreign import Foreign, as_attack, name_of
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError
from redefense.evaluation.suite import SUITES, CellSpec, Suite, suite_named
from redefense.networks import Function
from redefense.plugins import Origin, origins
from redefense.radius import eps_text
from redefense.results.schema import suite_version
from redefense.train.api import weights_digest

CUSTOM: Final = "custom"
"""Name of a suite that is a list of attacks."""


def suite_of(value: Any, name: str | None = None) -> Suite:
    """A suite from a name, a file, a `Suite` or attacks.

    Args:
        value: a name or a `.json` file; a `Suite`; an attack, a list of attacks, or a mapping from
            labels to attacks, each an `Attack`, a class of attacks or a callable
            (model, x, y) -> x_adv.
        name: of a suite made from a list; default: "custom".

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(value, str | PathLike):
        if value in ATTACKS and value not in SUITES:
            raise ConfigError(f"{value!r} is an attack and not a suite: use suite=[{value!r}]")
        return suite_named(value)
    if isinstance(value, Suite):
        known = SUITES.get(value.name, value)
        one, other = (suite_version(suite.model_dump(mode="json")) for suite in (known, value))
        # a claim of it would seem to be of the built-in one
        if one != other:
            raise ConfigError(
                f"{value.name!r} is a built-in suite with other attacks: choose another name than "
                f"{', '.join(SUITES)}"
            )
        return value if name is None else value.model_copy(update={"name": name})
    labelled: list[tuple[str | None, Any]]
    if isinstance(value, Mapping):
        labelled = [(str(label), attack) for label, attack in value.items()]
    elif isinstance(value, Sequence):
        labelled = [(None, attack) for attack in value]
    elif callable(value):
        labelled = [(None, value)]
    else:
        raise ConfigError(
            "a suite must be a name, a Suite, or a list of attacks and callables "
            f"(model, x, y) -> x_adv, got {value!r}"
        )
    if not labelled:
        raise ConfigError("a suite needs at least one attack, got an empty list")
    return Suite(
        name=name or CUSTOM,
        summary=f"{len(labelled)} attack{'s' * (len(labelled) > 1)}, given as objects",
        cells=tuple(cell_of(attack, label) for label, attack in labelled),
    )


def cell_of(value: Any, label: str | None = None) -> CellSpec:
    """The cell of an attack object: view "members" if it is adaptive, else "protocol"."""
    if isinstance(value, CellSpec):
        return value
    if isinstance(value, str):  # an attack in a list may be given by its name
        if value not in ATTACKS:
            raise ConfigError(f"unknown attack {value!r}; there are {', '.join(ATTACKS)}")
        value = ATTACKS[value]
    attack = as_attack(value, label)
    # installed plug-ins that are not loaded cannot have made this object
    known = (*ATTACKS.own, *ATTACKS.added())
    named = next((key for key in known if ATTACKS[key] is type(attack)), None)
    plain = named or "".join(c if c.isalnum() else "_" for c in type(attack).__name__)
    if named is None and plain in ATTACKS.own:
        plain = f"own_{plain}"  # rules about the built-in attack of that name must not apply to it
    return CellSpec(
        attack=plain,
        view="members" if attack.adaptive else "protocol",
        settings=_settings(attack),
        label=label or (None if named else name_of(attack)),
    ).with_attack(attack)


def all_aware(suite: Suite) -> Suite:
    """The suite for a single network, which has no draw: every cell is aware."""
    cells = tuple(
        spec.model_copy(update={"aware": True}) if spec.made is not None else spec
        for spec in suite.cells
    )
    return suite.model_copy(update={"cells": cells})


def outside_lines(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each cell whose attack returned points outside the ball.

    Args:
        cells: of an evaluation's JSON.
    """
    return [
        f"{cell['label'] or cell['attack']} left the ball on {cell['outside']['images']} images "
        f"(it went as far as {cell['outside']['furthest']:.6g}, eps is "
        f"{eps_text(cell['threat']['eps'])}): they were judged at the nearest point of the ball"
        for cell in cells
        if "outside" in cell
    ]


def fingerprints(suite: Suite) -> dict[str, str]:
    """SHA-256 of users' attacks, by cell: of their source, settings and what they refer to."""
    # saved records of an attack must not be mixed with those of other code
    found = {}
    for number, spec in enumerate(suite.cells):
        if spec.made is None:
            continue
        code = type(spec.made).function if isinstance(spec.made, Foreign) else type(spec.made)
        text = f"{spec.made!r}\n{_described(code)}"
        found[f"{number} {spec.attack}"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def _described(value: object, known: dict[int, object] | None = None) -> str:
    """Text that is equal for equal code and values, whatever their place in memory."""
    if isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        return repr(value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    # each object once: objects refer to each other, and some to themselves
    known = {} if known is None else known
    if id(value) in known:
        return f"#{list(known).index(id(value))}"
    known[id(value)] = value  # kept, so that no other object gets its number

    def each(values: Iterable[object]) -> str:
        return ", ".join(_described(it, known) for it in values)

    if isinstance(value, Mapping):
        return f"{{{each(value.keys())}: {each(value.values())}}}"
    if isinstance(value, tuple):
        return f"({each(value)})"
    if isinstance(value, list | set):  # an attack may note its calls there
        return type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray):
        values = torch.as_tensor(value).detach().cpu().numpy()
        digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
        return f"{values.dtype} {values.shape} {digest}"
    if isinstance(value, nn.Module):
        return weights_digest([value])
    if isinstance(value, functools.partial):
        return f"partial {each((value.func, value.args, value.keywords))}"
    if isinstance(value, types.MethodType):
        return f"method {each((value.__func__, value.__self__))}"
    try:
        source = inspect.getsource(value if isinstance(value, type) else _code(value))
    except (OSError, TypeError):  # typed in an interpreter, or compiled
        source = name_of(value)
    if isinstance(value, types.FunctionType):
        return f"{source} {each((_closed_over(value), value.__defaults__, value.__kwdefaults__))}"
    if isinstance(value, type):
        return source
    return f"{source} {each([vars(value)] if hasattr(value, '__dict__') else [])}"


def _closed_over(function: types.FunctionType) -> dict[str, object]:
    with contextlib.suppress(ValueError):  # a name that is not bound yet
        return dict(inspect.getclosurevars(function).nonlocals)
    return {}


def _code(value: Any) -> Any:
    """What has a source: a function, or the class of an object."""
    return value if isinstance(value, types.FunctionType) else type(value)


def function_digest(ensemble: Ensemble, x: Tensor) -> dict[str, str]:
    """SHA-256 of the outputs of plain functions on a few images; empty for networks."""
    # a function's weights cannot be read, and its records must not be mixed with those of another
    if not any(isinstance(part, Function) for part in ensemble.modules()):
        return {}
    with torch.no_grad():
        answers = [ensemble.logits_of(m, x[:8]) for m in range(min(ensemble.num_members, 8))]
    # numpy has no bfloat16
    raw = torch.stack(answers).cpu().double().numpy().tobytes()
    return {"answers": hashlib.sha256(raw).hexdigest()}


def attributes_digest(ensemble: Ensemble) -> str:
    """SHA-256 of the plain attributes of all modules, such as a number of bits or a temperature.

    They are in no state dict, and networks that differ by them answer differently.
    """
    plain = bool, int, float, str
    found = [
        f"{name}.{key}={value!r}"
        for name, module in ensemble.named_modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key != "training" and isinstance(value, plain)
    ]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def plugins_of(suite: Suite, data: str) -> dict[str, dict[str, Origin]]:
    """Origins of the suite, its attacks and the data set, if they come from plug-ins."""
    cells = (*suite.cells, *suite.baseline_attacks)
    named = [("suites", suite.name), *(("attacks", spec.attack) for spec in cells)]
    found = origins(dict.fromkeys([*named, ("datasets", data)]))
    return {"plugins": found} if found else {}


def _settings(attack: Attack) -> dict[str, Any]:
    """The settings that differ from the defaults, as JSON data, or as text where that fails."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        if not field.init or value == field.default:
            continue
        try:
            found[field.name] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            found[field.name] = repr(value)
    return found
