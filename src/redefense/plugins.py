"""The names that commands and functions resolve: the package's own, and those of plug-ins.

A plug-in is whatever calls `redefense.register`, a file given with `--plugin`, or an installed
distribution with entry points in the groups `redefense.attacks`, `redefense.defences`,
`redefense.models`, `redefense.datasets`, `redefense.recipes` and `redefense.suites`. Imports no
torch: the mappings that hold the objects are imported when a name is registered or looked up.
"""

import contextlib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, TypeVar

from redefense.errors import ConfigError, text_of

T = TypeVar("T")
Origin = dict[str, str]
"""Where a name comes from: "distribution" and "version", or "file" and "sha256", or "module"."""

MODULES: Final[Mapping[str, str]] = {
    "attacks": "redefense.attacks",
    "defences": "redefense.defences",
    "models": "redefense.models",
    "datasets": "redefense.data",
    "recipes": "redefense.recipes",
    "suites": "redefense.evaluation.suite",
}
"""The kinds of names, and the module that makes the `Registry` of each."""

_PLAIN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_registries: dict[str, "Registry[Any]"] = {}
_loading: ContextVar[Origin | None] = ContextVar("loading", default=None)
_loaded: set[tuple[str, str]] = set()


class Registry(Mapping[str, T]):
    """A mapping from names to objects: built-in ones, and those registered later.

    Args:
        kind: a key of `MODULES`.
        own: built-in objects, which cannot be replaced.
        accept: maps (name, object) to the stored object; raises ConfigError for an invalid object.
    """

    def __init__(self, kind: str, own: Mapping[str, T], accept: Callable[[str, Any], T]) -> None:
        self.kind, self.own = kind, dict(own)
        self._accept = accept
        self._added: dict[str, tuple[T, Origin]] = {}
        _registries[kind] = self

    def __getitem__(self, name: str) -> T:
        return self.own[name] if name in self.own else self._added_or_installed(name)[0]

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self.own, *self._added, *_installed(self.kind)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        # that of `Mapping` would load the installed plug-in
        return name in self.own or name in self._added or name in _installed(self.kind)

    def accepted(self, name: str, value: Any) -> T:
        """The object to store under that name.

        Raises:
            ConfigError: for a built-in or malformed name, or an invalid object.
        """
        if not _PLAIN.fullmatch(name):
            raise ConfigError(
                f"{self.kind}: a name must begin with a letter or digit and consist of letters, "
                f"digits, '_', '-' and '.', got {name!r}"
            )
        if name in self.own:
            raise ConfigError(f"{self.kind}: {name!r} is redefense's own; choose another name")
        return self._accept(name, value)

    def add(self, name: str, value: T, origin: Origin) -> None:
        """Store an accepted object; a later one of the same name replaces it."""
        self._added[name] = (value, origin)

    def added(self) -> dict[str, T]:
        """The registered objects, without installed plug-ins that are not loaded yet."""
        return {name: value for name, (value, _) in self._added.items()}

    def origin(self, name: str) -> Origin | None:
        """Origin of a name; None for built-in and unknown ones."""
        if name in self.own or name not in self:
            return None
        return dict(self._added_or_installed(name)[1])

    def _added_or_installed(self, name: str) -> tuple[T, Origin]:
        if name not in self._added:
            point = _installed(self.kind)[name]
            origin = _origin_of(point)
            origins = " ".join(origin.values())
            try:
                value = point.load()
            except (Exception, SystemExit) as error:  # whatever the code of others raises
                raise ConfigError(
                    f"{self.kind}: {name!r} of the plug-in {origins} cannot be loaded: "
                    f"{type(error).__name__}: {text_of(error)}"
                ) from error
            self.add(name, self.accepted(name, value), origin)
        return self._added[name]


def registry(kind: str) -> Registry[Any]:
    """The mapping of a kind of names."""
    import_module(MODULES[kind])
    return _registries[kind]


def register(
    *,
    attacks: Mapping[str, Any] | None = None,
    defences: Mapping[str, Any] | None = None,
    models: Mapping[str, Any] | None = None,
    datasets: Mapping[str, Any] | None = None,
    recipes: Mapping[str, Any] | None = None,
    suites: Mapping[str, Any] | None = None,
) -> None:
    """Register objects by name, to be used wherever redefense accepts a name.

    All are checked before any is registered. Registered names can be replaced, built-in ones
    cannot.

    Args:
        attacks: `Attack` classes, or callables (model, x, y) -> x_adv; see
            `redefense.attacks.foreign`.
        defences: `Defence` classes.
        models: callables (num_classes, shape) -> module from images in [0, 1] to logits (B, C), or
            lists of such modules, of which member m of an ensemble starts as a copy of the m-th.
        datasets: callables that return a `redefense.data.Dataset`, or a pair of training and test
            images with labels, ((x, y), (x, y)); one with a parameter gets the PATH of `NAME:PATH`.
        recipes: `redefense.config.Run` objects, or callables that return one.
        suites: `Suite` objects, or lists of attacks.

    Raises:
        ConfigError: naming the invalid object and the reason.
    """
    given = {
        "attacks": attacks, "defences": defences, "models": models,
        "datasets": datasets, "recipes": recipes, "suites": suites,
    }  # fmt: skip
    # added one by one, since a suite may name a new attack; all removed again if one is refused
    before = {kind: dict(registry(kind)._added) for kind, objects in given.items() if objects}
    try:
        for kind, objects in given.items():
            for name, value in (objects or {}).items():
                held = registry(kind).accepted(name, value)
                registry(kind).add(name, held, _loading.get() or _module_of(value))
    except BaseException:
        for kind, added in before.items():
            registry(kind)._added = added
        raise


def load_file(path: Path) -> dict[str, list[str]]:
    """Run a user's Python file, which calls `redefense.register`.

    Returns:
        The names that it registers, by kind. A loaded file is not run again.

    Raises:
        ConfigError: if it cannot be read, raises an error, or registers nothing.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read the plug-in {path}: {error.strerror}") from None
    origin = {"file": path.name, "sha256": digest}
    # by content too, so that an edited file is run again
    if (str(path.resolve()), digest) not in _loaded:
        _run(path, origin)
        _loaded.add((str(path.resolve()), digest))
    names = {
        kind: [name for name in mapping.added() if mapping.origin(name) == origin]
        for kind, mapping in _registries.items()
    }
    found = {kind: names[kind] for kind in MODULES if names.get(kind)}
    if not found:
        raise ConfigError(f"the plug-in {path} registers nothing: let it call redefense.register")
    return found


def _run(path: Path, origin: Origin) -> None:
    # with the place, since files of one name must not share a module
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"redefense_plugin_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"the plug-in {path} must be a Python file, FILE.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints look their module up there
    token = _loading.set(origin)
    try:
        # stdout is reserved for machine-readable output
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"the plug-in {path}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        line = next(
            (frame.lineno for frame in reversed(_frames(error)) if frame.filename == str(path)),
            getattr(error, "lineno", None),
        )
        at = "" if line is None else f", line {line}"
        raise ConfigError(
            f"the plug-in {path}{at}: {type(error).__name__}: {' '.join(text_of(error).split())}"
        ) from error
    finally:
        _loading.reset(token)


def raised_in(error: BaseException) -> str | None:
    """File and line of the plug-in given with `--plugin` in which an error arose, if any."""
    mine = [m for name, m in sys.modules.items() if name.startswith("redefense_plugin_")]
    files = {getattr(module, "__file__", None) for module in mine}
    found = (f for f in reversed(_frames(error)) if f.filename in files)
    return next((f"{Path(f.filename).name}, line {f.lineno}" for f in found), None)


def _frames(error: BaseException) -> list[Any]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))


def origins(named: Iterable[tuple[str, str]]) -> dict[str, Origin]:
    """Origins of those of some names (kind, name) that are not built in.

    Returns:
        Origins by "KIND.NAME".
    """
    found = {f"{kind}.{name}": registry(kind).origin(name) for kind, name in named}
    return {key: origin for key, origin in found.items() if origin is not None}


GIVEN: Final = "given-"
"""Names of networks and data that were given as objects begin with it; a digest follows."""


def check_known(recorded: Mapping[str, Origin]) -> None:
    """Check that the plug-ins of a record are available.

    Args:
        recorded: the result of `origins` when the record was made.

    Raises:
        ConfigError: naming the plug-in, and how to load it.
    """
    for key, origin in recorded.items():
        kind, _, name = key.partition(".")
        if kind in MODULES and name not in registry(kind):
            if name.startswith(GIVEN):
                source = "were given as objects"
                remedy = "pass equal ones (seed torch before you make networks)"
            else:
                source = "plug-ins bring"
                remedy = "install it, give its file with --plugin FILE.py"
            raise ConfigError(
                f"this needs {name!r} of {words(origin)}, one of the {kind} that {source}: "
                f"{remedy}, or call redefense.register"
            )


def words(origin: Mapping[str, str]) -> str:
    """An origin as text."""
    if "distribution" in origin:
        return f"the distribution {origin['distribution']} {origin.get('version', '')}".strip()
    if "file" in origin:
        return f"the file {origin['file']}"
    return f"the module {origin.get('module', 'unknown')}"


def summary_of(value: Any) -> str:
    """One-line description of an object: its `summary`, or the first line of its docstring."""
    own = getattr(value, "summary", None)
    if isinstance(own, str) and own:
        return own
    lines = (getattr(value, "__doc__", None) or "").strip().splitlines()
    return lines[0].rstrip(".") if lines else ""


@cache
def _installed(kind: str) -> Mapping[str, EntryPoint]:
    """Entry points by name; of two with one name the first distribution's, by its name."""
    points = sorted(
        entry_points(group=f"redefense.{kind}"),
        key=lambda point: point.dist.name if point.dist is not None else "",
        reverse=True,  # the last of equal keys stays in a dictionary
    )
    return {point.name: point for point in points}


def _origin_of(point: EntryPoint) -> Origin:
    if point.dist is None:
        return {"module": point.module}
    return {"distribution": point.dist.name, "version": point.dist.version}


def _module_of(value: Any) -> Origin:
    module = getattr(value, "__module__", None) or type(value).__module__
    return {"module": str(module)}
