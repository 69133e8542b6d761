"""The pair of figures that stands above an evaluation: unaware and aware of the draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from redefense.attacks.base import Attack
from redefense.evaluation.cells import Cell
from redefense.evaluation.metrics import Bools, Floats, worst_case
from redefense.evaluation.plan import Planned, threat_of
from redefense.evaluation.statistics import accuracy_interval, exact_expectation


def interval(q: Floats) -> list[float]:
    """95 % interval of the mean over images of what lies in [0, 1]."""
    estimate = accuracy_interval(q)
    assert estimate.low is not None
    assert estimate.high is not None
    return [estimate.low, estimate.high]


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The pair, and the records behind it.

    Attributes:
        figures: "unaware", "aware" and "aware_interval"; None where the suite cannot know.
        corrects: (A, M, n) every bounded attack at the headline's threat, the clean images last.
        worst: (M, n) the members on the image of the attack that hurts it most; None without pair.
        equal: (n,) expected correctness under those attacks alone that its rivals without a draw
            face, too; None if it met none of them.
    """

    figures: dict[str, Any]
    corrects: Bools
    worst: Bools | None
    equal: Floats | None = None


def headline(
    plan: Sequence[Planned],
    records: Mapping[str, Cell],
    mixture: Floats,
    beside: Sequence[Attack] = (),
) -> Headline:
    """Unaware and aware at one threat, that of the aware cells.

    Args:
        plan: the cells.
        records: of every cell and "clean".
        mixture: (M,) sampling probabilities.
        beside: the attacks that single members and the averaged ensemble face.
    """
    threat = threat_of(plan)
    bounded = [p for p in plan if p.attack.bounded and p.threat == threat]
    figures: dict[str, Any] = dict.fromkeys(("unaware", "aware", "aware_interval"))
    corrects = np.stack(
        [records[name].correct for name in (*(p.identity for p in bounded), "clean")]
    )
    if threat is None:
        return Headline(figures=figures, corrects=corrects, worst=None)
    q = np.stack([exact_expectation(c, mixture) for c in corrects])
    unaware = [float(q[i].mean()) for i, p in enumerate(bounded) if not p.aware]
    lowest = worst_case(list(q))
    figures |= {
        "unaware": min(unaware) if unaware else None,
        "aware": float(lowest.mean()),
        "aware_interval": interval(lowest),
    }
    images = np.arange(q.shape[1])
    worst = corrects[q.argmin(0), :, images].T
    faced = [i for i, p in enumerate(bounded) if p.aware and p.attack in beside]
    equal = worst_case([q[i] for i in (*faced, -1)]) if faced else None
    return Headline(figures=figures, corrects=corrects, worst=worst, equal=equal)
