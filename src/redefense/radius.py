"""Norms and radii of threats: as settings, on the command line and in text.

Imports no torch, as `redefense.config`.
"""

import math
import re
from numbers import Real
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator

from redefense.errors import ConfigError

Norm = Literal["inf", "2"]


def read_norm(value: object, what: str = "norm") -> Norm:
    """Parse a threat's norm: inf, 2, "inf", "Linf", "l2" and the like.

    Raises:
        ConfigError: for any other norm.
    """
    plain = str(value).lower().replace("\u221e", "inf").replace("\u2113", "l").replace(" ", "")
    match = re.fullmatch(r"(?:l[-_]?)?(?:(2)(?:\.0)?|inf(?:ty|inity)?)", plain)
    # text and numbers only, not True or tensors that print alike
    if match is None or not isinstance(value, str | Real):
        raise ConfigError(f"{what} must be 'inf' or '2' (or 'linf', 'l2'), got {value!r}")
    return cast(Norm, match[1] or "inf")


def read_eps(value: object, what: str = "eps") -> float:
    """Parse a radius: a number, or text such as "0.03" or "8/255".

    Raises:
        ConfigError: for anything else, and for non-finite numbers.
    """
    try:
        if isinstance(value, bool):
            raise TypeError  # noqa: TRY301 - float(True) is 1, which nobody means
        if isinstance(value, str):
            above, slash, below = value.partition("/")
            found = float(above) / (float(below) if slash else 1.0)
        else:
            found = float(cast(Any, value))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError):
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(
            f"{what} must be a finite number, or a fraction such as 8/255, got {value!r}"
        )
    return found


def eps_text(eps: float) -> str:
    """A radius as text: a short decimal as it is, else a fraction of 255 where it is one."""
    # 0.2 is 51/255 too, but is quoted as 0.2
    levels = round(eps * 255)
    long = len(f"{eps:g}") > 5
    return f"{levels}/255" if long and levels and abs(eps * 255 - levels) < 1e-5 else f"{eps:g}"


def norm_text(norm: object) -> str:
    """A norm as text, "L-inf" or "L2"; it is inf or 2, as text or number."""
    return "L2" if read_norm(norm) == "2" else "L-inf"


def budget_text(norm: object, eps: float) -> str:
    """A threat as text, such as "L-inf eps 8/255"; the norm is inf or 2, as text or number."""
    return f"{norm_text(norm)} eps {eps_text(eps)}"


Eps = Annotated[float, BeforeValidator(read_eps)]
"""A radius in a setting; fractions such as "8/255" are accepted."""


def check_linf(eps: float, what: str = "L-inf eps") -> None:
    """Check that an L-inf radius lies in the images' range; larger ones are meant in levels.

    Raises:
        ConfigError: if eps is not in [0, 1].
    """
    if not 0 <= eps <= 1:
        meant = f" (did you mean {eps:g}/255?)" if 1 < eps <= 255 else ""
        raise ConfigError(f"{what} must lie in [0, 1] as pixels do, got {eps:g}{meant}")
