"""The headline of an evaluation: accuracy under unaware and under aware attackers."""

from collections.abc import Mapping, Sequence
from typing import Any

from redefense.evaluation.cascade.worst_case import WorstCase
from redefense.evaluation.cells import Cell
from redefense.evaluation.plan import Planned, threat_of
from redefense.results.accuracy import Floats
from redefense.results.intervals import accuracy_interval, exact_expectation


def interval(q: Floats) -> list[float]:
    """95 % interval of the mean over images of values in [0, 1]."""
    estimate = accuracy_interval(q)
    assert estimate.low is not None
    assert estimate.high is not None
    return [estimate.low, estimate.high]


def headline(
    plan: Sequence[Planned], records: Mapping[str, Cell], worst: WorstCase | None
) -> dict[str, Any]:
    """Unaware and aware accuracy at the threat of the aware cells; None if not measured.

    Args:
        plan: the cells.
        records: of every cell.
        worst: the worst case over all attacks; None for a suite without aware cells.
    """
    if worst is None:
        return dict.fromkeys(("unaware", "aware", "aware_interval"))
    threat = threat_of(plan)
    # of whole cells, not of the worst case per image: an unaware attacker runs one attack
    unaware = [
        float(exact_expectation(records[p.identity].correct, worst.mixture).mean())
        for p in plan
        if p.attack.bounded and p.threat == threat and not p.aware
    ]
    return {
        "unaware": min(unaware) if unaware else None,
        "aware": float(worst.q.mean()),
        "aware_interval": interval(worst.q),
    }
