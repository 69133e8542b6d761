"""Sentences about one joined result, for readers who do not know the method."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from redefense.radius import eps_text
from redefense.report.tables import percent
from redefense.results.accuracy import degenerate_members
from redefense.results.intervals import Estimate
from redefense.results.join import Result
from redefense.results.schema import OF_DEFENCE, Check

SAID = "About the defence:"
"""Heading of the checks in `OF_DEFENCE`."""

HOW_COMPARED = (
    "Each single member and the average were attacked, too. Every adversarial image that was found "
    "counts for all of them and for the random draw: all figures are worst cases."
)
"""Note on the baselines of the draw."""


def on_validation(results: Sequence[Result]) -> str | None:
    """Note on figures that cannot be quoted; None if all are of test or given images."""
    if all(result.data.split != "validation" for result in results):
        return None
    return (
        "Validation images were held out in training, but settings may have been chosen on them: "
        "quote figures of test images."
    )


PERCENT = "\u00a0%"
"""The percent sign with a non-breaking space."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """A deterministic baseline: its accuracy, and the paired gain of the draw over it."""

    name: str
    figure: Estimate
    gain: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the randomness helps.

    Attributes:
        answer: "yes", "no" or "open".
        short: a few words.
        sentence: one sentence, without intervals.
        baselines: the baselines with their figures, for a table.
    """

    answer: str
    short: str
    sentence: str
    baselines: tuple[Baseline, ...] = ()


def budget(result: Result) -> str:
    """The attack budget as a verb phrase."""
    if result.eps is None:
        return "change an image by an amount that was not recorded"
    if result.norm == "inf":
        return f"change every pixel by at most {eps_text(result.eps)} of its range"
    return f"change an image by at most {eps_text(result.eps)} in the l{result.norm} norm"


def verdict(result: Result) -> Verdict:
    """Compare the sampled ensemble with single members and the averaged ensemble, paired.

    Each is in its own worst case over all attacks.
    """
    if result.num_members == 1:
        return Verdict(
            answer="open",
            short="nothing is drawn",
            sentence="This is one network: nothing is drawn at random.",
        )
    baselines = tuple(_baselines(result))
    if result.aware is None or not baselines:
        return Verdict(
            answer="open",
            short="not measured",
            sentence="This needs an aware attack on the random draw, the single members and the "
            "average: evaluate with the suite quick or aware.",
        )
    keeps = f"A randomly drawn member has {percent(result.aware)}{PERCENT} accuracy under attack"
    paired = [(baseline, baseline.gain) for baseline in baselines if baseline.gain is not None]
    # intervals of two accuracies on the same images do not tell whether they differ
    if not paired:
        message = " and ".join(map(_keeps, baselines))
        return Verdict(
            answer="open",
            short="no paired figures",
            sentence=f"{keeps}, {message}; without per-image records it is unknown whether the "
            "difference is significant.",
            baselines=baselines,
        )
    # the whole interval of the paired difference lies below 0
    better = [baseline for baseline, gain in paired if gain.high is not None and gain.high < 0]
    if better:
        return Verdict(
            answer="no",
            short="no",
            sentence=f"{keeps}; {_keeps(_strongest(better))} without a draw, which is better.",
            baselines=baselines,
        )
    # against the strongest one, since beating the others says little
    first = _strongest([baseline for baseline, _ in paired])
    # both kinds of baseline must be known, since either could be the better one
    if len(paired) > 1 and all(gain.low is not None and gain.low > 0 for _, gain in paired):
        return Verdict(
            answer="yes",
            short="yes",
            sentence=f"{keeps}, more than any deterministic baseline; {_keeps(first)}.",
            baselines=baselines,
        )
    return Verdict(
        answer="open",
        short="not shown",
        sentence=f"{keeps}; {_keeps(first)} without a draw, and on {result.num_images} images the "
        "draw is not significantly better than both.",
        baselines=baselines,
    )


def _baselines(result: Result) -> Iterator[Baseline]:
    for name, figure, gain in (
        *_single(result),
        ("averaged ensemble", result.averaged, result.over_averaged),
    ):
        if figure is not None:
            yield Baseline(name=name, figure=figure, gain=gain)


def _strongest(baselines: Sequence[Baseline]) -> Baseline:
    return max(baselines, key=lambda baseline: baseline.figure.value)


def _keeps(baseline: Baseline) -> str:
    return f"the {baseline.name} has {percent(baseline.figure)}{PERCENT}"


def points(gain: Estimate | None) -> tuple[str, str]:
    """A difference in percentage points and its interval, with signs; empty if unknown."""
    if gain is None:
        return "", ""
    ends = [v for v in (gain.low, gain.high) if v is not None]
    return _signed(gain.value), " to ".join(map(_signed, ends))


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\u2212")  # the minus sign, as wide as a plus


def _single(result: Result) -> list[tuple[str, Estimate | None, Estimate | None]]:
    """The single-member baselines: name, figure and gain over it."""
    best, chosen = result.best_alone, (result.single, result.over_single)
    if not result.alone:
        return [(f"member {_chosen_on(result)}", *chosen)]
    # the chosen one is the best: one row instead of two equal ones
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
    """Accuracy of every single member, and which one was chosen; empty if not attacked."""
    if not result.alone:
        return f"Only the member {_chosen_on(result)} was attacked." if result.single else ""
    message = f"Accuracy of the single members: {', '.join(map(percent, result.alone))}{PERCENT}."
    if result.single_index is None:
        return message
    return (
        f"{message} The one {_chosen_on(result)} is member {result.single_index}, counting from 0."
    )


def members_weak(each: Sequence[float], mixture: Sequence[float] | None = None) -> str:
    """Sentences about members with low clean accuracy; empty if there are none.

    Args:
        each: clean accuracy of every member.
        mixture: (M,) sampling probabilities; None counts all members.
    """
    if not (weak := degenerate_members(each, mixture)):
        return ""
    message = " and ".join(f"member {m} is correct on {100 * each[m]:.1f}{PERCENT}" for m in weak)
    return (
        f"Without an attack, {message} of the images, while the best member is correct on "
        f"{100 * max(each):.1f}{PERCENT}. Queries answered by such a member are mostly wrong: "
        "train it again, or set its probability to 0."
    )


def weak_of(result: Result) -> str:
    """`members_weak` of a joined result."""
    return members_weak(result.clean_members, result.evaluations[0].mixture)


def checks_of(result: Result) -> tuple[list[Check], list[Check]]:
    """The checks of the measurement, and the failed ones of `OF_DEFENCE`."""
    measured = [check for check in result.checks if check.id not in OF_DEFENCE]
    # those that did not run say nothing about the defence
    of_defence = [c for c in result.checks if c.id in OF_DEFENCE and c.passed is not None]
    return measured, of_defence
