"""Train, attack, measure and deploy robust classifier ensembles, above all randomized ones.

Public names are imported on first use, so that `import redefense` and the command line are fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# for type checkers and editors, which do not run `__getattr__`
if TYPE_CHECKING:
    from redefense.ensembles import Hyper, Independent
    from redefense.errors import RedefenseError
    from redefense.evaluation.api import evaluate
    from redefense.export.loading import load
    from redefense.hub import from_pretrained, push_to_hub, save_pretrained
    from redefense.plugins import register
    from redefense.stochastic.ensemble import Stochastic
    from redefense.threat import Threat
    from redefense.train.api import train

    __version__: str

_MODULES = {
    "Hyper": "redefense.ensembles",
    "Independent": "redefense.ensembles",
    "RedCheckWarning": "redefense.errors",
    "RedefenseError": "redefense.errors",
    "Stochastic": "redefense.stochastic.ensemble",
    "Threat": "redefense.threat",
    "evaluate": "redefense.evaluation.api",
    "from_pretrained": "redefense.hub",
    "load": "redefense.export.loading",
    "push_to_hub": "redefense.hub",
    "register": "redefense.plugins",
    "save_pretrained": "redefense.hub",
}

# `train` is also callable; none is imported before its first use
_PACKAGES = {
    "attacks", "config", "data", "defences", "ensembles", "errors", "export", "models", "penalties",
    "rng", "stochastic", "threat", "train", "types",
}  # fmt: skip

__all__ = [
    "Hyper",
    "Independent",
    "RedCheckWarning",
    "RedefenseError",
    "Stochastic",
    "Threat",
    "__version__",
    "evaluate",
    "from_pretrained",
    "load",
    "push_to_hub",
    "register",
    "save_pretrained",
    "train",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"redefense.{name}")
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'redefense' has no attribute {name!r}")
    globals()[name] = value  # so that `__getattr__` is called once per name
    return value


def _version() -> str:
    """The installed version; a clone that is only on the path has none."""
    metadata = import_module("importlib.metadata")
    try:
        return str(metadata.version("redefense"))
    except metadata.PackageNotFoundError:
        return "0+unknown"
