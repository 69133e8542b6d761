"""Selects comparable results; runs that differ only by their seed count as one method."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from redefense.report.tables import labels_of, summary_rows
from redefense.results.intervals import Estimate, accuracy_interval
from redefense.results.join import Result
from redefense.results.paired import protocol

SHOWN: Final = ("clean", "unaware", "aware", "best_member_alone", "averaged")
"""Figures of a group, by the keys of a summary row."""


def foremost(results: Sequence[Result]) -> list[Result]:
    """The main result of each run: on test images, under most attacks, then on most images."""

    def weight(result: Result) -> tuple[bool, bool, int, int]:
        # settings may have been chosen on validation images
        chosen_on = result.data.split == "validation"
        # then a headline: without one a result cannot be compared
        return not chosen_on, result.aware is not None, len(result.bounded), result.num_images

    runs = dict.fromkeys(result.name for result in results)
    return [max((r for r in results if r.name == run), key=weight) for run in runs]


def ranked(results: Sequence[Result]) -> list[Result]:
    """The comparable main results, highest aware accuracy first.

    They have the images, the attacks and the threat of the first result with an aware accuracy:
    accuracies on other images, under other attacks or within another budget are not comparable.
    """
    known = foremost(results)
    first = next((r for r in known if r.aware is not None), known[0])
    alike = [r for r in known if _about(r) == _about(first)]
    return sorted(alike, key=lambda r: -1.0 if r.aware is None else r.aware.value, reverse=True)


def _about(result: Result) -> tuple[object, ...]:
    attacks = sorted((c.cell.attack, c.cell.view, c.cell.repr) for c in result.bounded)
    # without stored settings the attacks themselves must agree
    return result.suites[0].images, result.norm, result.eps, protocol(result) or attacks


def repeats(results: Sequence[Result]) -> list[list[Result]]:
    """The `ranked` results, grouped by runs that differ only by their seed.

    Groups are in descending order of their means, results within a group in ascending order.
    """
    groups: dict[object, list[Result]] = {}
    for result in reversed(ranked(results)):
        groups.setdefault(_settings(result), []).append(result)
    return sorted(groups.values(), key=mean_aware, reverse=True)


def _settings(result: Result) -> object:
    """The run's settings without its seed; the result itself if they are unknown."""
    run = next((e.run for e in result.evaluations if e.run), {})
    if not isinstance(run.get("defence"), Mapping) or "seed" not in run or result.aware is None:
        return result
    # as text, since dictionaries cannot be keys; without the name, which is that of a folder
    return json.dumps({k: run[k] for k in sorted(run) if k not in ("name", "seed")}, sort_keys=True)


def mean_aware(group: Sequence[Result]) -> float:
    """Mean of the aware accuracy over runs; -1 if no run has one."""
    return sum(-1.0 if r.aware is None else r.aware.value for r in group) / len(group)


def best(results: Sequence[Result]) -> Result:
    """The run on the first screen: the median run over the seeds of the best method."""
    group = repeats(results)[0]
    # the lower one of two: never the luckier seed
    return group[(len(group) - 1) // 2]


def names(groups: Sequence[Sequence[Result]], results: Sequence[Result]) -> list[str]:
    """Name of each group: a single run's label, or the recipe or method of several runs."""
    called = dict(zip(results, labels_of(results), strict=True))
    found = [called[group[0]] if len(group) == 1 else _method(group) for group in groups]
    return [
        # groups of one method differ in their settings: distinguish them by their runs
        ", ".join(called[r] for r in group) if found.count(name) > 1 and len(group) > 1 else name
        for name, group in zip(found, groups, strict=True)
    ]


def _method(group: Sequence[Result]) -> str:
    """Common name of runs that differ only by their seed."""
    run = next(e.run for e in group[0].evaluations if e.run)
    return str(run.get("recipe") or run["defence"]["name"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure of several runs.

    Attributes:
        mean: over the runs, with its 95 % interval over images if the per-image records of all runs
            are known, or for a single run.
        sd: standard deviation over the runs; None for a single run.
    """

    mean: Estimate
    sd: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ only by their seed, and their figures by the keys `SHOWN`."""

    name: str
    runs: tuple[str, ...]
    figures: Mapping[str, Spread | None]


def grouped(results: Sequence[Result]) -> list[Group]:
    """One group per method among the comparable results, the best first."""
    groups = repeats(results)
    return [
        Group(
            name=name,
            runs=tuple(result.name for result in group),
            figures={key: _spread(group, key) for key in SHOWN},
        )
        for name, group in zip(names(groups, results), groups, strict=True)
    ]


def _spread(group: Sequence[Result], key: str) -> Spread | None:
    rows = summary_rows(group)
    found: list[Estimate] = [row[key] for row in rows if row[key] is not None]
    if len(found) < len(group) or _alone(group, key):
        return None
    if len(found) == 1:
        return Spread(mean=found[0], sd=None)
    values = [estimate.value for estimate in found]
    mean = Estimate(sum(values) / len(values))
    if (q := _per_image(group, key)) is not None:
        mean = accuracy_interval(q)
    return Spread(mean=mean, sd=float(np.std(values, ddof=1)))


def _alone(group: Iterable[Result], key: str) -> bool:
    """Whether this figure of a single network equals another one, which is shown."""
    return key not in ("clean", "aware") and all(result.num_members == 1 for result in group)


def _per_image(group: Sequence[Result], key: str) -> np.ndarray | None:
    """(n,) mean over runs of per-image correctness; None if it is unknown for a run."""
    images = {(r.suites[0].images[0], r.suites[0].images[3]) for r in group}
    each = [r.q_aware if key == "aware" else _clean(r) if key == "clean" else None for r in group]
    known = [q for q in each if q is not None]
    # a mean per image needs the same images in all runs
    if len(images) > 1 or len(known) < len(group) or len({len(q) for q in known}) > 1:
        return None
    found: np.ndarray = np.stack(known).mean(0)
    return found


def _clean(result: Result) -> np.ndarray | None:
    return next((s.clean.q for s in result.suites if s.clean.q is not None), None)


def sd_text(spread: Spread | None) -> str:
    """The standard deviation over seeds in percentage points; empty for a single run."""
    if spread is None or spread.sd is None or math.isnan(spread.sd):
        return ""
    return f"\u00b1 {100 * spread.sd:.1f}"
