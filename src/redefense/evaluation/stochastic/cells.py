"""One attack on a stochastic network, with separate seeds to attack, to select and to score.

Seeds are derived from (seed, purpose, draw, chunk). The draws that score a point are independent of
those on which it was optimised or selected.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redefense.attacks import Attack, Foreign
from redefense.attacks.adaptive import Hinge, MeanProbAPGD, MeanProbPGD, Transfer
from redefense.attacks.arc import ARC
from redefense.attacks.auto import AutoAttack
from redefense.attacks.objectives import margin
from redefense.attacks.subset import Subset
from redefense.config import ThreatConfig
from redefense.ensembles import Ensemble
from redefense.evaluation.cells import (
    Cell,
    Keep,
    Subject,
    as_threat,
    joined,
    merged,
    projected,
    sizes,
    verify_ball,
)
from redefense.evaluation.pass_counter import Meter
from redefense.evaluation.progress import SILENT, Progress
from redefense.evaluation.stochastic.views import Fresh, InCalls, InPlace, counted
from redefense.evaluation.store import in_chunks
from redefense.results.accuracy import Bools
from redefense.rng import stream
from redefense.stochastic.ensemble import Stochastic, seeds_of, votes_as_logits
from redefense.types import Bool, Float, Images, Labels, Victim, correct

FRESH: Final = (Hinge, MeanProbPGD, MeanProbAPGD)
"""Attacks that also run with fresh draws at each step, since fixed seeds can be overfitted."""
COSTLY: Final = (ARC, AutoAttack, Subset, Transfer)
"""Attacks whose cost grows faster than the number of members, or that use many queries."""
BATCHED: Final = (*FRESH, AutoAttack)
"""Attacks that query all members at once; others query single members."""
ALPHA: Final = 0.001
"""Significance level of the test of the majority vote, as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Numbers of seeds by purpose.

    Attributes:
        score: fresh draws that score every cell; even, since one half selects for the other.
        select: draws that select one of an attack's candidates.
        attack: seeds that attacks use.
        few: seeds that expensive attacks use.
    """

    score: int
    select: int = 32
    attack: int = 16
    few: int = 4

    def of(self, attack: Attack) -> int:
        """Number of seeds that this attack uses."""
        return min(self.few, self.attack) if isinstance(attack, COSTLY) else self.attack


@dataclass(frozen=True, slots=True)
class DrawnCell(Cell):
    """A cell whose members are the scoring draws.

    Attributes:
        vote: (n,) the majority vote of the scoring draws: 1 correct, 0 wrong, -1 abstained.
        averaged_halves: (2, n) whether the mean probability over each half of the draws is correct.
        vote_halves: (2, n) whether the majority vote of each half is correct and does not abstain.
        attacked: (n,) False where the clean image was fooled already and stayed as it is.
    """

    vote: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, dtype=np.int8))
    averaged_halves: Bools = field(default_factory=lambda: np.zeros((2, 0), dtype=bool))
    vote_halves: Bools = field(default_factory=lambda: np.zeros((2, 0), dtype=bool))
    attacked: Bools = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __post_init__(self) -> None:
        Cell.__post_init__(self)
        if not self.attacked.size:
            object.__setattr__(self, "attacked", np.ones(self.correct.shape[1], dtype=bool))


def candidates(
    network: Stochastic,
    attack: Attack,
    view: str,
    x: Images,
    draws: Draws,
    *,
    seed: int,
    name: str,
    chunk: int,
) -> Iterator[tuple[str, Victim]]:
    """Victims of one attack: fixed seeds, fresh seeds at each step, or both."""
    rng = stream(seed, "draws", name, chunk)
    if view == "sampled":
        yield "sampled", network.sampled(rng=rng)
        return
    count = draws.of(attack)
    fresh, fixed = Fresh(network, count, rng), network.at(seeds_of(seed, "attack", count, chunk))
    batched = network.rows and isinstance(attack, BATCHED)
    steady = InCalls(fixed, x) if batched else InPlace(fixed, x)
    # no seed repeats an answer of an ungoverned network: there is nothing to fix
    seen: list[tuple[str, Ensemble]] = [("fixed", steady)] if network.governed else []
    if isinstance(attack, FRESH) or not network.governed:
        seen.append(("fresh", fresh))
    for kind, ensemble in seen:
        yield kind, ensemble.averaged() if view == "averaged" else ensemble


def attack_drawn(
    subject: Subject,
    network: Stochastic,
    attack: Attack,
    threat: ThreatConfig,
    view: str,
    draws: Draws,
    *,
    seed: int,
    name: str,
    kept: Path | None = None,
    progress: Progress = SILENT,
    purpose: str = "score",
    keep: Keep | None = None,
) -> DrawnCell:
    """Attack all images in fixed chunks, verify the ball, and score the points by fresh draws.

    An attack on many draws leaves images as they are that every selection draw, and their mean
    probability, answer wrongly already: at first the clean ones, then those that the attack on
    fixed seeds has fooled. The scoring draws have no part in this.

    `purpose` names the random streams of the scoring draws; `keep` is called after each chunk.
    """
    budget, column = as_threat(threat), AVERAGED if view == "averaged" else SINGLE

    def work(images: slice) -> dict[str, Any]:
        x, y, chunk = subject.x[images], subject.y[images], images.start
        meter = Meter(progress.passed)
        begun = time.perf_counter()
        judge = counted(network, meter).at(seeds_of(seed, "select", draws.select, chunk))
        x_adv, attacked = x, torch.ones(len(x), dtype=torch.bool, device=x.device)
        # an attack on single draws is to be judged by single draws: no image is left out
        if view != "sampled":
            rated = ratings(judge, x, y)
            attacked = undecided(rated)
        rows = attacked.nonzero().flatten()
        victims = candidates(
            counted(network, meter), attack, view, x[rows], draws, seed=seed, name=name, chunk=chunk
        )
        while len(rows) and (candidate := next(victims, None)):
            kind, victim = candidate
            rng = stream(seed, "attack", name, *([kind] if kind == "fresh" else []), chunk)
            found = attack(victim, x[rows], y[rows], budget, rng=rng)
            # points of users' attacks are projected at the end
            if attack.bounded and not isinstance(attack, Foreign):
                verify_ball(found, x[rows], budget, name)
            points = x_adv.index_copy(0, rows, found)
            if view == "sampled":
                x_adv = points
                continue
            # the result of the first attack counts, whether it is better or not
            rated_points = ratings(judge, points, y)
            better = less(rated_points[:, column], rated[:, column]) | (x_adv is x)
            x_adv = torch.where(better.view(-1, 1, 1, 1), points, x_adv)
            rated = torch.where(better[:, None], rated_points, rated)
            rows = (attacked & undecided(rated)).nonzero().flatten()
        seconds = time.perf_counter() - begun
        cost = {"forwards": meter.forwards, "backwards": meter.backwards, "seconds": seconds}
        foreign = isinstance(attack, Foreign)
        x_adv, reached = projected(x_adv, x, budget) if foreign else (x_adv, {})
        # again, since NaN is not projected, and would count as wrong answers
        if attack.bounded:
            verify_ball(x_adv, x, budget, name)
        # seeds that neither the attack nor the selection has seen
        numbers = seeds_of(seed, purpose, draws.score, chunk)
        judged = scored(network, x_adv, x, y, numbers)
        if keep is not None:
            keep(images, np.arange(len(x)), x_adv, judged["correct"])
        return judged | {"attacked": attacked.cpu().numpy()} | reached | cost

    count = len(subject.x)
    parts = in_chunks(
        count, work, size=subject.chunk, kept=kept, workers=subject.workers, progress=progress
    )
    return DrawnCell(**joined(parts, count))


def ratings(judge: Stochastic, points: Images, y: Labels) -> Float[Tensor, "n 4"]:
    """How the judge's draws answer: the lower, the more likely to fool.

    The columns are the number of correct draws and the sum of their margins (`SINGLE`), and the
    same two for the mean probability of the draws (`AVERAGED`).
    """
    right = torch.zeros(len(y), dtype=torch.float64, device=points.device)
    gaps, logs = torch.zeros_like(right), []
    with torch.no_grad():
        for logits in judge.fresh(judge.seeds, points):
            right += correct(logits, y)
            # in double precision, since a sum over many draws decides between nearly equal points
            gaps -= margin(logits, y).double()
            logs.append(logits.double().log_softmax(1))
        mean = reduce(torch.logaddexp, logs)
    return torch.stack([right, gaps, correct(mean, y).double(), -margin(mean, y)], 1)


SINGLE: Final = [0, 1]
AVERAGED: Final = [2, 3]


def less(a: Float[Tensor, "n 2"], b: Float[Tensor, "n 2"]) -> Bool[Tensor, " n"]:
    """Whether the first rating is the lower one, equal first columns by the second."""
    return (a[:, 0] < b[:, 0]) | ((a[:, 0] == b[:, 0]) & (a[:, 1] < b[:, 1]))


def undecided(rated: Float[Tensor, "n 4"]) -> Bool[Tensor, " n"]:
    """The images that a draw, or the mean probability, still answers correctly."""
    return (rated[:, [0, 2]] > 0).any(1)


def scored(
    network: Stochastic, x_adv: Images, x: Images, y: Labels, seeds: Sequence[int]
) -> dict[str, Any]:
    """Correctness under fresh draws, and norms of the perturbations."""
    right, log_means, votes = [], [], []
    with torch.no_grad():
        for half in np.array_split(np.arange(len(seeds)), 2):
            log_mean = vote = None
            for logits in network.fresh([seeds[place] for place in half], x_adv):
                right.append(correct(logits, y))
                # in double precision, since a sum over many draws decides between close classes
                logs = logits.double().log_softmax(1)
                one = torch.zeros_like(logs).scatter(1, logits.argmax(1, keepdim=True), 1.0)
                # sums: their constant factor changes no prediction
                log_mean = logs if log_mean is None else torch.logaddexp(log_mean, logs)
                vote = one if vote is None else vote + one
            assert log_mean is not None
            assert vote is not None
            log_means.append(log_mean)
            votes.append(vote)
    answers = [votes_as_logits(vote, ALPHA) for vote in (votes[0] + votes[1], *votes)]
    # a vote that abstains, of logits -inf, is not correct
    whole, *halves = (correct(vote, y) & ~vote.isinf().all(1) for vote in answers)
    answer = whole.to(torch.int8)
    answer[answers[0].isinf().all(1)] = -1
    return {
        "correct": torch.stack(right).cpu().numpy(),
        "averaged": correct(torch.logaddexp(*log_means), y).cpu().numpy(),
        "averaged_halves": torch.stack([correct(z, y) for z in log_means]).cpu().numpy(),
        "vote": answer.cpu().numpy(),
        "vote_halves": torch.stack(halves).cpu().numpy(),
        **sizes(x_adv - x),
    }


def clean_drawn(subject: Subject, network: Stochastic, count: int, *, seed: int) -> DrawnCell:
    """Records of the clean images, scored by the same draws as all attacks."""
    parts, size = [], subject.chunk
    for start in range(0, len(subject.x), size):
        x, y = subject.x[start : start + size], subject.y[start : start + size]
        parts.append(scored(network, x, x, y, seeds_of(seed, "score", count, start)))
    return DrawnCell(**merged(parts))
