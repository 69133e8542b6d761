"""What the figures mean, in sentences a layman can follow. Pure functions of the joined results."""

from collections.abc import Sequence
from dataclasses import dataclass

from redefense.evaluation.joined import Result
from redefense.evaluation.statistics import Estimate
from redefense.evaluation.tables import interval, percent


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Is the randomness worth it: `yes`, `no` or `open`, a few words and the sentence behind."""

    answer: str
    short: str
    sentence: str


def budget(result: Result) -> str:
    """What the attacker may do to an image."""
    if result.eps is None:
        return "change an image by an amount that was not recorded"
    if result.norm == "inf":
        levels = result.eps * 255
        whole = abs(levels - round(levels)) < 1e-6 and round(levels) > 0
        size = f"{round(levels)}/255" if whole else f"{result.eps:g}"
        return f"change every pixel by at most {size} of its range"
    return f"move an image by at most {result.eps:g} in the l{result.norm} norm"


def _points(estimate: Estimate) -> str:
    sign = "+" if estimate.value >= 0 else "\u2212"
    ends = ""
    if estimate.low is not None and estimate.high is not None:
        low, high = (
            f"{100 * v:+.1f}".replace("-", "\u2212") for v in estimate[1:] if v is not None
        )
        ends = f" [{low}, {high}]"
    return f"{sign}{abs(100 * estimate.value):.1f} points{ends}"


def verdict(result: Result) -> Verdict:
    """Sampled members against the best single member and the averaged ensemble, paired."""
    rivals = [
        (name, figure, gain)
        for name, figure, gain in (
            ("its best single member", result.single, result.over_single),
            ("the averaged ensemble", result.averaged, result.over_averaged),
        )
        if figure is not None
    ]
    if result.aware is None or not rivals:
        return Verdict(
            answer="open",
            short="not measured",
            sentence="Not measured: the best single member and the averaged ensemble were not "
            "attacked beside it.",
        )
    gains = [(name, gain) for name, _, gain in rivals if gain is not None]
    if not gains:
        figures = " and ".join(f"{name} {percent(figure)} %" for name, figure, _ in rivals)
        return Verdict(
            answer="open",
            short="no paired figures",
            sentence=f"Beside its {percent(result.aware)} %, {figures} stay right; without "
            "per-image records the difference has no interval.",
        )
    told = ", ".join(f"{_points(gain)} against {name}" for name, gain in gains)
    worse = [name for name, gain in gains if gain.high is not None and gain.high < 0]
    if worse:
        return Verdict(
            answer="no",
            short="no",
            sentence=f"No: under attack {' and '.join(worse)} "
            f"{'does' if len(worse) == 1 else 'do'} better without any draw ({told}).",
        )
    if len(gains) == 2 and all(gain.low is not None and gain.low > 0 for _, gain in gains):
        return Verdict(
            answer="yes",
            short="yes",
            sentence=f"Yes: drawing a member keeps more images right ({told}).",
        )
    return Verdict(
        answer="open",
        short="not shown",
        sentence=f"Not shown: on {result.num_images} images the difference cannot be told from "
        f"nothing everywhere ({told}).",
    )


def best(results: Sequence[Result]) -> Result:
    """The run whose aware accuracy is highest; the first one where none is known."""
    return max(results, key=lambda r: r.aware.value if r.aware is not None else -1.0)


def _with_interval(estimate: Estimate | None) -> str:
    ends = interval(estimate)
    return f"{percent(estimate)} %" + (f" ({ends})" if ends else "")


def answers(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The three questions of the first screen and their answers, about the best of the runs."""
    top = best(results)
    if top.aware is None:
        how = (
            "That cannot be said: no attack that knows the ensemble was run, or its records are "
            "missing."
        )
    else:
        how = (
            f"{top.name} still answers {_with_interval(top.aware)} of the images correctly when "
            "each is attacked by whatever worked best against it"
        )
        clean = f"; untouched, it answers {percent(top.clean)} %." if top.clean else "."
        how += clean
    others = [r for r in results if r is not top and r.aware is not None]
    if others and top.aware is not None:
        how += " Beside it: " + ", ".join(f"{r.name} {percent(r.aware)} %" for r in others) + "."
    attackers = len(top.bounded)
    members = f"all {top.num_members} members" if top.num_members else "all members"
    whom = (
        f"Against an attacker who may {budget(top)}, knows {members} and how one is drawn, but "
        f"not which one will answer ({attackers} attack{'s' * (attackers != 1)} within this "
        "budget were tried)."
    )
    if top.unaware is not None and top.aware is not None:
        gap = 100 * (top.unaware.value - top.aware.value)
        whom += (
            f" One who does not know about the draw leaves {_with_interval(top.unaware)} right: "
            f"the {gap:.1f} points between the two rest on his ignorance, not on robustness."
        )
    return [
        ("How robust is it?", how),
        ("Against whom?", whom),
        ("Is the randomness worth it?", verdict(top).sentence),
    ]
