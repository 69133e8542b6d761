"""Claims as Markdown tables: of methods, of the gain of the draw, and of attacks."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from redefense.claims.format import (
    Attacked,
    Claim,
    Evaluated,
    Figure,
    estimate_of,
    least,
    packed,
    read,
    records_of,
    unpacked,
)
from redefense.errors import ConfigError, DataError
from redefense.report.tables import markdown_table, percent, points, with_interval
from redefense.results.intervals import Estimate, accuracy_interval, paired_difference
from redefense.results.paired import worst_case_gain


def read_whole(path: Path) -> Claim:
    """A stored claim whose per-image records are intact.

    Raises:
        DataError: as `read`, and for records that cannot be read or are of other images.
    """
    it = read(path)
    # before the first figure is shown: it may need any of the records
    for found in it.evaluations:
        every = (*found.cells, *(found.further or ()))
        texts = [(c.id, text, True) for c in every for text in (c.each, c.met)]
        texts += [("clean", found.untouched, True), ("the worst case", found.lowest, False)]
        for name, text, deflated in texts:
            if text is None:
                continue
            try:
                size = len(unpacked(text, deflated=deflated))
            except (ValueError, zlib.error):
                # no number of images, so the records count as damaged
                size = -1
            if size != found.data["num_images"]:
                raise DataError(
                    f"{path}: the records of {name} are damaged; see `redefense claim check {path}`"
                )
    return it


def chosen(
    claims: Sequence[Claim], kind: str, images: int | None = None, against: str | None = None
) -> str:
    """The table of the given kind.

    Args:
        claims: one row each, or one column each in the table of attacks.
        kind: "methods", "draw" or "attacks".
        images: use only results on this number of images.
        against: name of the reference claim of paired differences.

    Raises:
        ConfigError: if no such claim is shown, or the kind has no differences.
    """
    shown = [part for it in claims if (part := it.on(images)) is not None]
    if not shown:
        sizes = sorted({e.data["num_images"] for it in claims for e in it.evaluations})
        raise ConfigError(
            f"no claim was measured on --images {images}; there are results on "
            f"{', '.join(map(str, sizes))}"
        )
    if against not in (None, *(names := [it.name for it in shown])):
        raise ConfigError(
            f"--against must be one of the claims in the table ({', '.join(names)}), got {against}"
        )
    if kind == "draw" and against is not None:
        raise ConfigError("--draw compares each claim with its own members: remove --against")
    if kind == "draw":
        return draw_table(shown)
    return attacks_table(claims, images, against) if kind == "attacks" else table(shown, against)


def drawn(found: Evaluated) -> Estimate | None:
    """Accuracy of the sampled ensemble in its own worst case, for comparison with the baselines.

    In older claims it is the accuracy under the attacks that were also run on the baselines.
    """
    attacked = [unpacked(c.each) for c in found.cells if c.on_baselines and c.each is not None]
    if attacked and found.untouched is not None:
        return accuracy_interval(np.min([*attacked, unpacked(found.untouched)], axis=0))
    return estimate_of(found.aware)


def with_brackets(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with unescaped brackets of intervals, which are not links here."""
    return markdown_table(heading, rows).replace("\\[", "[").replace("\\]", "]")


COLUMNS: Final = (
    "method", "images", "clean", "unaware", "aware", "same attacks", "best member", "averaged",
    "training cost",
)  # fmt: skip


def table(claims: Sequence[Claim], against: str | None = None) -> str:
    """A Markdown table, percent with 95 % intervals, cost in millions of a member's forward passes.

    The best member is the best on these images, if all members were attacked. The column "same
    attacks" is the ensemble's accuracy under the attacks that were also run on the baselines; it
    equals the aware figure except in older claims.

    Args:
        claims: one row each, in this order.
        against: name of the reference claim of paired differences of the aware figure.
    """
    # there is one, which `chosen` has checked
    base = None if against is None else next(c for c in claims if c.name == against).headline
    rows = []
    for it in claims:
        found = it.headline
        figures = [
            *map(estimate_of, (found.clean, found.unaware, found.aware)),
            drawn(found), estimate_of(found.best_alone), estimate_of(found.averaged),
        ]  # fmt: skip
        row = [it.name, str(found.data["num_images"])]
        row += [with_interval(figure) for figure in figures]
        row += [percent(None) if it.passes is None else f"{it.passes / 1e6:.2f}"]
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
    """A Markdown table of the gain of the draw, percent and points with 95 % intervals.

    It compares the draw, the best member on these images and the average, each in its own worst
    case (in older claims, under matched attacks). Single networks are skipped.

    Args:
        claims: one row each, in this order.
    """
    rows = []
    for it in claims:
        found = it.headline
        if len(found.alone) < 2:
            continue
        figures = [
            with_interval(drawn(found)),
            percent(estimate_of(found.best_alone)),
            _over(found.over_alone, drawn(found), estimate_of(found.best_alone)),
            percent(estimate_of(found.averaged)),
            _over(found.over_averaged, drawn(found), estimate_of(found.averaged)),
        ]
        rows.append([it.name, str(found.data["num_images"]), *figures])
    return with_brackets(DRAW_COLUMNS, rows)


def _over(gained: Figure | None, drawn: Estimate | None, baseline: Estimate | None) -> str:
    """The paired gain; the plain difference for claims without paired results."""
    if gained is None and drawn is not None and baseline is not None:
        gained = Figure(value=drawn.value - baseline.value)
    return percent(None) if gained is None else points(gained.estimate)


def attacks_table(
    claims: Sequence[Claim], images: int | None = None, against: str | None = None
) -> str:
    """A Markdown table in percent: one row per attack, one column per claim.

    The first rows are unaware attacks, each with its strongest settings and view. Then follow the
    lowest accuracy of one bounded unaware attack, the per-image worst case over them, and the worst
    case including aware attacks. Unbounded attacks come last, since they are not part of a
    headline.

    Args:
        claims: one column each, in this order.
        images: use only results on this number of images; claims without such results are skipped.
        against: name of the reference claim of paired differences, in rows that have them.
    """
    shown = {it.name: part.headline for it in claims if (part := it.on(images)) is not None}
    cells = {name: _least_of_each(e) for name, e in shown.items()}
    met = {
        name: {key: _Shown(estimate_of(c.expected), c.each) for key, c in each.items()}
        for name, each in cells.items()
    }
    bounded = _by_attack(met, unbounded=False)
    quoted = {
        # one attack for all images, the strongest on average, as an unaware headline states it
        name: min(found, key=lambda it: it.value)
        for name in shown
        if (found := [row[name] for row in bounded.values() if name in row])
    }
    worst = {name: _worst(e, unaware=True) for name, e in shown.items()}
    aware = {it.name: _least_with_aware(it, shown[it.name]) for it in claims if it.name in shown}
    rows: dict[str, dict[str, _Shown]] = {
        "clean": {name: _Shown(estimate_of(e.clean), e.untouched) for name, e in shown.items()},
        **bounded,
        "least of these": quoted,
        "worst of these for each image": _summed(worst),
        "with attackers who know": _summed(aware),
        **_by_attack(met, unbounded=True),
    }
    views = [", ".join(sorted({c.view for c in each.values()})) for each in cells.values()]
    lines = [["views", *views]]
    for head, row in rows.items():
        base = None if against is None else row.get(against)
        lines.append([head, *(_with_difference(row.get(name), base) for name in shown)])
    # one line for all intervals: in each cell they would hide the figures
    reach = max(s.reach for row in rows.values() for s in row.values())
    note = f"95 % intervals reach at most {100 * reach:.1f} points to a side"
    if against is not None:
        note += f"; in parentheses paired differences from {against}"
    return f"{with_brackets(['attack', *shown], lines)}\n\n{note}"


class _Shown(NamedTuple):
    """A figure of a table, with its packed per-image correctness if known."""

    estimate: Estimate | None
    each: str | None = None

    @property
    def value(self) -> float:
        # an unknown figure is never the least
        return 1.0 if self.estimate is None else self.estimate.value

    @property
    def reach(self) -> float:
        """The larger distance of the figure from an end of its interval."""
        value, low, high = self.estimate or (0.0, None, None)
        return 0.0 if low is None or high is None else max(value - low, high - value)


def _least_of_each(found: Evaluated) -> dict[tuple[bool, str], Attacked]:
    """By (unbounded, attack), the unaware cell of lowest accuracy."""
    # highest first: the dictionary keeps the last, which is the lowest
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
    """Per-image worst case over bounded attacks; None without such attacks or without records."""
    if not unaware and found.lowest is not None:
        return found.per_image()
    aware = {c.key for c in found.cells if c.aware and unaware}
    try:
        return least(found, found.attacks().keys() - aware)
    except DataError:
        return None


def _with_difference(it: _Shown | None, base: _Shown | None) -> str:
    if it is None or base is None or it is base or it.each is None or base.each is None:
        return percent(None if it is None else it.estimate)
    return f"{percent(it.estimate)} ({gain(unpacked(it.each), unpacked(base.each))})"


def _least_with_aware(it: Claim, found: Evaluated) -> NDArray[np.float64] | None:
    """Per-image worst case, including aware attacks and evaluations on more images.

    None if no aware attack was run on these images. Sets of images are the first ones of one
    permutation, so that larger sets contain smaller ones.
    """
    n = found.data["num_images"]

    def about(e: Evaluated) -> tuple[object, ...]:
        # given images are those of a call, not the first ones of a permutation
        given = e.data.get("sha256") if e.data["split"] == "given" else None
        return e.norm, e.eps, e.data["name"], e.data["split"], given

    others = [e for e in it.evaluations if about(e) == about(found) and e.data["num_images"] >= n]
    if not any(e.aware is not None for e in others):
        return None
    each = [q[:n] for e in others if (q := _worst(e)) is not None]
    lowest: NDArray[np.float64] = np.min(each, axis=0)
    # without the records of one of them the minimum would be too high
    return lowest if len(each) == len(others) else None


def gain(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    """The mean paired difference in points with its 95 % interval."""
    return points(paired_difference(mine, theirs))


def _paired(found: Evaluated, base: Evaluated) -> str:
    """Points gained over the base on the same images, under the common attacks."""
    # paired differences need the same images and threat
    if found is base or found.subject != base.subject:
        return ""
    it = worst_case_gain(records_of(found), records_of(base))
    if it.estimate is None:
        return it.unknown
    return points(it.estimate) + ("" if it.attacks is None else f", {it.attacks} attacks of both")
