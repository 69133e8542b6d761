"""Baselines of a stochastic network: the mean probability and the majority vote of its draws.

Both are attacked by the suite's `baseline_attacks`, on the mean probability of the attackers'
draws. Their worst case is over these points and those of all other attacks. Each answers from one
half of the scoring draws; the worst attack is chosen on the other half, then the halves are
swapped, as for single draws.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from redefense.attacks import Attack
from redefense.evaluation.headline import interval
from redefense.evaluation.plan import Job, Planned, attack_of
from redefense.evaluation.stochastic.cells import DrawnCell, Draws, attack_drawn
from redefense.evaluation.store import forget, own_images
from redefense.results.accuracy import Bools, Floats
from redefense.stochastic.ensemble import Stochastic

NOTHING: Final[dict[str, Any]] = dict.fromkeys(
    ("averaged", "averaged_interval", "vote", "vote_interval", "averaged_draws")
)
"""Entries of the headline for a suite that does not attack these baselines."""


def average_and_vote(
    job: Job, plan: Sequence[Planned], network: Stochastic, draws: Draws, cells: Sequence[DrawnCell]
) -> dict[str, Any]:
    """Entries of the headline.

    Images on which one earlier point makes average and vote wrong in both halves of the draws are
    not attacked.

    Args:
        job: the evaluation.
        plan: its cells; attacks on the average that it has are not repeated.
        network: what is attacked.
        draws: numbers of seeds.
        cells: of all bounded attacks at the headline's threat, the last that of the clean images.
    """
    if not job.suite.baseline_attacks:
        return NOTHING
    tried = list(cells)
    for number, spec in enumerate(job.suite.baseline_attacks):
        attack = attack_of(spec)
        if any(
            (planned.attack, planned.spec.view, planned.threat) == (attack, "averaged", job.threat)
            for planned in plan
        ):
            continue  # it is among the cells
        answers = np.stack([cell.averaged_halves | cell.vote_halves for cell in tried])
        rows = np.flatnonzero(answers.any(1).all(0))
        if len(rows) == 0:  # nor for later attacks, which would have the same images
            break
        found = _attacked(job, network, attack, draws, f"averaged-{spec.attack}-{number}", rows)
        # where no image was attacked, its clean image
        tried.append(_inserted(cells[-1], found, rows))
    shares = np.stack([_half_means(cell.correct) for cell in tried])
    headline: dict[str, Any] = {"averaged_draws": draws.score // 2}
    for key in ("averaged", "vote"):
        answers = np.stack([getattr(cell, f"{key}_halves") for cell in tried])
        right = _worst(answers, shares).mean(0)
        headline |= {key: float(right.mean()), f"{key}_interval": interval(right)}
    return headline


def _half_means(correct: Bools) -> Floats:
    """(2, n) share of correct draws in each half."""
    return np.stack([half.mean(0) for half in np.split(correct, 2)])


def _inserted(clean: DrawnCell, found: DrawnCell, rows: NDArray[np.int64]) -> DrawnCell:
    """The records of all images, of which `found` has some."""
    whole = {}
    for key in ("correct", "averaged_halves", "vote_halves"):
        whole[key] = getattr(clean, key).copy()
        whole[key][:, rows] = getattr(found, key)
    return replace(clean, **whole)


def _worst(answers: Bools, shares: Floats) -> Bools:
    """(2, n) answers of each half at the point that is worst on the other half.

    Args:
        answers: (A, 2, n) whether each half answers correctly.
        shares: (A, 2, n) share of correct draws in each half, which decides between equal answers.
    """
    images, found = np.arange(answers.shape[2]), []
    for scored, chosen_on in ((0, 1), (1, 0)):
        # halved, so that shares decide between equal answers and never against different ones
        worst = (answers[:, chosen_on] + shares[:, chosen_on] / 2).argmin(0)
        found.append(answers[worst, scored, images])
    return np.stack(found)


def _attacked(
    job: Job, network: Stochastic, attack: Attack, draws: Draws, name: str, rows: NDArray[np.int64]
) -> DrawnCell:
    """The attack on the mean probability, on some of the images; read from the store if there."""
    subject, place, kept = job.subject, job.place(f"{name}.npz"), job.place(f"{name}.chunks")
    stored = DrawnCell.read(place)
    if isinstance(stored, DrawnCell) and stored.correct.shape == (draws.score, len(rows)):
        return stored
    some = subject.some(rows)
    job.progress.begin(name, len(rows), share=own_images(len(rows), subject.workers, subject.chunk))
    cell = attack_drawn(
        some, network, attack, job.threat, "averaged", draws,
        seed=job.seed, name=name, kept=kept, progress=job.progress,
    )  # fmt: skip
    if (saved := job.save(place)) is not None:
        cell.save(saved, some.index)
        forget(kept)
    job.log(f"{name}: {100 * cell.averaged.mean():.1f} % of {len(rows)} images, by the average")
    subject.workers.wait()
    return cell
