"""Sentences about one joined result, for readers who do not know the method."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from redefense.report.tables import percent
from redefense.results.intervals import Estimate
from redefense.results.join import Result, eps_text
from redefense.results.schema import OF_DEFENCE, Check
from redefense.results.untrained import degenerate_members

SAID = "What the figures say of the defence:"
"""What stands above these."""

RIVALS = (
    "Each single member and the average were attacked on their own as well. Every attacked image "
    "that was found counts against all of them and against the random draw: all are worst cases."
)
"""What the draw is compared with."""

PERCENT = "\u00a0%"
"""The sign, on the line of its figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """A classifier without a draw: what it keeps, and how much more the draw keeps (paired)."""

    name: str
    figure: Estimate
    gain: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Is the randomness worth it?

    Attributes:
        answer: "yes", "no" or "open".
        short: a few words.
        sentence: one sentence, without intervals.
        rivals: the figures behind it, for a table.
    """

    answer: str
    short: str
    sentence: str
    rivals: tuple[Rival, ...] = ()


def budget(result: Result) -> str:
    """What the attacker may do to an image."""
    if result.eps is None:
        return "change an image by an amount that was not recorded"
    if result.norm == "inf":
        return f"change every pixel by at most {eps_text(result.eps)} of its range"
    return f"move an image by at most {eps_text(result.eps)} in the l{result.norm} norm"


def verdict(result: Result) -> Verdict:
    """Sampled members against single members and the averaged ensemble, paired.

    On equal terms: each in its own worst case, over everything that was run.
    """
    if result.num_members == 1:
        return Verdict(
            answer="open",
            short="nothing is drawn",
            sentence="This is one network: nothing is drawn at random.",
        )
    rivals = tuple(_rivals(result))
    if result.aware is None or not rivals:
        return Verdict(
            answer="open",
            short="not measured",
            sentence="This needs an attack that knows the ensemble, run on the random draw, on the "
            "single members and on the average: evaluate with the suite quick or aware.",
        )
    keeps = f"Drawing a member at random keeps {percent(result.aware)}{PERCENT} under attack"
    paired = [(rival, rival.gain) for rival in rivals if rival.gain is not None]
    if not paired:
        told = " and ".join(map(_keeps, rivals))
        return Verdict(
            answer="open",
            short="no paired figures",
            sentence=f"{keeps}, {told}; whether the difference is more than chance cannot be said "
            "without per-image records.",
            rivals=rivals,
        )
    better = [rival for rival, gain in paired if gain.high is not None and gain.high < 0]
    if better:
        return Verdict(
            answer="no",
            short="no",
            sentence=f"{keeps}; {_keeps(_strongest(better))} without any draw, which is better.",
            rivals=rivals,
        )
    first = _strongest([rival for rival, _ in paired])
    if len(paired) > 1 and all(gain.low is not None and gain.low > 0 for _, gain in paired):
        return Verdict(
            answer="yes",
            short="yes",
            sentence=f"{keeps}, more than any classifier without a draw; {_keeps(first)}.",
            rivals=rivals,
        )
    return Verdict(
        answer="open",
        short="not shown",
        sentence=f"{keeps}; {_keeps(first)} without any draw, and on {result.num_images} images "
        "the draw is not clearly better than both.",
        rivals=rivals,
    )


def _rivals(result: Result) -> Iterator[Rival]:
    for name, figure, gain in (
        *_single(result),
        ("averaged ensemble", result.averaged, result.over_averaged),
    ):
        if figure is not None:
            yield Rival(name=name, figure=figure, gain=gain)


def _strongest(rivals: Sequence[Rival]) -> Rival:
    return max(rivals, key=lambda rival: rival.figure.value)


def _keeps(rival: Rival) -> str:
    return f"the {rival.name} keeps {percent(rival.figure)}{PERCENT}"


def points(gain: Estimate | None) -> tuple[str, str]:
    """A difference in percentage points and its interval, with signs; empty where unknown."""
    if gain is None:
        return "", ""
    ends = [v for v in (gain.low, gain.high) if v is not None]
    return _signed(gain.value), " to ".join(map(_signed, ends))


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def _single(result: Result) -> list[tuple[str, Estimate | None, Estimate | None]]:
    """The single members to be compared with: name, figure and gain over it."""
    best, chosen = result.best_alone, (result.single, result.over_single)
    if not result.alone:
        return [(f"member {_chosen_on(result)}", *chosen)]
    if result.single is not None and best is not None and result.single.value >= best.value:
        return [("best member alone", *chosen)]
    return [
        (f"member {_chosen_on(result)}", *chosen),
        ("best member alone", best, result.over_alone),
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
    told = " and ".join(f"member {m} is right on {100 * each[m]:.1f}{PERCENT}" for m in weak)
    return (
        f"Without any attack, {told} of the images, while the best member is right on "
        f"{100 * max(each):.1f}{PERCENT}. Queries that are answered by such a member are mostly "
        "answered wrongly: train it again, or give it the probability 0."
    )


def weak_of(result: Result) -> str:
    """The same of a joined result."""
    return members_weak(result.clean_members, result.evaluations[0].mixture)


def checks_of(result: Result) -> tuple[list[Check], list[Check]]:
    """The checks of the measurement, and those of `OF_DEFENCE` that have something to say."""
    measured = [check for check in result.checks if check.id not in OF_DEFENCE]
    said = [c for c in result.checks if c.id in OF_DEFENCE and c.passed is not None]
    return measured, said
