"""Checks of settings: named choices, and ranges of numbers. Imports no torch, as `config`."""

import math
from collections.abc import Collection

from redefense.errors import ConfigError


def one_of(what: str, value: object, names: Collection[str]) -> None:
    """Check that a value is one of several names.

    Raises:
        ConfigError: with the names and the value.
    """
    if value not in names:
        *others, last = names
        raise ConfigError(f"{what} must be {', '.join(others)} or {last}, got {value!r}")


def at_least(least: int, **values: int | float) -> None:
    """Check that numbers are not smaller than `least`.

    Raises:
        ConfigError: naming the first that is, as the following functions do.
    """
    for name, value in values.items():
        if not value >= least:  # true for NaN, too
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def positive(**values: int | float) -> None:
    """Check that numbers are larger than 0."""
    for name, value in values.items():
        if not value > 0:  # false for NaN, too
            raise ConfigError(f"{name} must be positive, got {value}")


def not_negative(**values: int | float) -> None:
    """Check that numbers are finite and at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be finite and not negative, got {value}")


def within(interval: str, **values: int | float) -> None:
    """Check that numbers lie in an interval, such as "(0, 1]" for 0 < value <= 1."""
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        above = value > low if interval[0] == "(" else value >= low
        below = value < high if interval[-1] == ")" else value <= high
        if not (above and below):
            raise ConfigError(f"{name} must lie in {interval}, got {value}")
