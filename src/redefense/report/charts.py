"""Charts of the report as inline SVG, without a plotting library or scripts.

Every function returns markup with escaped user text. Colours are set by CSS classes of the page, so
that one chart serves dark mode, light mode and print. Lines also differ by dash and marker, for
readers with colour blindness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from redefense.results.intervals import Estimate

# in units of the drawing, which the page scales
WIDTH, HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 12, 12, 44


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve: points (x, y) or (x, y, low, high), y in [0, 1]; `style` picks colour and mark."""

    label: str
    points: Sequence[Sequence[float]]
    style: int = 0
    dashed: bool = False


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def bar(estimate: Estimate | None, kind: str) -> str:
    """A horizontal bar from 0 to 100 % with its interval; `kind` names the colour class."""
    shapes = ['<rect class="track" x="0" y="3" width="100" height="6"/>']
    if estimate is not None:
        # rounding may leave [0, 1], and evaluations from elsewhere may hold anything
        value = 100 * min(max(estimate.value, 0.0), 1.0)
        shapes.append(f'<rect class="fill {kind}" x="0" y="3" width="{value:.2f}" height="6"/>')
    if estimate is not None and estimate.low is not None and estimate.high is not None:
        low, high = 100 * estimate.low, 100 * estimate.high
        # lengths of at least 0.4, or an interval of no width could not be seen
        shapes.append(
            f'<rect class="whisker" x="{low:.2f}" y="5.2" width="{max(high - low, 0.4):.2f}" '
            f'height="1.6"/><rect class="whisker" x="{low:.2f}" y="2" width="0.4" height="8"/>'
            f'<rect class="whisker" x="{max(high - 0.4, 0):.2f}" y="2" width="0.4" height="8"/>'
        )
    return (
        '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(shapes)}</svg>"
    )


def _marker(style: int, x: float, y: float) -> str:
    """Circle, square, diamond or triangle, by the curve's style."""
    # six colours and four marks: the pairs of twelve curves differ
    place = f'class="mark s{style % 6}"'
    match style % 4:
        case 0:
            return f'<circle {place} cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
        case 1:
            return f'<rect {place} x="{x - 3.2:.1f}" y="{y - 3.2:.1f}" width="6.4" height="6.4"/>'
        case 2:
            corners = [(x, y - 4.6), (x + 4.6, y), (x, y + 4.6), (x - 4.6, y)]
        case _:
            corners = [(x, y - 4.4), (x + 4.4, y + 3.6), (x - 4.4, y + 3.6)]
    points = " ".join(f"{px:.1f},{py:.1f}" for px, py in corners)
    return f'<polygon {place} points="{points}"/>'


def legend(lines: Sequence[Line]) -> str:
    """The legend of a line chart, as a list."""
    items = []
    for line in lines:
        dash = " dashed" if line.dashed else ""
        sample = (
            '<svg class="key" viewBox="0 0 34 12" aria-hidden="true">'
            f'<path class="line s{line.style % 6}{dash}" d="M1 6H33"/>'
            f"{_marker(line.style, 17.0, 6.0)}</svg>"
        )
        items.append(f"<li>{sample}{escape(line.label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _frame(x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
    """Axes with a grid line every 25 %; x_ticks are (pixel, text)."""
    plot_height = HEIGHT - _TOP - _BOTTOM
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = _TOP + plot_height * (1 - percent / 100)
        parts.append(f'<path class="gridline" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    parts.extend(
        f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{escape(text)}</text>'
        for x, text in x_ticks
    )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" transform="translate(11 {_TOP + plot_height / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _svg(title: str, body: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
    )


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
    at: float | None = None,
) -> str:
    """Curves over a numeric axis; `at` marks one x, e.g. the threat of the headline."""
    xs = [point[0] for line in lines for point in line.points] + list(x_ticks)
    low, high = min(xs), max(xs)
    span = (high - low) or 1.0  # of a single point

    def px(x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (x - low) / span

    def py(y: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - min(max(y, 0.0), 1.0))

    body = [_frame([(px(x), _number(x)) for x in x_ticks], x_label, y_label)]
    if at is not None and low <= at <= high:
        body.append(f'<path class="at" d="M{px(at):.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>')
    for line in lines:
        # points without an interval have no part in the band
        banded = [p for p in line.points if len(p) >= 4]
        if len(banded) > 1:
            edge = [f"{px(p[0]):.1f},{py(p[3]):.1f}" for p in banded]
            edge += [f"{px(p[0]):.1f},{py(p[2]):.1f}" for p in reversed(banded)]
            body.append(f'<polygon class="band s{line.style % 6}" points="{" ".join(edge)}"/>')
        dash = " dashed" if line.dashed else ""
        body.extend(
            f'<path class="line s{line.style % 6}{dash}" '
            f'd="M{px(a[0]):.1f} {py(a[1]):.1f}L{px(b[0]):.1f} {py(b[1]):.1f}"/>'
            for a, b in pairwise(line.points)
        )
        body.extend(_marker(line.style, px(p[0]), py(p[1])) for p in line.points)
    return _svg(title, "".join(body))


def histogram(counts: Sequence[int], *, title: str, x_label: str, y_label: str) -> str:
    """Shares of a count from 0 to len(counts) - 1, as bars with their percentage on top."""
    total, num = max(sum(counts), 1), len(counts)
    step = (WIDTH - _LEFT - _RIGHT) / num
    ticks = [(_LEFT + (i + 0.5) * step, str(i)) for i in range(num)]
    body = [_frame(ticks, x_label, y_label)]
    for (x, _), count in zip(ticks, counts, strict=True):
        share = count / total
        tall = (HEIGHT - _TOP - _BOTTOM) * share
        y = HEIGHT - _BOTTOM - tall
        body.append(
            f'<rect class="column" x="{x - step * 0.36:.1f}" y="{y:.1f}" '
            f'width="{step * 0.72:.1f}" height="{tall:.1f}"/>'
            # the figure of a full bar stays within the chart
            f'<text class="value" x="{x:.1f}" y="{max(y - 4, _TOP - 3):.1f}" '
            f'text-anchor="middle">{100 * share:.0f}</text>'
        )
    return _svg(title, "".join(body))
