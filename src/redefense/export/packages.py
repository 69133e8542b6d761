"""Optional packages: imported by name, or an error that names what to install."""

from importlib import import_module
from typing import Any

from redefense.errors import ConfigError, lacking


def need(name: str, *, extra: str = "onnx") -> Any:
    """The module of that name, which an extra of redefense installs.

    Raises:
        ConfigError: if its package is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = (error.name or name).partition(".")[0]
        raise ConfigError(lacking("this", package, extra)) from None
