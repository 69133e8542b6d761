"""The report of one or many runs as an offline page, Markdown, CSV, JSON or LaTeX.

The figures are joined per image from stored evaluations; no model is loaded and torch is not
imported. The page makes no requests: styles, scripts and charts are inline, and its content
security policy forbids everything else.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final

from redefense import __version__
from redefense.checks.catalogue import CATALOGUE
from redefense.errors import BAD_JSON, ConfigError, need
from redefense.report import answers, charts, differences, ranking, reproduce, tables
from redefense.report import sentences as wording
from redefense.report.latex import to_latex
from redefense.report.markdown import markdown
from redefense.report.pictures import Shown, pictures
from redefense.report.tables import format_table, summary_table
from redefense.results import paired
from redefense.results.headline import TRIES
from redefense.results.intervals import Estimate
from redefense.results.join import Result, join
from redefense.results.records import Source
from redefense.runtime.files import write_text

__all__ = ["format_table", "summary_table", "write_pages", "write_report"]


def write_report(run_dirs: Sequence[Source], out: Path) -> list[Path]:
    """Write the report in the format given by the suffix of `out`.

    Args:
        run_dirs: run directories, evaluation files, or evaluations loaded from JSON (without
            per-image records, so that their suites are not joined).
        out: with the suffix `.html`, files `.md`, `.csv` and `.json` of the same name are written
            too; with `.md`, `.csv`, `.json` or `.tex`, only this file. Its folder is created.

    Returns:
        The written files, the page first.

    Raises:
        DataError: if a run has no evaluation or a file is damaged; then nothing is written.
        ConfigError: if there is no run, if `out` has another suffix, if an input would be
            overwritten, or if the extra `report` is not installed.
    """
    if not run_dirs:
        raise ConfigError("a report needs at least one run")
    _check_ending(out)
    results = join(run_dirs)
    given = [source for source in run_dirs if isinstance(source, Path)]
    return write_pages(results, reproduce.commands(results, out), out, given)


def write_pages(
    results: Sequence[Result], commands: Sequence[str], out: Path, given: Collection[Path] = ()
) -> list[Path]:
    """Write the report of joined results.

    Args:
        results: in the order of the rows.
        commands: that reproduce them.
        out: as in `write_report`.
        given: files that must not be overwritten.

    Returns:
        The written files, the page first.

    Raises:
        ConfigError: as in `write_report`.
    """
    _check_ending(out)
    # called on demand: only the page needs the extra `report`
    forms: Mapping[str, Callable[[], str]] = {
        ".html": lambda: html(results, commands),
        ".md": lambda: markdown(results, commands),
        ".csv": lambda: tables.to_csv(results),
        ".json": lambda: tables.to_json(results),
        ".tex": lambda: to_latex(results),
    }
    ending = ENDINGS[out.suffix.lower()]
    texts = {out: forms[ending]()}
    if ending == ".html":
        texts |= {out.with_suffix(other): forms[other]() for other in (".md", ".csv", ".json")}
    # all are made and checked before the first is written
    kept = {path.resolve() for path in given}
    for path in texts:
        # of these suffixes only .json can be that of a run or an evaluation
        if path.resolve() in kept or (path.suffix == ".json" and not _is_free(path)):
            raise ConfigError(
                f"--out {out} would overwrite {path}, which is not a report: choose another file"
            )
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


ENDINGS: Final = {".htm": ".html"} | {e: e for e in (".html", ".md", ".csv", ".json", ".tex")}
"""Formats of a report, by suffix."""


def _check_ending(out: Path) -> None:
    if out.suffix.lower() not in ENDINGS:
        known = "the page .html, or .md, .csv, .json or .tex"
        raise ConfigError(f"--out must have the suffix of a format: {known}; got {out}")


def _is_free(path: Path) -> bool:
    """Whether the path is free or has the JSON of an older report, not a run or an evaluation."""
    if not path.exists():
        return True
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except BAD_JSON:
        return False
    # a key that runs, evaluations and claims do not have
    return isinstance(found, dict) and "results" in found


def _run_settings(result: Result) -> str:
    """The resolved run stored with the evaluation; empty if it is not stored."""
    run = next((e.run for e in result.evaluations if e.run), None)
    return json.dumps(run, indent=1) if run else ""


def _lines(results: Sequence[Result]) -> list[charts.Line]:
    lines = []
    for style, (name, result) in enumerate(zip(tables.labels_of(results), results, strict=True)):
        if result.num_members == 1:
            continue  # a single network is deterministic
        for success, who in ((result.tries_aware, "aware"), (result.tries_unaware, "unaware")):
            if success is not None:
                points = [(float(k), float(y)) for k, y in enumerate(success, 1)]
                label = f"{name}, {who}"
                lines.append(
                    charts.Line(label=label, points=points, style=style, dashed=who == "unaware")
                )
    return lines


def _tries_chart(results: Sequence[Result]) -> tuple[str, str] | None:
    lines = _lines(results)
    if not lines:
        return None
    chart = charts.line_chart(
        lines,
        title="Attack success within K tries",
        x_label="tries K with the same image",
        y_label="attack success, %",
        x_ticks=[float(k) for k in range(1, TRIES + 1)],
    )
    return chart, charts.legend(lines)


def _curve_chart(results: Sequence[Result]) -> tuple[str, str] | None:
    lines = [
        charts.Line(label=name, points=result.curve, style=style)
        for style, (name, result) in enumerate(zip(tables.labels_of(results), results, strict=True))
        if result.curve is not None
    ]
    if not lines:
        return None
    xs = sorted({point[0] for line in lines for point in line.points})
    ticks = list[float]()
    for x in xs:
        # the first ticks are close together: their labels must not overlap
        if not ticks or x - ticks[-1] >= (xs[-1] - xs[0]) / 8:
            ticks.append(x)
    chart = charts.line_chart(
        lines,
        title="Accuracy over the size of the perturbation",
        x_label="eps",
        y_label="accuracy, %",
        x_ticks=ticks,
        at=results[0].eps,
    )
    return chart, charts.legend(lines)


def _curve_cost(results: Sequence[Result]) -> Iterator[str]:
    """Number of images and cost of the curve."""
    costs = (e.curve_cost for r in results for e in r.evaluations if e.curve_cost)
    message = (
        f"{cost.attack.partition('(')[0]} at {cost.radii} radii on the first {cost.images} images, "
        f"{cost.forwards:.0f} forward and {cost.backwards:.0f} backward passes per image; "
        "points found within the budget count for the headline."
        for cost in costs
    )
    yield from dict.fromkeys(message)  # once, if several runs were measured alike


def _eps_curves(results: Sequence[Result]) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Name, chart, legend and points of each evaluation at several radii."""
    for name, points in tables.radii(results):
        lines = [
            charts.Line(
                label=key,
                # without an interval a point has no band
                points=[
                    [at["eps"], *(v for v in at[key] if v is not None)] for at in points if at[key]
                ],
                style=0 if key == "aware" else 1,
                dashed=key == "unaware",
            )
            for key in points[0]
            if key != "eps"
        ]
        chart = charts.line_chart(
            lines,
            title=f"{name}: accuracy at several radii",
            x_label="eps",
            y_label="accuracy, %",
            x_ticks=[at["eps"] for at in points],
        )
        yield name, chart, charts.legend(lines), points


def _pictured(results: Sequence[Result]) -> list[tuple[Result, list[Shown]]]:
    """The results with examples; the one described on the first screen comes first."""
    first = ranking.best(results)
    order = sorted(results, key=lambda result: result is not first)
    return [(result, shown) for result in order if (shown := pictures(result))]


def _histograms(results: Sequence[Result]) -> list[tuple[str, str]]:
    return [
        (
            name,
            charts.histogram(
                result.fooled.tolist(),
                title=f"{name}: members fooled by one image",
                x_label="members fooled at once",
                y_label="images, %",
            ),
        )
        for name, result in zip(tables.labels_of(results), results, strict=True)
        if result.fooled is not None and result.num_members != 1
    ]


_HEADS: Final = (
    ("clean", ""),
    ("unaware", "headline"),
    ("aware", "headline"),
    ("best member", "alone, attacked"),
    ("averaged", "under attack"),
)


def _headline(result: Result, columns: int) -> list[Estimate | None]:
    """The figures of a row; for a single network each figure once."""
    if columns == 2:
        return [result.clean, result.aware]
    if result.num_members == 1:
        return [result.clean, None, result.aware, None, None]
    return [result.clean, result.unaware, result.aware, result.best_alone, result.averaged]


def _bars(result: Result) -> list[tuple[str, str, Estimate | None, str]]:
    """The bars of a result: name, colour, figure and class of the row."""
    clean = ("no attack", "clean", result.clean, "")
    if result.num_members == 1:
        return [clean, ("attack", "aware", result.aware, "head")]
    which = "" if result.best_index is None else f" (member {result.best_index})"
    bars = [
        clean,
        ("unaware attacks", "unaware", result.unaware, ""),
        ("aware attacks", "aware", result.aware, "head"),
    ]
    if result.best_alone is not None or result.averaged is not None:
        bars += [
            (f"best member alone{which}", "single", result.best_alone, "rule"),
            ("averaged ensemble", "averaged", result.averaged, ""),
        ]
    return bars


def _failing(results: Sequence[Result]) -> Iterator[str]:
    """Lines about failed checks of the measurement."""
    failed: dict[str, list[str]] = {}
    for name, result in zip(tables.labels_of(results), results, strict=True):
        # those about the defence are no faults of the measurement
        for check in wording.checks_of(result)[0]:
            if check.passed is False:
                failed.setdefault(check.id, []).append(name)
    for check_id, names in sorted(failed.items()):
        title = f" ({CATALOGUE[check_id].title})" if check_id in CATALOGUE else ""
        yield f"{check_id}{title} failed in {', '.join(names)}."


def _facts(result: Result) -> list[tuple[str, str]]:
    """Provenance of a result as (name, value), in reading order."""
    facts = []
    for evaluation in result.evaluations:
        data, provenance = evaluation.data, evaluation.provenance
        message = f"{data.name}, {data.split} split, {data.num_images} images"
        facts.append((f"suite {evaluation.suite}", message))
        keys = ("version", "commit", "torch", "machine", "seed", "date")
        facts += [
            (key, str(provenance[key])) for key in keys if provenance.get(key) not in ("", None)
        ]
    return list(dict.fromkeys(facts))  # suites of a run share most of them


def _code(text: str) -> str:
    """Text with the parts between backticks as code."""
    from markupsafe import Markup, escape  # comes with jinja2

    parts = map(escape, text.split("`"))
    # escaped first: names in a text are those of users
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if k % 2 else part for k, part in enumerate(parts)
    )


def templates_in(home: Traversable, what: str) -> Any:
    """The jinja2 environment of the templates in a folder, and of those of the report.

    Args:
        home: the folder.
        what: the templates are for, in the error.

    Raises:
        ConfigError: if jinja2, of the extra `report`, is not installed.
    """
    jinja2 = need("jinja2", what, extra="report")
    folders = (home, files("redefense.report").joinpath("templates"))

    # not from the file system: an installed package may be in an archive
    def load(name: str) -> str | None:
        found = (folder.joinpath(name) for folder in folders)
        return next((file.read_text(encoding="utf-8") for file in found if file.is_file()), None)

    # strict, or a misspelt name would be an empty cell of the page
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(load),
    )  # fmt: skip
    environment.filters |= {
        "percent": tables.percent, "interval": tables.interval, "gain": wording.points,
        "code": _code,
    }  # fmt: skip
    return environment


def html(results: Sequence[Result], commands: Sequence[str]) -> str:
    """The page, with the commands that reproduce it.

    Raises:
        ConfigError: if jinja2, of the extra `report`, is not installed.
    """
    home = files("redefense.report").joinpath("templates")
    environment = templates_in(home, "the report page")
    networks = all(result.num_members == 1 for result in results)
    columns = tables.attack_columns(results)
    details = tables.details(tables.summary_rows(results))
    context: dict[str, Any] = {
        "answers": answers.answers(results),
        "bar": charts.bar,
        "best": ranking.best(results),
        "catalogue": CATALOGUE,
        "certificates": tables.certified(results),
        "checks_of": wording.checks_of,
        "columns": columns,
        "commands": commands,
        "curve": _curve_chart(results),
        "curve_cost": list(_curve_cost(results)),
        "curves": list(_eps_curves(results)),
        "differences": (compared := paired.differences(results)),
        "differing": paired.attacks_of(compared),
        "how_differ": differences.HOW,
        "met": differences.met,
        "detail": dict(zip(results, details, strict=True)),
        "facts": _facts,
        "grid": [[tables.at(result, *column) for column in columns] for result in results],
        "groups": ranking.grouped(results),
        "failing": list(_failing(results)),
        "headline": _headline,
        "heads": (("clean", ""), ("under attack", "worst case")) if networks else _HEADS,
        "histograms": _histograms(results),
        "how": reproduce.HOW,
        "label": dict(zip(results, tables.labels_of(results), strict=True)),
        "members_alone": wording.members_alone,
        "weak_of": wording.weak_of,
        "pictured": _pictured(results),
        "results": results,
        "baselines": wording.HOW_COMPARED,
        "validation": wording.on_validation(results),
        "said_heading": wording.SAID,
        "bars": _bars,
        "sd_text": ranking.sd_text,
        "settings": _run_settings,
        "summary": answers.summary(results),
        "title": answers.title(results),
        "tries": _tries_chart(results),
        "verdict": wording.verdict,
        "version": __version__,
    }
    text: str = environment.get_template("page.html").render(context)
    return text
