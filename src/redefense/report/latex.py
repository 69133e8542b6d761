"""The report's summary as a LaTeX table for the package booktabs."""

from collections.abc import Sequence

from redefense.report.tables import COLUMNS, figures, interval, labels, percent, summary_rows
from redefense.results.escaping import escape_latex
from redefense.results.intervals import Estimate
from redefense.results.join import Result


def to_latex(results: Sequence[Result]) -> str:
    """One row per run, threat and set of images, in percent with 95 % intervals."""
    rows = summary_rows(results)
    threats = ", ".join(dict.fromkeys(str(row["threat"]) for row in rows))
    images = ", ".join(dict.fromkeys(str(row["num_images"]) for row in rows))
    body = [[name, *map(_figure, figures(row))]
            for name, row in zip(map(escape_latex, labels(rows)), rows, strict=True)]  # fmt: skip
    lines = [
        f"% Accuracy in percent with 95 % intervals; {escape_latex(threats)}; {images} images.",
        "% Needs \\usepackage{booktabs}.",
        rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}",
        r"\toprule",
        " & ".join(["run", *COLUMNS.values()]) + r" \\",
        r"\midrule",
        *(" & ".join(cells) + r" \\" for cells in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _figure(estimate: Estimate | None) -> str:
    if estimate is None:
        return "--"  # an en dash in LaTeX
    known = interval(estimate)
    return percent(estimate) + (rf" {{\scriptsize {known}}}" if known else "")
