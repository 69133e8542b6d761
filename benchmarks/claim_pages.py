"""Claims as people look at them: the report page, a table of methods, a table of attacks.

`claims.py` is the command, `claim_files.py` the format.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from claim_files import Attacked, Claim, Evaluated, Figure, Plan, least, packed, read, unpacked
from numpy.typing import NDArray

from redefense.errors import ConfigError, DataError
from redefense.report.page import write_pages
from redefense.report.tables import markdown_table, percent, with_interval
from redefense.results.intervals import (
    Estimate,
    accuracy_interval,
    paired_difference,
    success_within,
)
from redefense.results.join import TRIES, Result
from redefense.results.records import (
    Accuracy,
    Budget,
    Cell,
    Check,
    Clean,
    Data,
    Evaluation,
    Scored,
    Stored,
)


def result(it: Claim) -> Result:
    """The headline of a claim as the report shows it, without what a claim does not hold.

    Which members an attack fooled, and what one member keeps of each image, are not held; nor are
    the self-checks that passed.
    """
    found = it.headline
    cells = tuple(_scored(cell, found) for cell in found.cells)
    unaware = min(
        (c for c in cells if c.cell.bounded and not c.cell.aware and c.q is not None),
        key=lambda c: c.cell.accuracy.expected or 0.0,
        default=None,
    )
    q = found.per_image()
    return Result(
        name=it.name, norm=found.norm, eps=found.eps,
        suites=tuple(_evaluation(it, plan) for plan in found.suites), cells=cells,
        clean=_estimate(found.clean), clean_averaged=None, clean_members=found.clean_members,
        unaware=_estimate(found.unaware), unaware_label=None if unaware is None else unaware.label,
        aware=_estimate(found.aware), single=_estimate(found.best_single_member),
        single_index=None, chosen_on=None, averaged=_estimate(found.averaged),
        alone=tuple(figure.estimate for figure in found.alone),
        over_single=_estimate(found.over_single), over_averaged=_estimate(found.over_averaged),
        over_alone=_estimate(found.over_alone), q_aware=q, fooled=None,
        tries_aware=None if q is None else success_within(q, TRIES),
        tries_unaware=(
            None if unaware is None or unaware.q is None else success_within(unaware.q, TRIES)
        ),
        checks=tuple(Check(id=name, passed=False) for name in found.red_checks),
        notes=("From a claim: which members an attack fooled at once is not kept there.",),
    )  # fmt: skip


def _scored(cell: Attacked, found: Evaluated) -> Scored:
    value, low, high = _estimate(cell.expected) or (None, None, None)
    q = None if cell.each is None else unpacked(cell.each)
    met = None if cell.met is None else unpacked(cell.met) > 0
    kept = Cell(
        id=cell.id, attack=cell.attack, view=cell.view, aware=cell.aware, bounded=cell.bounded,
        repr=cell.repr, accuracy=Accuracy(expected=value),
        threat=Budget(norm=found.norm, eps=found.eps) if cell.bounded else None,
        interval=None if low is None or high is None else (low, high),
    )  # fmt: skip
    suite = " + ".join(map(suite_name, found.suites))
    return Scored(cell=kept, suite=suite, correct=None, q=q, met=met)


def drawn(found: Evaluated) -> Estimate | None:
    """The draw, to be compared with its members and their average: each in its own worst case.

    In older claims all three were compared under the attacks that were run on all of them.
    """
    attacked = [unpacked(c.each) for c in found.cells if c.faced and c.each is not None]
    if attacked and found.untouched is not None:
        return accuracy_interval(np.min([*attacked, unpacked(found.untouched)], axis=0))
    return _estimate(found.aware)


def _evaluation(it: Claim, plan: Plan) -> Stored:
    evaluation = Evaluation(
        schema=1, suite=suite_name(plan), run={"name": it.name, **it.run},
        provenance=plan.provenance, data=Data(**it.headline.data), clean=Clean(),
    )  # fmt: skip
    return Stored(
        name=it.name, source=None, file=None, plan=None, evaluation=evaluation, index=None,
        clean=Scored(cell=Cell(id="clean", attack="clean"), suite="", correct=None, q=None),
        cells=(), further=(), single=None, averaged=None, alone=None,
    )  # fmt: skip


def suite_name(plan: Plan) -> str:
    return plan.suite if isinstance(plan.suite, str) else str(plan.suite["name"])


def _estimate(found: Figure | None) -> Estimate | None:
    return None if found is None else found.estimate


def report(paths: Sequence[Path], out: Path, images: int | None = None) -> list[Path]:
    """The report page over claims, and Markdown, CSV and JSON beside it.

    Args:
        paths: files of claims, one row each.
        out: the page.
        images: only what was measured on so many; claims without are left out.

    Raises:
        ConfigError: if none is left, or as `write_pages`.
    """
    shown = {path: it for path in paths if (it := on_images(read(path), images)) is not None}
    if not shown:
        raise ConfigError(f"no claim was measured on --images {images}")
    commands = [f"python benchmarks/claims.py recompute {path} --data SPEC" for path in shown]
    return write_pages(list(map(result, shown.values())), commands, out, paths)


def on_images(it: Claim, images: int | None) -> Claim | None:
    return it if images is None else it.on(images)


def with_brackets(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose intervals keep their brackets: in these pages they are no links."""
    return markdown_table(heading, rows).replace("\\[", "[").replace("\\]", "]")


COLUMNS: Final = (
    "method", "images", "clean", "unaware", "aware", "same attacks", "best member", "averaged",
    "cost",
)  # fmt: skip


def table(claims: Sequence[Claim], against: str | None = None) -> str:
    """A Markdown table, percent with 95 % intervals, cost in millions of a member's forward passes.

    The best member is the one that is best on these images, where all were attacked. Under "same
    attacks" is what the ensemble keeps under those that this member and the average met, too; that
    is its aware figure, unless the claim is an older one.

    Args:
        claims: one row each, in this order.
        against: name of the claim from which paired differences of the aware figure are taken.
    """
    base = None if against is None else next(c for c in claims if c.name == against).headline
    rows = []
    for it in claims:
        found = it.headline
        shown = result(it)
        figures = [
            shown.clean, shown.unaware, shown.aware, drawn(found), shown.best_alone, shown.averaged
        ]  # fmt: skip
        row = [it.name, str(found.data["num_images"])]
        row += [with_interval(figure) for figure in figures]
        row += [f"{it.passes / 1e6:.2f}"]
        if base is not None:
            row.append(_paired(found, base))
        rows.append(row)
    heading = [*COLUMNS, *([] if against is None else [f"aware, against {against}"])]
    return with_brackets(heading, rows)


DRAW_COLUMNS: Final = (
    "method", "images", "drawn", "best member", "draw over best member", "averaged",
    "draw over average",
)  # fmt: skip


def draw_table(claims: Sequence[Claim]) -> str:
    """A Markdown table of what drawing is worth, percent and points with 95 % intervals.

    The draw, the member that is best on these images and the average, each in its own worst case
    (in older claims, under the attacks that all three have met); single networks are left out.

    Args:
        claims: one row each, in this order.
    """
    rows = []
    for it in claims:
        found, shown = it.headline, result(it)
        if len(found.alone) < 2:
            continue
        figures = [
            with_interval(drawn(found)),
            percent(shown.best_alone),
            _over(found.over_alone, drawn(found), shown.best_alone),
            percent(shown.averaged),
            _over(found.over_averaged, drawn(found), shown.averaged),
        ]
        rows.append([it.name, str(found.data["num_images"]), *figures])
    return with_brackets(DRAW_COLUMNS, rows)


def _over(gained: Figure | None, drawn: Estimate | None, rival: Estimate | None) -> str:
    """The paired gain; in a claim that kept no such pairs the bare difference."""
    if gained is None and drawn is not None and rival is not None:
        gained = Figure(value=drawn.value - rival.value)
    return percent(None) if gained is None else _points(gained)


def _points(found: Figure) -> str:
    ends = (f"{100 * end:+.1f}" for end in (found.low, found.high) if end is not None)
    return f"{100 * found.value:+.1f} [{', '.join(ends)}]".removesuffix(" []")


def attacks_table(
    claims: Sequence[Claim], images: int | None = None, against: str | None = None
) -> str:
    """A Markdown table, percent: one row an attack, one column a claim, and how sure they are.

    Attackers who do not know of the draw, each by the settings and view that left least. Then the
    least that one bounded attack left, as it would be quoted; what is left by the worst of them for
    each image; and the same once attackers who know the ensemble are counted as well.
    Unbounded attacks come last, under their own words, for they are no part of a headline.

    Args:
        claims: one column each, in this order.
        images: only what was measured on so many; claims without are left out.
        against: name of the claim from which paired differences are shown, where a row has them.
    """
    shown = {it.name: part.headline for it in claims if (part := on_images(it, images)) is not None}
    cells = {name: _least_of_each(e) for name, e in shown.items()}
    met = {
        name: {key: _Shown(_estimate(c.expected), c.each) for key, c in each.items()}
        for name, each in cells.items()
    }
    bounded = _by_attack(met, unbounded=False)
    quoted = {
        name: min(found, key=lambda it: it.value)
        for name in shown
        if (found := [row[name] for row in bounded.values() if name in row])
    }
    worst = {name: _worst(e, unaware=True) for name, e in shown.items()}
    knowing = {it.name: _knowing(it, shown[it.name]) for it in claims if it.name in shown}
    rows: dict[str, dict[str, _Shown]] = {
        "clean": {name: _Shown(_estimate(e.clean), e.untouched) for name, e in shown.items()},
        **bounded,
        "least of these": quoted,
        "worst of these for each image": _summed(worst),
        "with attackers who know": _summed(knowing),
        **_by_attack(met, unbounded=True),
    }
    views = [", ".join(sorted({c.view for c in each.values()})) for each in cells.values()]
    lines = [["views", *views]]
    for head, row in rows.items():
        base = None if against is None else row.get(against)
        lines.append([head, *(_beside(row.get(name), base) for name in shown)])
    reach = max(s.reach for row in rows.values() for s in row.values())
    note = f"95 % intervals reach at most {100 * reach:.1f} points to a side"
    if against is not None:
        note += f"; in parentheses paired differences from {against}"
    return f"{with_brackets(['attack', *shown], lines)}\n\n{note}"


class _Shown(NamedTuple):
    """A figure of a table, and the packed correctness of each image behind it if that is kept."""

    estimate: Estimate | None
    each: str | None = None

    @property
    def value(self) -> float:
        return 1.0 if self.estimate is None else self.estimate.value

    @property
    def reach(self) -> float:
        """How far its interval goes from it, to the farther side."""
        value, low, high = self.estimate or (0.0, None, None)
        return 0.0 if low is None or high is None else max(value - low, high - value)


def _least_of_each(found: Evaluated) -> dict[tuple[bool, str], Attacked]:
    """By (unbounded, attack), the cell that left least, of attackers who do not know of a draw."""
    cells = sorted(found.cells, key=lambda cell: -cell.expected.value if cell.expected else -1.0)
    return {(not c.bounded, c.attack): c for c in cells if not c.aware}


def _by_attack(
    met: Mapping[str, Mapping[tuple[bool, str], _Shown]], *, unbounded: bool
) -> dict[str, dict[str, _Shown]]:
    """By attack and name, in alphabetical order."""
    attacks = sorted(
        {attack for each in met.values() for other, attack in each if other is unbounded}
    )
    return {
        attack + " (unbounded)" * unbounded: {
            name: each[unbounded, attack]
            for name, each in met.items()
            if (unbounded, attack) in each
        }
        for attack in attacks
    }


def _summed(left: Mapping[str, NDArray[np.float64] | None]) -> dict[str, _Shown]:
    return {n: _Shown(accuracy_interval(q), packed(q)) for n, q in left.items() if q is not None}


def _worst(found: Evaluated, *, unaware: bool = False) -> NDArray[np.float64] | None:
    """Per image what the worst bounded attack leaves; None without such, or without records."""
    if not unaware and found.lowest is not None:
        return found.per_image()
    knowing = {c.key for c in found.cells if c.aware and unaware}
    try:
        return least(found, found.attacks().keys() - knowing)
    except DataError:
        return None


def _beside(it: _Shown | None, base: _Shown | None) -> str:
    if it is None or base is None or it is base or it.each is None or base.each is None:
        return percent(None if it is None else it.estimate)
    return f"{percent(it.estimate)} ({gain(unpacked(it.each), unpacked(base.each))})"


def _knowing(it: Claim, found: Evaluated) -> NDArray[np.float64] | None:
    """What the worst attack for each of these images leaves, those of larger evaluations too.

    None if no attacker who knows the ensemble met these images. Numbers of images are the first so
    many of one permutation.
    """
    n = found.data["num_images"]
    others = [
        e
        for e in it.evaluations
        if (e.norm, e.eps, e.data["split"]) == (found.norm, found.eps, found.data["split"])
        and e.data["num_images"] >= n
    ]
    if not any(e.aware is not None for e in others):
        return None
    each = [q[:n] for e in others if (q := _worst(e)) is not None]
    lowest: NDArray[np.float64] = np.min(each, axis=0)
    return lowest if len(each) == len(others) else None


def gain(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    """The mean paired difference in points with its 95 % interval."""
    value, low, high = paired_difference(mine, theirs)
    return _points(Figure(value=value, low=low, high=high))


def _paired(found: Evaluated, base: Evaluated) -> str:
    """Points gained over the base on the same images, over the attacks that both met."""
    one, other = found.per_image(), base.per_image()
    if found is base or one is None or other is None or found.data != base.data:
        return ""
    mine, theirs, note = found.attacks(), base.attacks(), ""
    if mine.keys() != theirs.keys():
        common = mine.keys() & theirs.keys()
        try:
            one, other = (least(e, common) for e in (found, base))
        except DataError:
            return "other attacks"
        note = f", {len(common)} attacks of both"
        known = ~np.isnan(one) & ~np.isnan(other)
        if not known.all():
            one, other, note = one[known], other[known], f"{note}, {known.sum()} images"
    return gain(one, other) + note
