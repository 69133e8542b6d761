"""Figures with their intervals, and plots of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, repr=False)
class Figure:
    """An accuracy in [0, 1] and its 95 % interval; None if the evaluation did not measure it.

    Attributes:
        value: the accuracy, in exact expectation over the draw of a member.
        low: lower end of the interval; `high`, the upper end.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        known = self.low is not None and self.high is not None
        ends = f" [{100 * self.low:.1f}, {100 * self.high:.1f}]" if known else ""  # type: ignore[operator]  # both are known
        return f"{100 * self.value:.1f} %{ends}"

    def __repr__(self) -> str:
        return f"Figure({self})"


UNKNOWN: Final = Figure(None)


def figure_of(value: float | None, ends: Sequence[float] | None) -> Figure:
    """The figure of an accuracy and the ends of its interval."""
    low, high = (None, None) if value is None or ends is None else ends
    return Figure(value, low, high)


def plot_bars(ax: Any, figures: Mapping[str, Figure]) -> None:
    """Bars with their intervals; unknown figures are left out."""
    known = {name: f for name, f in figures.items() if f.value is not None}
    values = [100 * (f.value or 0.0) for f in known.values()]
    ax.barh(list(known), values, xerr=_errors(list(known.values())))
    ax.invert_yaxis()  # matplotlib draws the first bar at the bottom
    ax.set_xlim(0, 100)
    ax.set_xlabel("accuracy (%)")


def plot_curve(ax: Any, curve: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Accuracy over eps with intervals, for each of the named figures that is known everywhere."""
    radii = [point["eps"] for point in curve]
    for name in names:
        key = "aware" if name == "under attack" else name
        points = [figure_of(p[key], p.get(f"{key}_interval")) for p in curve]
        if all(point.value is not None for point in points):
            values = [100 * (point.value or 0.0) for point in points]
            ax.errorbar(radii, values, yerr=_errors(points), marker="o", label=name)
    ax.set_ylim(0, 100)
    ax.set_xlabel("eps")
    ax.set_ylabel("accuracy (%)")
    ax.legend()


def _errors(figures: Sequence[Figure]) -> NDArray[np.float64]:
    """Lengths of error bars in percent, (2, n); 0 where an interval is unknown."""
    ends = [
        (f.value, f.value if f.low is None else f.low, f.value if f.high is None else f.high)
        for f in figures
    ]
    value, low, high = np.array(ends, dtype=np.float64).T
    # matplotlib refuses negative lengths, which rounding could give
    lengths: NDArray[np.float64] = 100 * np.maximum(np.stack([value - low, high - value]), 0.0)
    return lengths
