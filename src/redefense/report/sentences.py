"""Sentences that explain the figures of joined results to non-specialists."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from redefense.report.tables import interval, labels_of, percent
from redefense.results.intervals import Estimate
from redefense.results.join import Result, eps_text
from redefense.results.records import OF_DEFENCE, Check
from redefense.results.untrained import degenerate_members

SAID = "What the figures say of the defence:"
"""What stands above these."""

RIVALS = (
    "Each single member and the average were attacked for themselves, too, and every point that "
    "was found counts against each of them, as it does against the draw: all are worst cases."
)
"""What the draw is compared with."""

PERCENT = "\u00a0%"
"""The sign, on the line of its figure."""


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
        return f"change every pixel by at most {eps_text(result.eps)} of its range"
    return f"move an image by at most {eps_text(result.eps)} in the l{result.norm} norm"


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
    """Sampled members against single members and the averaged ensemble, paired.

    On equal terms: each in its own worst case, over everything that was run.
    """
    if result.num_members == 1:
        return Verdict(answer="open", short="nothing is drawn", sentence="There is one member.")
    rivals = [
        (name, figure, gain)
        for name, figure, gain in (
            *_single(result),
            ("the averaged ensemble", result.averaged, result.over_averaged),
        )
        if figure is not None
    ]
    if result.aware is None or not rivals:
        return Verdict(
            answer="open",
            short="not measured",
            sentence="That takes an attack that knows the ensemble, on the draw, on the single "
            "members and on the average alike.",
        )
    gains = [(name, gain) for name, _, gain in rivals if gain is not None]
    if not gains:
        figures = " and ".join(f"{name} {percent(figure)}{PERCENT}" for name, figure, _ in rivals)
        return Verdict(
            answer="open",
            short="no paired figures",
            sentence=f"Beside its {percent(result.aware)}{PERCENT}, {figures} stay right; without "
            "per-image records the difference has no interval.",
        )
    told = ", ".join(f"{_points(gain)} against {name}" for name, gain in gains)
    equal = f"Each in its own worst case, the draw keeps {_with_interval(result.aware)}"
    worse = [name for name, gain in gains if gain.high is not None and gain.high < 0]
    if worse:
        return Verdict(
            answer="no",
            short="no",
            sentence=f"{equal}; {' and '.join(worse)} {'does' if len(worse) == 1 else 'do'} "
            f"better without any draw: {told}.",
        )
    clear = len(gains) > 1 and all(gain.low is not None and gain.low > 0 for _, gain in gains)
    if clear:
        return Verdict(
            answer="yes",
            short="yes",
            sentence=f"{equal}, more than without the draw: {told}.",
        )
    return Verdict(
        answer="open",
        short="not shown",
        sentence=f"{equal}, on {result.num_images} images not clearly more than both: {told}.",
    )


def _single(result: Result) -> list[tuple[str, Estimate | None, Estimate | None]]:
    """The single members to be compared with: name, figure and gain over it."""
    best, chosen = result.best_alone, (result.single, result.over_single)
    if not result.alone:
        return [(f"the member {_chosen_on(result)}", *chosen)]
    if result.single is not None and best is not None and result.single.value >= best.value:
        return [("the best member alone", *chosen)]
    return [
        (f"the member {_chosen_on(result)}", *chosen),
        ("the best member alone", best, result.over_alone),
    ]


def _chosen_on(result: Result) -> str:
    where = "validation images" if result.chosen_on == "validation" else result.chosen_on
    return f"chosen on {where}" if where else "that was chosen"


def members_alone(result: Result) -> str:
    """What every member keeps without the others, and which was chosen; empty if not attacked."""
    if not result.alone:
        return f"Only the member {_chosen_on(result)} was attacked alone." if result.single else ""
    told = f"Alone, the members keep {', '.join(map(percent, result.alone))}{PERCENT}."
    if result.single_index is None:
        return told
    return f"{told} The one {_chosen_on(result)} is member {result.single_index}, counted from 0."


def members_weak(each: Sequence[float], mixture: Sequence[float] | None = None) -> str:
    """Which members answer next to nothing on clean images; empty if none does.

    Args:
        each: clean accuracy of every member.
        mixture: with what probability each is drawn; None draws all.
    """
    if not (weak := degenerate_members(each, mixture)):
        return ""
    told = " and ".join(f"member {m} answers {100 * each[m]:.1f}{PERCENT}" for m in weak)
    return (
        f"Untouched, {told} of the images, where the best answers {100 * max(each):.1f}{PERCENT}: "
        "queries that meet such a member are lost."
    )


def weak_of(result: Result) -> str:
    """The same of a joined result."""
    return members_weak(result.clean_members, result.evaluations[0].mixture)


def checks_of(result: Result) -> tuple[list[Check], list[Check]]:
    """The checks of the measurement, and those of `OF_DEFENCE` that have something to say."""
    measured = [check for check in result.checks if check.id not in OF_DEFENCE]
    said = [c for c in result.checks if c.id in OF_DEFENCE and c.passed is not None]
    return measured, said


BESIDE = 5
"""Runs that the first screen names beside the best."""


def foremost(results: Sequence[Result]) -> list[Result]:
    """Of each run the result to quote: that under most attacks, of those the one on most images."""

    def weight(result: Result) -> tuple[bool, int, int]:
        return result.aware is not None, len(result.bounded), result.num_images

    runs = dict.fromkeys(result.name for result in results)
    return [max((r for r in results if r.name == run), key=weight) for run in runs]


def ranked(results: Sequence[Result]) -> list[Result]:
    """The foremost results that one may compare, highest aware accuracy first.

    They are about the data and the threat of the first result that has such an accuracy: what is
    left on other data or within another budget says nothing about these.
    """
    known = foremost(results)
    first = next((r for r in known if r.aware is not None), known[0])
    alike = [r for r in known if _about(r) == _about(first)]
    return sorted(alike, key=lambda r: -1.0 if r.aware is None else r.aware.value, reverse=True)


def _about(result: Result) -> tuple[str, str, str, float | None]:
    return result.data.name, result.data.split, result.norm, result.eps


def repeats(results: Sequence[Result]) -> list[list[Result]]:
    """The `ranked` results, those together whose runs differ by their seed alone.

    The group of the highest mean comes first; within each, the lowest aware accuracy does.
    """
    groups: dict[object, list[Result]] = {}
    for result in reversed(ranked(results)):
        groups.setdefault(_settings(result), []).append(result)
    return sorted(groups.values(), key=_mean, reverse=True)


def _settings(result: Result) -> object:
    """The run's settings but its seed; the result itself where they are unknown."""
    run = next((e.run for e in result.evaluations if e.run), {})
    if not isinstance(run.get("defence"), Mapping) or "seed" not in run or result.aware is None:
        return result
    return json.dumps({k: run[k] for k in sorted(run) if k not in ("name", "seed")}, sort_keys=True)


def _mean(group: Sequence[Result]) -> float:
    return sum(-1.0 if r.aware is None else r.aware.value for r in group) / len(group)


def best(results: Sequence[Result]) -> Result:
    """The run to tell of: of the best method the middle one of its seeds, never the luckiest."""
    group = repeats(results)[0]
    return group[(len(group) - 1) // 2]


def _method(group: Sequence[Result]) -> str:
    """What runs that differ by their seed alone are called together."""
    return str(next(e.run for e in group[0].evaluations if e.run)["defence"]["name"])


def title(results: Sequence[Result]) -> str:
    """What the page is headed by: the figure of the best method, its mean where seeds differ."""
    group, top = repeats(results)[0], best(results)
    if top.aware is None:
        names = ", ".join(dict.fromkeys(result.name for result in results))
        return f"{names}: no robustness can be claimed yet"
    who = "right under attack by someone who knows the ensemble"
    if len(group) == 1:
        name = dict(zip(results, labels_of(results), strict=True))[top]
        return f"{name}: {percent(top.aware)} % {who}"
    return f"{_method(group)}: {percent(_mean(group))} % {who}, the mean of {len(group)} runs"


def _with_interval(estimate: Estimate | None) -> str:
    ends = interval(estimate)
    return f"{percent(estimate)}{PERCENT}" + (f" ({ends})" if ends else "")


class Answer(NamedTuple):
    """One question of the first screen: the answer in a word or figure, then in sentences."""

    question: str
    lead: str
    text: str


def answers(results: Sequence[Result]) -> list[Answer]:
    """The three questions of the first screen, answered about the best of the runs."""
    top, mine = best(results), repeats(results)[0]
    called = dict(zip(results, labels_of(results), strict=True))
    if top.aware is None:
        how = (
            "That cannot be said: no attack that knows the ensemble was run, or its records are "
            "missing."
        )
    else:
        how = (
            f"{called[top]} still answers {_with_interval(top.aware)} of the images correctly when "
            "each is attacked by whatever worked best against it"
        )
        if len(mine) > 1:
            each = ", ".join(f"{percent(r.aware)}{PERCENT}" for r in mine)
            how = (
                f"{len(mine)} runs of {_method(mine)} that differ by their seed alone keep {each}"
                f". What follows is about the middle one: {how}"
            )
        clean = f"; untouched, it answers {percent(top.clean)}{PERCENT}." if top.clean else "."
        how += clean
    others = [r for r in ranked(results) if r.aware is not None and r not in mine]
    if others:
        told = [f"{called[r]} {percent(r.aware)}{PERCENT}" for r in others[:BESIDE]]
        more = len(others) - len(told)
        how += f" Beside it: {', '.join(told)}" + (f", and {more} more below." if more else ".")
    if (elsewhere := len(foremost(results)) - len(ranked(results))) > 0:
        runs = "1 run" if elsewhere == 1 else f"{elsewhere} runs"
        how += f" Not compared with it: {runs} on other data or within another budget."
    attackers = len(top.bounded)
    members = f"all {top.num_members} members" if top.num_members else "all members"
    alone = top.num_members == 1
    were = "attack within this budget was" if attackers == 1 else "attacks within this budget were"
    tried = f"({attackers} {were} tried)"
    knows = alone or top.aware is not None
    if knows:
        draw = f"{members} and how one is drawn, but not which will answer"
        known = f"knows {'the network' if alone else draw}"
    else:
        known = "does not know how a member is drawn"
    whom = f"Against an attacker who may {budget(top)}, and {known} {tried}."
    if not alone and top.unaware is not None and top.aware is not None:
        gap = 100 * (top.unaware.value - top.aware.value)
        whom += (
            f" The strongest attack here that does not know about the draw leaves "
            f"{_with_interval(top.unaware)} right: the {gap:.1f} points between the two are no "
            "robustness. They rest on what it does not know, and on how much less it tries."
        )
    worth = verdict(top)
    return [
        Answer(
            question="How robust is it?",
            lead=f"{percent(_mean(mine))}{PERCENT}" if top.aware is not None else "Unknown",
            text=how,
        ),
        Answer(
            question="Against whom?",
            lead=f"One who {'knows' if knows else 'does not know'}, {top.threat}",
            text=whom,
        ),
        Answer(
            question="Is the randomness worth it?",
            lead=worth.short.capitalize(),
            text=worth.sentence,
        ),
    ]
