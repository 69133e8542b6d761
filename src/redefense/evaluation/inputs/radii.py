"""Several radii of one threat: an evaluation at each, and the curve over them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from redefense.errors import ConfigError, RedCheckWarning
from redefense.evaluation.report_object import Report
from redefense.radius import eps_text, read_eps

FALL = 1e-9
"""Figures that differ by less are equal."""


def read_radii(eps: Any, what: str = "eps") -> list[float]:
    """Radii in ascending order, from a number, text such as "2/255,8/255", or a list.

    Raises:
        ConfigError: for anything else, or a repeated radius.
    """
    if eps is None:
        return []
    if getattr(eps, "ndim", 0) == 1:  # an array or a tensor
        eps = eps.tolist()
    if isinstance(eps, str):
        eps = eps.split(",")
    elif not isinstance(eps, Sequence):
        eps = [eps]
    radii = sorted(read_eps(part, what) for part in eps)
    if not radii:
        raise ConfigError(f"{what} needs at least one radius, got {eps!r}")
    if len(set(radii)) < len(radii):
        raise ConfigError(f"{what} has a radius twice: {', '.join(eps_text(r) for r in radii)}")
    return radii


def over(radii: Sequence[float], evaluate: Callable[[float, str], Report]) -> Report:
    """Evaluate at each radius.

    A smaller ball lies within the larger ones, so the curve has the lowest accuracy up to each
    radius. If the accuracy at a larger radius is higher, its attacks have not converged.

    Args:
        radii: in ascending order.
        evaluate: maps a radius and the name under which it is saved ("" for the largest) to its
            report.

    Returns:
        The report of the largest radius, whose `curve` has one entry for each.

    Warns:
        RedCheckWarning: if the accuracy at a larger radius is higher than at a smaller one.
    """
    # the largest last: its report, which gets the curve, takes the place of a single evaluation
    reports = [evaluate(r, "" if r == radii[-1] else f"eps-{r:.6g}") for r in radii]
    last = reports[-1]
    curve: list[dict[str, Any]] = []
    for radius, report in zip(radii, reports, strict=True):
        entry: dict[str, Any] = {"eps": radius}
        for name, figure in (("unaware", report.unaware), ("aware", report.aware)):
            entry |= {name: figure.value, f"{name}_interval": None}
            if figure.value is not None:
                entry[f"{name}_interval"] = [figure.low, figure.high]
            before = curve[-1][name] if curve else None
            if before is None or figure.value is None or figure.value <= before + FALL:
                continue
            message = RedCheckWarning(
                f"{name} accuracy is {100 * figure.value:.1f} % at eps {eps_text(radius)} and "
                f"{100 * before:.1f} % at {eps_text(curve[-1]['eps'])}: the attacks at the larger "
                "radius have not converged, and the curve shows the lower figure",
                last,
            )
            warnings.warn(message, stacklevel=4)  # the line that called `evaluate`
            entry |= {key: curve[-1][key] for key in (name, f"{name}_interval")}
        curve.append(entry)
    last.data["eps_curve"] = curve
    return last
