"""`Run`: all settings of a training as frozen dataclasses, read from and written to JSON.

Imports no torch, so that the command line can check a configuration at once. Names of models,
defences and so on are resolved through mappings given by the caller, never through import paths.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from redefense.errors import BAD_JSON, ConfigError, suggestion
from redefense.radius import Eps, Norm, check_linf, read_eps, read_norm

T = TypeVar("T")
# settings that all methods and kinds have, which `override` keeps when their name changes
_NAMED: Final[Mapping[str, set[str]]] = {
    "defence": set(),
    "ensemble": {"model", "num_members", "width", "activation", "mean", "std"},
}
Settings = dict[str, Any]


class _Frozen(BaseModel):
    # JSON, in which every run is stored, has neither NaN nor infinity
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(_Frozen):
    """Data and augmentation.

    Attributes:
        spec: data specification, e.g. `digits` or `cifar10:PATH`.
        images: train on the first N of a fixed permutation of the training split; all if None.
        augment: random crop with 4 pixels of padding, and horizontal flip.
        cutout: side in pixels of a black square at a random position of each image (DeVries &
            Taylor, 2017); none if 0.
        validation: fraction of the training images that is held out.
    """

    spec: str
    images: int | None = Field(default=None, ge=1)
    augment: bool = False
    cutout: int = Field(default=0, ge=0)
    validation: float = Field(default=0.1, gt=0, lt=1)


Smoothing = Annotated[float, Field(ge=0, lt=1)]
"""Fraction of a label's probability that is distributed evenly over all classes."""


class ThreatConfig(_Frozen):
    """The threat that the run is evaluated against; `check` is called where it is used."""

    norm: Annotated[Norm, BeforeValidator(read_norm)] = "inf"
    eps: Annotated[Eps, Field(ge=0, le=100)] = 0.03

    @classmethod
    def of(cls, norm: object, eps: object) -> "ThreatConfig":
        """Parse norm and eps.

        Raises:
            ConfigError: for an unknown norm, or an eps outside [0, 100] or, for L-inf, [0, 1].
        """
        radius = read_eps(eps)
        if not 0 <= radius <= 100:
            raise ConfigError(f"eps must lie in [0, 100], got {radius:g}")
        found = cls(norm=read_norm(norm), eps=radius)
        found.check()
        return found

    def check(self) -> None:
        """Refuse an L-inf eps above 1, with a ConfigError: pydantic would wrap it in its own."""
        if self.norm == "inf":
            check_linf(self.eps)


class OptimConfig(_Frozen):
    """Optimizer and learning-rate schedule, both functions of the step.

    Attributes:
        name: "sgd" (momentum) or "adam".
        lr: peak learning rate.
        momentum: momentum of SGD.
        nesterov: Nesterov momentum as in torch, for SGD.
        weight_decay: L2 penalty on all parameters.
        decay_norms_and_biases: whether it includes scales of norm layers and biases.
        eps: Adam's eps.
        schedule: "constant"; "one-cycle" (linear up over `warmup`, linear down to 0); "cosine";
            "steps" (times `gamma` at each share of the stage in `milestones`).
        warmup: share of the stage, for one-cycle.
        milestones: shares of the stage in (0, 1), for steps.
        gamma: factor at each milestone.
        ema: decay of the moving average of weights and batch-norm statistics, which replaces them
            at the end of every stage; min(ema, (t + 1) / (t + 10)) at step t. None: no average.
        clip: maximum norm of the gradient over all parameters; no clipping if None.
    """

    name: Literal["sgd", "adam"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=1e-4, ge=0)
    decay_norms_and_biases: bool = True
    eps: float = Field(default=1e-8, gt=0)
    schedule: Literal["constant", "one-cycle", "cosine", "steps"] = "one-cycle"
    warmup: float = Field(default=0.3, ge=0, lt=1)
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5, 0.75)
    gamma: float = Field(default=0.1, gt=0, le=1)
    ema: float | None = Field(default=None, gt=0, lt=1)
    clip: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_nesterov(self) -> "OptimConfig":
        # torch's SGD refuses this too, but only after the data are read
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs name=sgd and a positive momentum")
        return self


class StartConfig(_Frozen):
    """Weights that training starts from.

    Attributes:
        path: a finished run of plain or written members, alike in network and images; or a file of
            weights, see `models.published`. If it holds fewer networks than there are members, they
            are used cyclically.
        sha256: checksum of its weights; filled in when the run starts, and verified from then on.
    """

    path: str
    sha256: str | None = None


class Run(_Frozen):
    """One training run.

    Attributes:
        recipe: name of the recipe, for reports.
        ensemble: `{"name": kind, ...}` with the settings of that kind of ensemble.
        defence: `{"name": method, ...}` with the settings of that method.
        precision: "bf16" computes forward passes under autocast; weights stay in single precision.
        epochs: total passes over the training images of all stages.
        start: members to start from in place of random ones; hypernetworks are fitted to their
            kernels.
        plugins: plug-ins that registered names used here, by "KIND.NAME"; filled in.
    """

    recipe: str = "custom"
    data: DataConfig
    ensemble: Settings
    defence: Settings
    threat: ThreatConfig = ThreatConfig()
    optim: OptimConfig = OptimConfig()
    epochs: int = Field(ge=1, le=10**9)
    batch_size: int = Field(ge=1, le=10**9)
    seed: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    start: StartConfig | None = None
    plugins: dict[str, dict[str, str]] = {}


def default_folder(run: Run) -> Path:
    """The folder `runs/RECIPE` of a training for which none is given.

    Raises:
        ConfigError: if the recipe's name, which may come from a file, is not that of a folder.
    """
    # the name of the path ".." is ".." itself
    if not run.recipe or run.recipe == ".." or Path(run.recipe).name != run.recipe:
        raise ConfigError(f"recipe {run.recipe!r} cannot name a folder below runs: choose --out")
    return Path("runs") / run.recipe


def to_json(run: Run) -> str:
    """The record that is stored with every checkpoint, and can be trained again."""
    return json.dumps(run.model_dump(mode="json"), indent=1) + "\n"


def parse_run(data: Any, source: str = "run") -> Run:
    """A `Run` from JSON data.

    Raises:
        ConfigError: one line naming the first wrong setting, the rule and its value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} must be a JSON object, got {type(data).__name__}")
    _check_keys(data, Run, source)
    try:
        # through JSON: strict types would refuse a list where a tuple is stored
        run = Run.model_validate_json(json.dumps(data))
        run.threat.check()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: {first_fault(error)}") from None
    return run


def read_run(path: Path) -> Run:
    """A `Run` from a JSON file.

    Raises:
        ConfigError: if it cannot be read or is not a valid run.
    """
    try:
        data = json.loads(path.read_text())
    except BAD_JSON as error:
        raise ConfigError(f"cannot read a run from {path}: {error}") from None
    return parse_run(data, str(path))


def override(run: Run, assignments: Sequence[str]) -> Run:
    """Apply `a.b=value` assignments; a value is JSON, or a string if it is not.

    Raises:
        ConfigError: for a malformed assignment, an unknown path or a value of the wrong type.
    """
    data = run.model_dump(mode="json")
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set takes PATH=VALUE, e.g. --set epochs=3, got {assignment!r}")
        try:
            value = json.loads(text)
        except BAD_JSON:
            value = text
        here = data
        for depth, key in enumerate(keys[:-1]):
            # a group that is unset, as `start`, is made by its first setting
            if here.get(key) is None:
                here[key] = {}
            here = here[key]
            if not isinstance(here, dict):
                where = ".".join(keys[: depth + 1])
                raise ConfigError(
                    f"--set {path}: {where} is a value and has no settings of its own"
                )
        if keys[1:] == ["name"] and keys[0] in _NAMED and here.get("name") != value:
            # another method or kind has other settings: only common ones are kept
            for setting in set(here) - _NAMED[keys[0]]:
                del here[setting]
        here[keys[-1]] = value
        # here, not once at the end, so that the message names the assignment
        _check_keys(data, Run, f"--set {path}")
    return parse_run(data, f"--set {' '.join(assignments)}" if assignments else "run")


def choose(mapping: Mapping[str, type[T]], settings: Mapping[str, Any], where: str) -> T:
    """The object that `{"name": ..., settings}` describes, resolved through `mapping`.

    Raises:
        ConfigError: for an unknown name or setting, or a value of the wrong type.
    """
    rest = dict(settings)
    if "name" not in rest:
        raise ConfigError(f'{where} needs a "name"; there are {", ".join(mapping)}')
    name = rest.pop("name")
    if not isinstance(name, str) or name not in mapping:
        raise ConfigError(
            f"unknown {where} {name!r}{suggestion(str(name), list(mapping))}; "
            f"there are {', '.join(mapping)}"
        )
    return construct(mapping[name], rest, where)


def construct(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """A keyword-only dataclass from JSON data, nested ones included; types are checked strictly.

    Raises:
        ConfigError: naming the setting, the rule and the value.
    """
    fields = _init_fields(cls)
    values: Settings = {}
    for key, value in settings.items():
        if key not in fields:
            raise ConfigError(
                f"unknown setting {where}.{key}{suggestion(key, list(fields))}; "
                f"there are {', '.join(fields) or 'none'}"
            )
        kind = fields[key]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{key} must be a group of settings, got {value!r}")
            values[key] = construct(kind, value, f"{where}.{key}")
            continue
        try:
            # strict: "3" is no number, and 1.5 no number of steps
            values[key] = TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
        except (ValidationError, TypeError) as error:
            raise ConfigError(f"{where}.{key}: {first_fault(error)}") from None
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except TypeError as error:
        # the text behind the call, as in "__init__() missing 1 required argument"
        raise ConfigError(f"{where}: {str(error).partition(')')[2].strip() or error}") from None


def settings_of(mapping: Mapping[str, type[Any]], value: Any) -> Settings:
    """The inverse of `choose`: name and all settings, defaults included, as JSON data."""
    name = next(key for key, cls in mapping.items() if cls is type(value))
    fields = {key: getattr(value, key) for key in _init_fields(type(value))}
    plain = {
        key: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v  # type: ignore[arg-type]  # an instance, never a class
        for key, v in fields.items()
    }
    # through JSON, so that tuples are lists as in a record that was read
    return {"name": name, **json.loads(json.dumps(plain))}


def _init_fields(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _check_keys(data: Mapping[str, Any], model: type[BaseModel], source: str) -> None:
    """Unknown keys are reported with the nearest known one, which pydantic's message lacks."""
    for key, value in data.items():
        known = list(model.model_fields)
        if key not in known:
            places = _places(data, key)
            meant = f" (did you mean {' or '.join(places)}?)" if places else suggestion(key, known)
            own = "" if meant or model is not Run else f"; if it is the method's own: defence.{key}"
            raise ConfigError(
                f"{source}: unknown setting {key!r}{meant}; there are {', '.join(known)}{own}"
            )
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value, Mapping):
            _check_keys(value, kind, f"{source}: {key}")


def _places(data: Mapping[str, Any], key: str, at: str = "") -> list[str]:
    """Paths of settings of this name within `data`, e.g. `defence.adversary.steps`."""
    groups = [(f"{at}{name}.", group) for name, group in data.items() if isinstance(group, Mapping)]
    return [
        place
        for inside, group in groups
        for place in ([inside + key] if key in group else []) + _places(group, key, inside)
    ]


def first_fault(error: Exception) -> str:
    """The first error of pydantic: place, rule and value; the text of other errors."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if isinstance(own := first.get("ctx", {}).get("error"), ConfigError):
        return f"{place + ': ' if place else ''}{own}"
    message = first["msg"].removeprefix("Input ")
    return f"{place + ' ' if place else ''}{message}, got {first['input']!r}"
