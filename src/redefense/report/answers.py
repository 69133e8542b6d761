"""The first screen of a report: title, one-sentence summary, and three questions."""

from collections.abc import Sequence
from typing import NamedTuple

from redefense.report.ranking import best, mean_aware, names, ranked, repeats
from redefense.report.sentences import PERCENT, Verdict, budget, verdict
from redefense.report.tables import labels_of, percent
from redefense.results.join import Result


def title(results: Sequence[Result]) -> str:
    """The question that the page answers."""
    groups = repeats(results)
    (name, *_) = names(groups, results)
    if len(groups) == len(groups[0]) == 1:
        return f"How robust is {groups[0][0].name} under attack?"
    if len(groups) == 1:
        return f"How robust is {name} under attack, over {len(groups[0])} seeds?"
    runs = sum(map(len, groups))
    kind = "runs" if runs == len(groups) else "methods"
    return f"Which of these {len(groups)} {kind} is the most robust?"


def summary(results: Sequence[Result]) -> str:
    """The summary in one sentence."""
    groups = repeats(results)
    called, top, mine = names(groups, results)[0], best(results), groups[0]
    if top.aware is None:
        return (
            f"Nothing can be claimed about the robustness of {called}: no aware attack was run, "
            "or its per-image records are missing."
        )
    mean = f", the mean of {len(mine)} seeds" if len(mine) > 1 else ""
    message = (
        f"{called} classifies {percent(mean_aware(mine))}{PERCENT} of the images correctly "
        f"under the strongest attack on each image{mean}"
    )
    if others := _others(results):
        return f"{message}; next comes {others[0]}."
    # of a single method the reader wants to know next whether the draw is worth it
    return f"{message}{_worth(top, verdict(top))}."


def _others(results: Sequence[Result]) -> list[str]:
    """Every method but the best, with its accuracy under attack."""
    groups = repeats(results)
    return [
        f"{name} {percent(mean_aware(group))}{PERCENT}"
        for name, group in list(zip(names(groups, results), groups, strict=True))[1:]
        # runs of one method differ only by their seed: all have this figure, or none
        if group[0].aware is not None
    ]


def _worth(result: Result, worth: Verdict) -> str:
    """The effect of the draw, as the end of a sentence."""
    if result.num_members == 1:
        return ""
    if worth.answer == "yes":
        return ", and drawing a member at random improves on every deterministic baseline"
    if worth.answer == "no":
        return ", but a deterministic baseline has a higher accuracy"
    if worth.short == "not shown":
        return ", and whether the random draw helps is not shown"
    return ", and whether the random draw helps was not measured"


class Answer(NamedTuple):
    """One question of the first screen, with a short answer and an explanation."""

    question: str
    lead: str
    text: str


def answers(results: Sequence[Result]) -> list[Answer]:
    """The questions of the first screen with answers about the best run.

    For a single network the question about randomness is omitted.
    """
    top = best(results)
    found = [_how(results, top), _whom(top)]
    if top.num_members == 1:
        return found
    worth = verdict(top)
    return [
        *found,
        Answer(
            question="Does the randomness help?", lead=worth.short.capitalize(), text=worth.sentence
        ),
    ]


MOST_OTHERS = 5
"""Number of further methods on the first screen."""


def _how(results: Sequence[Result], top: Result) -> Answer:
    mine = repeats(results)[0]
    called = dict(zip(results, labels_of(results), strict=True))
    clean = f" Without an attack: {percent(top.clean)}{PERCENT}." if top.clean else ""
    if top.aware is None:
        lead, message = "Unknown", (
            "This is unknown: no aware attack was run, or its records are missing. Run `redefense "
            f"evaluate` with the suite quick or aware.{clean}"
        )  # fmt: skip
    elif len(mine) > 1:
        lead = f"{percent(mean_aware(mine))}{PERCENT}"
        each = ", ".join(f"{percent(r.aware)}{PERCENT}" for r in mine)
        message = (
            f"Accuracy under attack: the mean of {len(mine)} runs that differ only by their seed "
            f"({each}). The following figures are of {called[top]}, the median run.{clean}"
        )
    else:
        lead = f"{percent(top.aware)}{PERCENT}"
        message = f"Accuracy under attack ({called[top]}).{clean}"
    if others := _others(results):
        named = others[:MOST_OTHERS]
        more = len(others) - len(named)
        message += f" The others: {', '.join(named)}" + (f", and {more} more below." * bool(more))
        message += "" if more else "."
    # stated, since they are missing in the ranking
    elsewhere = len({r.name for r in results}) - len(ranked(results))
    if elsewhere > 0:
        runs = "1 run" if elsewhere == 1 else f"{elsewhere} runs"
        message += (
            f" Not compared: {runs} on other images, under other attacks or within another budget."
        )
    return Answer(question="How robust is it?", lead=lead, text=message)


def _whom(top: Result) -> Answer:
    """The attacks, and the accuracy under unaware attacks."""
    # attacks without a bound have no part in the figures of a budget
    attackers = len(top.bounded)
    s, were = ("", "was") if attackers == 1 else ("s", "were")
    ran = f"{attackers} attack{s} within this budget {were} run"
    alone = top.num_members == 1  # then there is no draw that an attacker could be unaware of
    if not alone and top.aware is None:
        return Answer(
            question="Against whom?",
            lead=f"An unaware attacker, {top.threat}",
            text=f"The attacker may {budget(top)} and does not know how a member is drawn; {ran}.",
        )
    # the number of members is unknown without records
    members = f"all {top.num_members} members" if top.num_members else "the network"
    known = "the network" if alone else f"{members} and the probability of each"
    if top.stochastic is not None:
        known = "the network and how it draws"
    hidden = "" if alone else ", but not the next draw"
    message = f"The attacker may {budget(top)} and knows {known}{hidden}; {ran}."
    if not alone and top.unaware is not None and top.aware is not None:
        gap = 100 * (top.unaware.value - top.aware.value)
        message += (
            f" Accuracy under unaware attacks is {percent(top.unaware)}{PERCENT}. The difference "
            f"of {gap:.1f} points is lost as soon as the attacker knows the method, so report the "
            "lower figure."
        )
    return Answer(question="Against whom?", lead=f"An aware attacker, {top.threat}", text=message)
