"""The leaderboard as a static site: one page over all claims, and a page for each.

It opens from the disk in a browser. Pages make no requests: styles, scripts and charts are inline,
and the content security policy forbids everything else.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from redefense import __version__
from redefense.claims.format import Claim, estimate_of
from redefense.claims.leaderboard import Entry, Group, Row, groups_of, read_all
from redefense.errors import ConfigError
from redefense.radius import eps_text
from redefense.report.page import templates_in
from redefense.report.tables import percent
from redefense.runtime.files import write_text

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 12, 44


def write_site(folder: Path, out: Path) -> list[Path]:
    """Write `OUT/index.html`, and a page and the file of each claim in `OUT/claims/`.

    Claims that fail the check are listed with the reasons, but not ranked.

    Args:
        folder: of the claims.
        out: created if missing; pages of the same names are replaced.

    Returns:
        The pages, the index first.

    Raises:
        ConfigError: if the site would overwrite the claims, or the extra `report` is not installed.
        DataError: if there is no claim, or a file is not a claim; then nothing is written.
    """
    if (out / "claims").resolve() == folder.resolve():
        raise ConfigError(
            f"--out {out} would overwrite the claims in {folder}: choose another folder"
        )
    entries = read_all(folder)
    held = [entry for entry in entries if entry.holds]
    render = _renderer()
    pages = {out / "index.html": render("index.html", _index(entries, groups_of(held)))}
    for entry in entries:
        text = render("claim.html", {"entry": entry, "claim": entry.claim})
        pages[out / entry.page] = text
    # written after all are rendered, so that an error leaves nothing behind
    for path, text in pages.items():
        write_text(path, text)
    for entry in entries:
        # the file itself, which visitors check and recompute
        shutil.copyfile(entry.path, out / "claims" / entry.path.name)
    return list(pages)


def _index(entries: Sequence[Entry], groups: Sequence[Group]) -> dict[str, Any]:
    def options(of: Callable[[Group], Sequence[str]]) -> list[str]:
        return sorted({value for group in groups for value in of(group)})

    return {
        "groups": groups,
        "refused": [entry for entry in entries if not entry.holds],
        "count": len(entries),
        "filters": {
            "data": options(lambda g: [g.data]),
            "threat": options(lambda g: [g.threat]),
            "suite": options(lambda g: g.suites),
            "kind": options(lambda g: g.kinds),
        },
    }


def _renderer() -> Callable[[str, dict[str, Any]], str]:
    home = files("redefense.claims") / "pages"
    environment = templates_in(home, "the leaderboard")
    environment.globals |= {
        "version": __version__, "scatter": scatter, "estimate": estimate_of, "eps": eps_text,
        "millions": _millions,
        "recompute": recompute_command, "cost": lambda row: row.passes,
        "clean": lambda row: None if row.clean is None else row.clean.value,
    }  # fmt: skip
    return lambda name, values: environment.get_template(name).render(values)


def _millions(count: int | float | None) -> str:
    if count is None:
        return "not stated"
    if count < 1e5:
        return f"{count:,.0f}"
    return f"{count / 1e6:.2f} M" if count < 1e8 else f"{count / 1e6:.0f} M"


def recompute_command(entry: Entry) -> str:
    """The command that recomputes the figures of a claim."""
    it: Claim = entry.claim
    weights = "" if it.trained else " --weights DIR"
    return f"redefense claim recompute {entry.path.name} --data {it.run['data']['spec']}{weights}"


def _decades(low: float, high: float) -> list[float]:
    """Decimal logarithms of 1, 2 and 5 times powers of ten, from below `low` to above `high`."""
    marks = [k + math.log10(m) for k in range(-9, 19) for m in (1, 2, 5)]
    first = max(mark for mark in marks if mark < low)
    last = min(mark for mark in marks if mark > high)
    return [mark for mark in marks if first <= mark <= last]


def scatter(
    group: Group, across: Callable[[Row], float | None], label: str, *, log: bool = False
) -> str:
    """Scatter plot (SVG) of aware accuracy over another figure; "" for fewer than two points.

    Args:
        group: its rows are numbered as in the table.
        across: the figure on the horizontal axis.
        label: of that axis.
        log: whether its scale is logarithmic; else it is that of a share.
    """
    known = [
        (number, row, x, row.aware)
        for number, row in enumerate(group.rows, 1)
        if (x := across(row)) is not None and row.aware is not None and (x > 0 or not log)
    ]
    if len(known) < 2:
        return ""
    xs = [math.log10(x) if log else x for _, _, x, _ in known]
    ticks = _decades(min(xs), max(xs)) if log else [0.0, 0.25, 0.5, 0.75, 1.0]
    low, span = ticks[0], ticks[-1] - ticks[0]
    top = max(a.high or a.value for _, _, _, a in known)
    # the next multiple of ten percent, with room above an interval that ends on one
    top = min(1.0, math.ceil(top * 10 + 0.01) / 10)

    def px(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / span

    def py(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - y / top)

    body = [
        f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
        + (f"{10**x / 1e6:.3g}</text>" if log else f"{100 * x:.0f}</text>")
        for x in ticks
    ]
    for i in range(5):
        y = top * i / 4
        body.append(f'<path class="gridline" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        body.append(
            f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{100 * y:.3g}</text>'
        )
    middle, centre = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    body.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(label)}</text>"
        f'<text class="axis" transform="translate(11 {centre}) rotate(-90)" '
        'text-anchor="middle">aware, %</text>'
    )
    for (number, row, _, aware), x in zip(known, xs, strict=True):
        ends = f"M{px(x):.1f} {py(aware.low or 0):.1f}V{py(min(aware.high or 0, top)):.1f}"
        bar = "" if aware.low is None or aware.high is None else f'<path class="bar" d="{ends}"/>'
        # claims come from others: their names must not become markup
        message = escape(f"{row.name}: aware {percent(aware)} %")
        body.append(
            f'<g class="point {row.kind}" data-row="{number}"><title>{message}</title>{bar}'
            f'<circle cx="{px(x):.1f}" cy="{py(aware.value):.1f}" r="4"/>'
            f'<text x="{px(x) + 6:.1f}" y="{py(aware.value) - 5:.1f}">{number}</text></g>'
        )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Aware accuracy against {escape(label)}">{"".join(body)}</svg>'
    )
