"""Self-checks of figures estimated from draws, and the list of checks that do not apply to them.

Relations that are exact for enumerated members hold for draws only within an interval; a check is
red only outside it. D1 to D3 apply to stochastic networks only.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from redefense.attacks.adaptive import Hinge
from redefense.checks.check import Check
from redefense.checks.results import gap_of_headlines, inert, inside_ball, unchanged
from redefense.checks.sample import evenly_spread
from redefense.checks.victim import before_run
from redefense.config import ThreatConfig
from redefense.evaluation.cells import Subject
from redefense.evaluation.stochastic.cells import DrawnCell, Draws, attack_drawn
from redefense.results.accuracy import Bools
from redefense.results.draws import draws_interval, worst_per_image
from redefense.stochastic.certificates import Certificate
from redefense.stochastic.ensemble import Stochastic

SAMPLE: Final = 64
"""Number of images on which the attacks' seeds are doubled."""
OVERFIT: Final = 0.01
"""Largest allowed loss of accuracy with twice the seeds."""
EXACT: Final = (
    "S02", "S08", "S09", "S10", "S11", "S12", "S13", "S14", "S15", "S16", "S17", "S17b", "S18",
    "S19", "S21", "S28", "S29", "S30", "S31", "S32", "S33", "S35", "S37", "S38", "S39", "S40",
    "S42", "S43", "B1",
)  # fmt: skip
"""Checks that need exact expectations, enumerable members or deterministic outputs."""
FULL: Final = ("S23", "S24", "S25", "S26", "S27", "S44")
"""Checks of `checks="full"`, which need these too."""


def before(network: Stochastic, subject: Subject) -> list[Check]:
    """Checks of the network before the first attack, at two of its seeds."""
    # two stand for all: each of its seeds is a member
    two = network.at(network.seeds[:2])
    found = before_run(two, subject.x, subject.y, repeats=network.governed)
    detail = "a seed repeats an answer"
    if not network.governed:
        detail = "the network has a generator of its own, which no seed governs"
    return [*found, Check("D1", network.governed, detail)]


def after(
    data: Mapping[str, Any], records: Mapping[str, DrawnCell], *, full: bool = False
) -> list[Check]:
    """Checks of the records.

    Args:
        data: the evaluation so far.
        records: of every cell and "clean".
        full: whether the checks that run further attacks were asked for.
    """
    cells = data["cells"]
    # only images that were attacked can show an attack that changes nothing
    attacked = np.logical_and.reduce([record.attacked for record in records.values()])
    clean = np.where(attacked, records["clean"].correct.mean(0), 0.0)
    return [
        inside_ball(cells, records),
        inert(cells),
        unchanged(cells, records, clean),
        _in_order(data["headline"], records["clean"].correct),
        gap_of_headlines(data["headline"], len(records["clean"].correct)),
        *(
            Check(name, None, "does not apply: the draws of a network cannot be listed")
            for name in (*EXACT, *(FULL if full else ()))
        ),
    ]


def _in_order(headline: Mapping[str, Any], clean: Bools) -> Check:
    """S20: unaware accuracy is at least aware accuracy; red only for disjoint intervals."""
    aware, unaware = headline["aware"], headline["unaware"]
    if aware is None or unaware is None:
        return Check("S20", None, "needs attacks of both kinds")
    # the images are the same in both, so that only the draws can have changed their order
    above = headline["aware_interval_draws"][0] > headline["unaware_interval_draws"][1]
    over = headline["unaware_interval_draws"][0] > draws_interval(clean)[1]
    return Check(
        "S20",
        not above and not over,
        f"clean {100 * clean.mean():.1f} %, unaware {100 * unaware:.1f} %, aware "
        f"{100 * aware:.1f} %" + (", out of order beyond the draws' intervals" if above or over
                                  else ", in order within the draws' intervals"),
    )  # fmt: skip


def doubled_seeds(
    subject: Subject,
    network: Stochastic,
    threat: ThreatConfig,
    draws: Draws,
    corrects: Mapping[str, Bools],
    *,
    seed: int,
) -> tuple[Check, Bools]:
    """D2: twice the attack seeds lower accuracy only little, on a sample of the images.

    `corrects` has (S, n) of every bounded attack and of the clean images.

    Returns:
        The check, and (S, n) under the attack, that of the clean image where none was attacked.
    """
    at = evenly_spread(subject.x, SAMPLE).cpu().numpy()
    more = replace(draws, attack=2 * draws.attack)
    found = attack_drawn(
        subject.some(at), network, Hinge(), threat, "members", more, seed=seed, name="D2"
    )
    known = np.stack([correct[:, at] for correct in corrects.values()])
    more_known = np.concatenate([known, found.correct[None]])
    gain = float(worst_per_image(known).mean() - worst_per_image(more_known).mean())
    # images outside of the sample keep their clean record, which lowers no worst case
    whole = corrects["clean"].copy()
    whole[:, at] = found.correct
    return Check(
        "D2",
        gain <= OVERFIT,
        f"twice the attack seeds lower accuracy by {100 * gain:.1f} points on {len(at)} images",
    ), whole


def below_attack(proven: Certificate, headline: Mapping[str, Any]) -> Check:
    """D3: accuracy under attack is at least the certified accuracy of one draw."""
    ends, message = (
        headline["aware_interval_draws"],
        f"one draw: proven {100 * proven.single:.1f} %",
    )
    if ends is None:
        return Check("D3", None, f"{message}, no attacked figure to compare with")
    attacked = f"attacked {100 * headline['aware']:.1f} %"
    return Check("D3", proven.single <= ends[1], f"{message}, {attacked}")
