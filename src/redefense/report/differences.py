"""Paired differences between the runs of a report: terminal, Markdown and LaTeX."""

from collections.abc import Iterator, Sequence
from typing import Final

from rich.table import Table

from redefense.report.tables import escape_markdown, labels_of, markdown_table, points
from redefense.results.join import Result
from redefense.results.paired import Difference, attacks_of, differences

HOW: Final = (
    "Accuracy of a run minus that of the first one given, in percentage points, on the same "
    "images, with 95 % intervals. Worst case: the strongest on each image of the attacks "
    "that both met, unknown if one of these skipped images that an attack of one run alone had "
    "fooled. An attack has a difference if both met it on all images. The intervals are over "
    "images: of networks that draw in their forward pass the draws are held fixed."
)
"""What the table of differences shows."""


def met(it: Difference) -> str:
    """The attacks of a worst case, `the same` or e.g. `4 of both`, or why it is unknown."""
    if it.worst.estimate is None:
        return it.worst.unknown
    return "the same" if it.worst.attacks is None else f"{it.worst.attacks} of both"


def rows_of(results: Sequence[Result]) -> Iterator[tuple[Difference, list[str]]]:
    """Each difference with the cells of its row under `HEADER`."""
    names = dict(zip(results, labels_of(results), strict=True))
    for it in differences(results):
        figures = (points(it.clean), points(it.worst.estimate))
        yield it, [names[it.run], names[it.reference], *figures, met(it)]


HEADER: Final = ("run", "against", "clean", "worst case", "attacks")


def format_differences(results: Sequence[Result]) -> Table | None:
    """A table for the terminal; None if no runs can be compared."""
    rows = [row for _, row in rows_of(results)]
    if not rows:
        return None
    table = Table(
        title="Paired differences in percentage points with 95 % intervals",
        title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    # a column for each attack, as in Markdown, would not fit on a terminal
    for heading in HEADER:
        table.add_column(heading, justify="right" if heading in ("clean", "worst case") else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_differences(results: Sequence[Result]) -> Iterator[str]:
    """The parts of a section; none if no runs can be compared."""
    rows = list(rows_of(results))
    if not rows:
        return
    attacks = attacks_of([it for it, _ in rows])
    header = [*HEADER, *map(escape_markdown, attacks.values())]
    body = [row + [points(it.each.get(attack)) for attack in attacks] for it, row in rows]
    yield from ("## Differences between runs", "", HOW, "", markdown_table(header, body), "")
