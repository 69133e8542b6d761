"""Settings out of range are refused, and so is NaN, which compares as false with everything."""

import math
from collections.abc import Callable
from dataclasses import fields

import pytest

from redefense.attacks import ATTACKS
from redefense.errors import ConfigError
from redefense.limits import at_least, not_negative, positive, within


@pytest.mark.parametrize(
    "check",
    [lambda v: at_least(1, v=v), lambda v: positive(v=v), lambda v: not_negative(v=v),
     lambda v: within("(0, 1]", v=v), lambda v: within("[0, 1)", v=v)],
)  # fmt: skip
def test_numbers_that_are_not_numbers_lie_in_no_range(check: Callable[[float], None]) -> None:
    with pytest.raises(ConfigError, match=r"v must .*got nan"):
        check(math.nan)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_number_of_an_attack_may_be_nan(name: str) -> None:
    for field in fields(ATTACKS[name]):
        if isinstance(field.default, float):
            with pytest.raises(ConfigError):
                ATTACKS[name](**{field.name: math.nan})
