"""The report as Markdown, for a file next to the page and for model cards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from redefense.checks.catalogue import CATALOGUE
from redefense.radius import eps_text
from redefense.report import answers, ranking, reproduce, tables
from redefense.report import sentences as wording
from redefense.report.differences import markdown_differences
from redefense.report.tables import (
    COLUMNS,
    at,
    attack_columns,
    details,
    escape_markdown,
    figures,
    labels,
    markdown_table,
    summary_rows,
    with_interval,
)
from redefense.results.join import Result
from redefense.results.schema import Check


def markdown(results: Sequence[Result], commands: Sequence[str]) -> str:
    """Answers, summary, methods x attacks, checks, and the commands that reproduce it."""
    parts = [f"# {escape_markdown(answers.title(results))}", ""]
    parts += [escape_markdown(answers.summary(results)), ""]
    for question, lead, text in answers.answers(results):
        parts += [f"**{question} {escape_markdown(lead)}.** {escape_markdown(text)}", ""]
    rows = summary_rows(results)
    groups = ranking.grouped(results)
    # without repeated runs this table would repeat the next one
    if any(len(group.runs) > 1 for group in groups):
        parts += [
            "Means over seeds, ± the standard deviation over seeds; 95 % intervals over images.",
            "",
            markdown_table(
                ["method", "runs", *ranking.SHOWN],
                [
                    [group.name, str(len(group.runs)), *map(_spread, group.figures.values())]
                    for group in groups
                ],
            ),
            "",
        ]
    parts += [
        "Accuracy in percent, 95 % intervals in brackets.",
        "",
        markdown_table(
            ["run", "data", "threat", "images", *COLUMNS.values()],
            [
                [row["run"], row["data"], row["threat"], row["images"].removesuffix(" images")]
                + [with_interval(figure) for figure in figures(row)]
                for row in rows
            ],
        ),
        "",
        wording.HOW_COMPARED,
        "",
        *([note, ""] if (note := wording.on_validation(results)) else []),
    ]
    for name, result in zip(labels(rows), results, strict=True):
        for message in (wording.members_alone(result), wording.weak_of(result)):
            parts += [escape_markdown(f"{name}: {message}"), ""] if message else []
    parts += markdown_differences(results)
    parts += ["## Every attack", ""]
    columns = attack_columns(results)
    body = []
    for name, result in zip(labels(rows), results, strict=True):
        # every run has every column: a dash says that it was not attacked so
        cells = [at(result, *column) for column in columns]
        body.append([name, *(with_interval(c.expected if c else None) for c in cells)])
    header = ["run", *(escape_markdown(f"{attack} ({view})") for attack, view in columns)]
    parts += [markdown_table(header, body), ""]
    parts += _radii(results)
    parts += _certified(results)
    for detail, result in zip(details(rows), results, strict=True):
        title = escape_markdown(f"{result.name}, {detail or result.threat}")
        parts += [f"## Checks of {title}", "", *_checks(result), ""]
    parts += ["## Reproduce", "", reproduce.HOW, ""]
    # a line break in a name would end the block of code
    parts += [*(f"    {' '.join(c.split())}" for c in commands), ""]
    return "\n".join(parts)


def _radii(results: Sequence[Result]) -> Iterator[str]:
    """The headline of each evaluation at several radii."""
    for name, points in tables.radii(results):
        keys = [key for key in points[0] if key != "eps"]
        body = [
            [eps_text(point["eps"]), *(with_interval(point[key]) for key in keys)]
            for point in points
        ]
        title = escape_markdown(f"{name}: evaluated at several radii")
        yield from (f"## {title}", "", markdown_table(["eps", *keys], body), "")


def _certified(results: Sequence[Result]) -> Iterator[str]:
    """The certificates as a table."""
    if not (found := tables.certified(results)):
        return
    header = ["run", "L2 radius", "noise", "one draw, at least", "vote, at least", "draws",
              "probability", "made on"]  # fmt: skip
    body = [
        [name, f"{level.radius:g}", f"{level.sigma:g}", tables.percent(level.single),
         tables.percent(level.vote), str(level.draws), f"{100 * level.confidence:g}", made_on]
        for name, made_on, level in found
    ]  # fmt: skip
    yield from ("## Certificates", "", "Percent of images; no attack within the radius can lower "
                "these.", "", markdown_table(header, body), "")  # fmt: skip


def _spread(spread: ranking.Spread | None) -> str:
    message = with_interval(None if spread is None else spread.mean)
    if deviation := ranking.sd_text(spread):
        # between the figure and its interval
        figure, _, ends = message.partition(" ")
        message = " ".join(filter(None, (figure, deviation, ends)))
    return message


def _checks(result: Result) -> Iterator[str]:
    """Notes and checks, one per line; those about the defence are listed separately."""
    measured, of_defence = wording.checks_of(result)
    yield from (f"- {escape_markdown(note)}" for note in result.notes)
    yield from _listed(measured, {True: "pass", False: "**FAIL**", None: "not run"})
    if of_defence:
        yield from ("", wording.SAID, "")
        yield from _listed(of_defence, {True: "good", False: "**beware**"})


def _listed(checks: Iterable[Check], words: Mapping[bool | None, str]) -> Iterator[str]:
    for check in checks:
        entry = CATALOGUE.get(check.id)
        message = f"{entry.title}: {check.detail}" if entry else check.detail
        # explained only where a reader has to act
        if entry and check.passed is False:
            message = (
                f"{message.rstrip('.')}. What it means: {entry.red} What to do next: {entry.todo}"
            )
        yield f"- {check.id}: {words[check.passed]} {escape_markdown(message)}".rstrip()
