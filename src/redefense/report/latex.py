"""The report's summary and paired differences as LaTeX tables for the package booktabs."""

from collections.abc import Sequence

from redefense.report import differences
from redefense.report.tables import COLUMNS, DASH, figures, interval, labels, percent, summary_rows
from redefense.results.escaping import escape_latex
from redefense.results.intervals import Estimate
from redefense.results.join import Result


def to_latex(results: Sequence[Result]) -> str:
    """A row per run, threat and set of images; then one per pair of runs that can be compared."""
    rows = summary_rows(results)
    threats = ", ".join(dict.fromkeys(str(row["threat"]) for row in rows))
    images = ", ".join(dict.fromkeys(row["images"] for row in rows))
    body = [[name, *map(_figure, figures(row))]
            for name, row in zip(map(escape_latex, labels(rows)), rows, strict=True)]  # fmt: skip
    lines = [
        f"% Accuracy in percent with 95 % intervals; {escape_latex(threats)}; {images}.",
        "% Needs \\usepackage{booktabs}.",
        *_table("l" + "r" * len(COLUMNS), ["run", *COLUMNS.values()], body),
    ]
    pairs = [
        [escape_latex(run), escape_latex(other), *map(_signed, points), escape_latex(met)]
        for _, (run, other, *points, met) in differences.rows_of(results)
    ]
    if pairs:
        lines += ["", f"% {differences.HOW}", *_table("llrrl", differences.HEADER, pairs)]
    return "\n".join(lines) + "\n"


def _table(align: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(header) + r" \\",
        r"\midrule",
        *(" & ".join(cells) + r" \\" for cells in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _signed(text: str) -> str:
    """A difference with minus signs in place of hyphens."""
    return text.replace("-", "$-$").replace(DASH, "--")


def _figure(estimate: Estimate | None) -> str:
    if estimate is None:
        return "--"  # an en dash in LaTeX
    known = interval(estimate)
    return percent(estimate) + (rf" {{\scriptsize {known}}}" if known else "")
