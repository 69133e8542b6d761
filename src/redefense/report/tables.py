"""Tables of the report for the terminal, Markdown, CSV and JSON, in percent."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from redefense.results.certificates import Level, certificates_of
from redefense.results.headline import estimate_of
from redefense.results.intervals import Estimate
from redefense.results.join import Result, join
from redefense.results.paired import attacks_of, differences
from redefense.results.records import Scored, Source

COLUMNS: Mapping[str, str] = {
    "clean": "clean",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "unaware": "unaware",
    "aware": "aware",
    "best_member_alone": "best member alone",
    "averaged": "averaged",
}
"""Keys of a row of `summary_table` and their headings."""

DASH = "\u2013"


def percent(estimate: Estimate | float | None, digits: int = 1) -> str:
    """A fraction in percent, without the percent sign; a dash if it is unknown."""
    if estimate is None:
        return DASH
    value = estimate.value if isinstance(estimate, Estimate) else estimate
    return f"{100 * value:.{digits}f}"


def interval(estimate: Estimate | None, digits: int = 1) -> str:
    """The 95 % interval in percent, e.g. `36.9 to 45.6`; empty if it is unknown."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.{digits}f} to {100 * estimate.high:.{digits}f}"


def with_interval(estimate: Estimate | None) -> str:
    """Figure and interval on one line, e.g. `41.2 [36.9, 45.6]`."""
    known = interval(estimate)
    return percent(estimate) + (f" [{known.replace(' to ', ', ')}]" if known else "")


def points(found: Estimate | None) -> str:
    """A difference in percentage points with its interval, e.g. `+2.5 [-0.5, +5.5]`."""
    if found is None:
        return DASH
    ends = (f"{100 * end:+.1f}" for end in (found.low, found.high) if end is not None)
    return f"{100 * found.value:+.1f} [{', '.join(ends)}]".removesuffix(" []")


def of_attack(result: Result, attack: str) -> Scored | None:
    """The bounded cell of one attack: on the sampled view, or else the strongest."""
    # a cascaded cell has no accuracy of its own
    cells = [c for c in result.bounded if c.cell.attack == attack and c.expected is not None]
    return min(
        cells,
        key=lambda c: (c.cell.view != "sampled", c.expected.value if c.expected else 1.0),
        default=None,
    )


def summary_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for result in results:
        fgsm, pgd = of_attack(result, "fgsm"), of_attack(result, "pgd")
        rows.append(
            {
                "run": result.name,
                "data": result.data.name,
                "threat": result.threat,
                "num_images": result.num_images,
                "images": result.images,
                "suites": [stored.evaluation.suite for stored in result.suites],
                "clean": result.clean,
                "fgsm": fgsm.expected if fgsm else None,
                "pgd": pgd.expected if pgd else None,
                "unaware": result.unaware,
                "aware": result.aware,
                "best_single_member": result.single,
                "best_member_alone": result.best_alone,
                "averaged": result.averaged,
                "num_members": result.num_members,
            }
        )
    return rows


def figures(row: Mapping[str, Any]) -> list[Estimate | None]:
    """A row's figures in the order of `COLUMNS`; for a single network each figure once."""
    # without a draw all figures under attack are the same one
    twice = ("unaware", "best_member_alone", "averaged") if row["num_members"] == 1 else ()
    return [None if key in twice else row[key] for key in COLUMNS]


def summary_table(run_dirs: Iterable[Source]) -> list[dict[str, Any]]:
    """One row for each run, threat and set of images.

    Keys are `run`, `data`, `threat`, `num_images`, `images` (e.g. `500 validation images`),
    `suites`, those of `COLUMNS`, `num_members` (None for a stochastic network), and
    `best_single_member`, the member chosen beforehand. Each figure is an `Estimate` (fractions in
    [0, 1]), or None if it is unknown.

    Raises:
        DataError: if a run has no evaluation or a file is damaged.
    """
    return summary_rows(join(run_dirs))


def details(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each row of `summary_table`, the text that distinguishes it from rows of the same run.

    Data and threat are given for all rows if they differ; images and suites only for rows that
    would have equal names.
    """
    several = [key for key in ("data", "threat") if len({row[key] for row in rows}) > 1]
    values = [[str(row[key]) for key in several] for row in rows]
    # one after the other: the second only for names that are still equal after the first
    for words in (
        [row["images"] for row in rows],
        [f"suite {' + '.join(row['suites'])}" for row in rows],
    ):
        called = [(row["run"], *known) for row, known in zip(rows, values, strict=True)]
        for name, known, word in zip(called, values, words, strict=True):
            if called.count(name) > 1:
                known.append(word)
    return [", ".join(known) for known in values]


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name of each row of `summary_table`, e.g. `red` or `red (linf 0.2, 360 images)`."""
    return [
        str(row["run"]) + (f" ({detail})" if detail else "")
        for row, detail in zip(rows, details(rows), strict=True)
    ]


def labels_of(results: Sequence[Result]) -> list[str]:
    """Distinct name of each result, as by `labels`."""
    return labels(summary_rows(results))


def _chosen(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Note about the member chosen beforehand, if it differs from the best member."""
    counts = [
        f"{name} {percent(row['best_single_member'])}"
        for name, row in zip(labels(rows), rows, strict=True)
        if row["best_single_member"] != row["best_member_alone"]
    ]
    where = "best member alone: the best on these images; the one chosen beforehand: "
    return where + ", ".join(counts) if counts else None


def format_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of `summary_table` as a rich table for the terminal."""
    threats = sorted({str(row["threat"]) for row in rows})
    images = dict.fromkeys(row["images"] for row in sorted(rows, key=lambda row: row["num_images"]))
    table = Table(
        title=f"Accuracy in percent with 95 % intervals · {', '.join(threats)} · "
        f"{', '.join(images)}",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=_chosen(rows),
        caption_justify="left",
    )
    table.add_column("run", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for name, row in zip(labels(rows), rows, strict=True):
        # on two lines: seven columns with both on one would not fit on a terminal
        cells = [f"{percent(figure)}\n{interval(figure)}" for figure in figures(row)]
        table.add_row(name, *cells)
    return table


def certified(results: Sequence[Result]) -> list[tuple[str, str, Level]]:
    """Run, certified images, and level of each certificate."""
    found = [
        (result.name, made_on, level)
        for result in results
        for made_on, level in certificates_of(result.suites)
    ]
    # a run has a result for each threat, and the same certificates in all of them
    return list(dict.fromkeys(found))


def radii(results: Sequence[Result]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For each evaluation at several radii its name, and at each radius "eps" and the estimates."""
    for name, result in zip(labels_of(results), results, strict=True):
        keys = ("aware",) if result.num_members == 1 else ("unaware", "aware")
        for evaluation in result.evaluations:
            curve = evaluation.eps_curve
            # the largest radius is that of the evaluation
            if len(curve) < 2 or result.eps is None or abs(curve[-1].eps - result.eps) > 1e-8:
                continue
            yield (
                name,
                [
                    {k: estimate_of(getattr(at, k), getattr(at, f"{k}_interval")) for k in keys}
                    | {"eps": at.eps}
                    for at in curve
                ],
            )


def attack_columns(results: Sequence[Result]) -> list[tuple[str, str]]:
    """(attack, view) of every cell of any run: bounded unaware, bounded aware, then unbounded."""
    cells = [c.cell for result in results for c in result.cells]
    # stable: the suite's order within each kind
    cells.sort(key=lambda cell: (not cell.bounded, cell.aware))
    return list(dict.fromkeys((cell.attack, cell.view) for cell in cells))


def at(result: Result, attack: str, view: str) -> Scored | None:
    """The lowest cell of this attack and view, which several suites may have."""
    same = [c for c in result.cells if (c.cell.attack, c.cell.view) == (attack, view)]
    return min(same, key=lambda c: c.expected.value if c.expected else 1.0, default=None)


def escape_markdown(text: str) -> str:
    """Escape text for Markdown, on one line."""
    for mark in "\\`*_{}[]<>|":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every cell is escaped."""
    lines = [header, ["---"] * len(header)]
    lines += [[escape_markdown(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_CSV_COLUMNS = (
    "run", "data", "split", "num_images", "norm", "eps", "suite", "cell", "attack", "view",
    "aware", "bounded", "accuracy", "low", "high", "protocol", "protocol_sd", "averaged",
    "worst_member", "best_member", "any", "all", "unchanged", "l0", "l2", "linf", "forwards",
    "backwards", "seconds", "met", "against", "difference",
)  # fmt: skip


def _plain(value: object) -> object:
    """Escape names that a spreadsheet would interpret as a formula."""
    # characters and remedy as OWASP gives them for CSV injection
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def _row(
    result: Result, attack: str, estimate: Estimate | None, kind: str = "accuracy"
) -> dict[str, object]:
    data = result.data
    row: dict[str, object] = {
        "run": result.name, "data": data.name, "split": data.split,
        "num_images": data.num_images, "norm": result.norm, "eps": result.eps, "attack": attack,
    }  # fmt: skip
    if estimate is not None:
        scaled = [None if v is None else round(100 * v, 4) for v in estimate]
        row |= dict(zip((kind, "low", "high"), scaled, strict=True))
    return row


def csv_rows(results: Sequence[Result]) -> list[dict[str, object]]:
    """One row per figure in percent: of each run the headlines, then every cell.

    Last come paired differences over all images, in points in the column `difference`, with the
    name of the reference in `against`. The columns `low` and `high` are the interval of either.
    """
    rows = []
    for result in results:
        heads = {
            "clean": result.clean,
            "headline-unaware": result.unaware,
            "headline-aware": result.aware,
            "best-single-member": result.single,
            "best-member-alone": result.best_alone,
            "averaged-ensemble": result.averaged,
        }
        rows += [_row(result, name, estimate) for name, estimate in heads.items()]
        for scored in result.cells:
            cell, accuracy = scored.cell, scored.cell.accuracy
            row = _row(result, cell.attack, scored.expected)
            row |= {"suite": scored.suite, "cell": cell.id, "view": cell.view}
            row |= {"aware": cell.aware, "bounded": cell.bounded}
            # an unbounded attack has a threat of its own, not that of the result
            if cell.threat is not None and not cell.bounded:
                row |= {"norm": cell.threat.norm, "eps": cell.threat.eps}
            figures = accuracy.model_dump(exclude={"expected"}) | {"unchanged": cell.unchanged}
            # accuracies on a part of the images would be compared with those on all
            if not scored.whole:
                figures = {"unchanged": cell.unchanged}
            row |= {k: None if v is None else round(100 * v, 4) for k, v in figures.items()}
            row |= dict(cell.distortion or {})
            row |= {key: getattr(cell, key) for key in ("forwards", "backwards", "seconds")}
            row["met"] = cell.met
            rows.append(row)
    names = dict(zip(results, labels_of(results), strict=True))
    called = attacks_of(compared := differences(results))
    for it in compared:
        each = {called[key]: estimate for key, estimate in it.each.items()}
        for attack, estimate in {
            "clean": it.clean,
            "worst case": it.worst.estimate,
            **each,
        }.items():
            row = _row(it.run, f"difference: {attack}", estimate, "difference")
            rows.append(row | {"against": names[it.reference]})
    # every row has every column, since readers of CSV count them
    return [{key: row.get(key) for key in _CSV_COLUMNS} for row in rows]


def to_csv(results: Sequence[Result]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _plain(v) for k, v in row.items()} for row in csv_rows(results))
    return text.getvalue()


def to_json(results: Sequence[Result]) -> str:
    """The joined figures as data: fractions in [0, 1], an estimate as {value, low, high}."""
    rows = [
        {k: v._asdict() if isinstance(v, Estimate) else v for k, v in row.items()}
        | {
            key: estimate and estimate._asdict()
            for key, estimate in (
                ("over_single", r.over_single),
                ("over_averaged", r.over_averaged),
            )
        }
        | {"members_fooled": None if r.fooled is None else r.fooled.tolist()}
        | {"success_within_tries": None if r.tries_aware is None else r.tries_aware.tolist()}
        | {"notes": list(r.notes)}
        for row, r in zip(summary_rows(results), results, strict=True)
    ]
    names = dict(zip(results, labels_of(results), strict=True))
    called = attacks_of(found := differences(results))
    compared = [
        {
            "run": names[it.run],
            "against": names[it.reference],
            "clean": it.clean._asdict(),
            "worst_case": it.worst.estimate and it.worst.estimate._asdict(),
            "worst_case_unknown": it.worst.unknown or None,
            "common_attacks": it.worst.attacks,
            "attacks": {called[key]: estimate._asdict() for key, estimate in it.each.items()},
        }
        for it in found
    ]
    return json.dumps({"schema": 1, "results": rows, "differences": compared}, indent=1) + "\n"
