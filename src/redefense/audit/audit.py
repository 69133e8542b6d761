"""The audit: checks a table of claims and reports which figures cannot be right, and why.

It reads a stored evaluation or a CSV table typed from a paper, with the columns
`csv_table.COLUMNS` and optionally `aware`: one row per figure, accuracy in percent, empty cells
where the source states nothing. A method that was trained in two ways needs two names. The rules
need only figures, no model.

Examples in `examples/`: `red_table1.csv`, `red_table2.csv` and `red_table3.csv` are Tables 1 to 3
of the RED paper (accuracies of eight ResNet-18 on CIFAR-10, three on TinyImageNet; the paper states
neither eps nor the number of images); the audit reports errors in them. `sound_table.csv` has no
errors: it was measured on a linear classifier fitted to the digits' training split, on the 360 test
images at eps 0.1, with this package's gradient attacks and with Square and AutoAttack of
TorchAttacks 3.5.1; in whole percent, since one image is 0.28 points. `sound_randomized_table.csv`
shows what a table of a randomized defence must state; its figures are invented.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from redefense.audit.csv_table import read_csv
from redefense.audit.finding import Finding
from redefense.audit.rules import findings_of
from redefense.audit.table import grouped, of_evaluation
from redefense.errors import DataError
from redefense.results.accuracy import degenerate_members
from redefense.results.records import evaluations_of, load, parse, read_json
from redefense.results.schema import Cell, Evaluation

__all__ = ["Finding", "audit", "exit_code", "findings_about"]

_AGREE = 1e-3  # figures of one file, fractions, differ by rounding only


def audit(path: Path) -> list[Finding]:
    """All findings about a CSV table of claims, an evaluation, or a run directory; errors first.

    Raises:
        DataError: if the file is missing or is none of these.
    """
    if path.is_dir():
        documents = evaluations_of(path)
        found = [f for file, document in documents.items() for f in _of_document(document, file)]
    elif path.suffix.lower() == ".json":
        found = _of_document(read_json(path), path)
    else:
        found = [finding for group in grouped(read_csv(path)) for finding in findings_of(group)]
    return sorted(found, key=lambda finding: finding.severity)  # stable: errors before notes


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if there is an error, else 0; notes do not count."""
    return int(any(finding.severity == "error" for finding in findings))


def _of_document(document: object, path: Path) -> list[Finding]:
    evaluation = parse(document, str(path))
    findings = findings_about(evaluation)
    try:
        missing = [file for stored in load(path) for file in stored.missing]
    # an audit states that records are contradictory; reading them for use would refuse the file
    except DataError as error:
        findings.append(_about(evaluation, "records-contradict", f"{error}."))
    else:
        findings += _records_missing(evaluation, missing)
    return findings


def findings_about(evaluation: Evaluation) -> list[Finding]:
    """Contradictions between the figures of an evaluation, without its records."""
    findings = [f for group in grouped(of_evaluation(evaluation)) for f in findings_of(group)]
    findings += [*_headline(evaluation), *_silent(evaluation)]
    for cell in evaluation.cells:
        findings += _cell(evaluation, cell)
    return [*findings, *_red_checks(evaluation)]


def _about(
    evaluation: Evaluation,
    rule: str,
    why: str,
    *,
    rows: Iterable[str] = (),
    severity: Literal["error", "note"] = "error",
    **figures: float,
) -> Finding:
    return Finding(
        id=rule,
        severity=severity,
        subject=f"{evaluation.data.name}, suite {evaluation.suite}",
        rows=tuple(rows),
        figures={name: 100 * value for name, value in figures.items()},
        why=why,
    )


def _headline(evaluation: Evaluation) -> Iterator[Finding]:
    """Compare the headline with the cells that it summarises."""
    headline = evaluation.headline
    expected = [
        (cell, cell.accuracy.expected)
        # attacks of checks and curves count in the headline, too
        for cell in (*evaluation.cells, *evaluation.further_cells)
        if cell.accuracy.expected is not None
    ]
    # a suite may attack at other threats, too; its headline is at that of its aware attacks
    threats = {_budget(cell) for cell in evaluation.cells if cell.bounded and cell.aware} - {None}
    bounded = [
        (cell, value)
        for cell, value in expected
        if cell.bounded and (len(threats) != 1 or _budget(cell) in {None, *threats})
    ]
    if headline is None or not bounded:
        return
    lowest, floor = min(bounded, key=lambda pair: pair[1])
    unaware, aware = headline.unaware, headline.aware
    if aware is not None and aware > floor + _AGREE:
        why = "The aware headline is above a bounded attack that it must include."
        yield _about(
            evaluation, "headline-above-attack", why, rows=[lowest.id], aware=aware, attack=floor
        )
    if aware is not None and not any(cell.aware for cell, _ in bounded):
        why = "An aware headline is stated, but no aware attack was run."
        yield _about(evaluation, "aware-without-attack", why, aware=aware)
    if aware is not None and unaware is not None and aware > unaware + _AGREE:
        why = "The aware figure is above the unaware one, although aware attackers know more."
        yield _about(evaluation, "headlines-swapped", why, aware=aware, unaware=unaware)
    unaware_values = [value for cell, value in bounded if not cell.aware]
    if unaware is not None and unaware_values and abs(unaware - min(unaware_values)) > _AGREE:
        # a frequent mistake deserves its own message
        free = [value for cell, value in expected if not cell.bounded]
        if any(abs(unaware - value) <= _AGREE for value in free):
            why = "The unaware headline is the figure of an unbounded attack."
            yield _about(evaluation, "unbounded-in-headline", why, unaware=unaware)
        else:
            why = "The unaware headline is not the lowest of the bounded unaware attacks."
            yield _about(
                evaluation, "headline-mismatch", why, unaware=unaware, lowest=min(unaware_values)
            )


def _budget(cell: Cell) -> tuple[str, float] | None:
    """The threat of a cell, with a radius rounded as in a joined result; None if unstated."""
    threat = cell.threat
    if threat is None or threat.eps is None:
        return None
    return threat.norm, round(threat.eps, 9)


def _cell(evaluation: Evaluation, cell: Cell) -> Iterator[Finding]:
    accuracy = cell.accuracy
    names = ("all", "worst_member", "expected", "best_member", "any")
    ladder = [(name, value) for name in names if (value := getattr(accuracy, name)) is not None]
    values = [value for _, value in ladder]
    if any(a > b + 1e-6 for a, b in pairwise(values)):
        why = "All members <= worst member <= expected <= best member <= any member does not hold."
        yield _about(evaluation, "impossible-order", why, rows=[cell.id], **dict(ladder))
    if cell.bounded and cell.unchanged is not None and cell.unchanged > 0.01:
        why = (
            f"{100 * cell.unchanged:.1f} % of the images were returned unchanged: the attack found "
            "no better point, or random outputs hid its successes."
        )
        yield _about(
            evaluation, "images-unchanged", why, rows=[cell.id], severity="note",
            unchanged=cell.unchanged,
        )  # fmt: skip


def _silent(evaluation: Evaluation) -> Iterator[Finding]:
    each = evaluation.clean.per_member
    for m in degenerate_members(each, evaluation.mixture):
        why = (
            f"Member {m} has low clean accuracy, so queries answered by it are mostly wrong: a "
            "gradient penalty may have made its outputs nearly constant."
        )
        yield _about(
            evaluation, "silent-member", why, rows=["clean"], severity="note", member=each[m],
            best=max(each),
        )  # fmt: skip


def _records_missing(evaluation: Evaluation, files: Sequence[str]) -> Iterator[Finding]:
    if files:
        why = (
            "The per-image records are missing, so the figures cannot be verified: copy the folder "
            "of the records next to this file, or in Python write the evaluation with "
            "`report.save(DIR)`."
        )
        yield _about(evaluation, "records-missing", why, rows=files, severity="note")


def _red_checks(evaluation: Evaluation) -> Iterator[Finding]:
    for check in evaluation.checks:
        if check.passed is False:
            detail = check.detail.rstrip(".") or "failed"
            why = f"A check of the evaluation failed: {detail}."
            yield _about(evaluation, "red-check", why, rows=[check.id], severity="note")
