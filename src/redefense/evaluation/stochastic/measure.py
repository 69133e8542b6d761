"""Runs a suite on a stochastic network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np

from redefense.attacks.adaptive import Hinge
from redefense.attacks.gradient import PGD
from redefense.attacks.square import Square
from redefense.checks.check import Check
from redefense.config import ThreatConfig
from redefense.evaluation.cascade.examples import known_examples, name_images
from redefense.evaluation.cascade.runner import Runner, planned_passes, run_order
from redefense.evaluation.cells import Cell, Subject
from redefense.evaluation.inputs.objects import plugins_of
from redefense.evaluation.plan import Further, Job, Log, Planned, check_plan, plan_of, threat_of
from redefense.evaluation.progress import SILENT, Progress
from redefense.evaluation.provenance import provenance
from redefense.evaluation.report_object import Report
from redefense.evaluation.stochastic import checks as drawn_checks
from redefense.evaluation.stochastic.averages import NOTHING, average_and_vote
from redefense.evaluation.stochastic.cells import DrawnCell, Draws, attack_drawn, clean_drawn
from redefense.evaluation.stochastic.recognise import check_draws
from redefense.evaluation.store import read_object
from redefense.evaluation.suite import Suite
from redefense.models.randomized import GaussianNoise
from redefense.results.accuracy import Bools
from redefense.results.draws import FIGURES, draws_interval, interval, pair
from redefense.results.headline import TRIES
from redefense.rng import PROTOCOL_DRAWS
from redefense.stochastic.certificates import Certificate, certificate
from redefense.stochastic.ensemble import BLOCK, Stochastic
from redefense.types import Images

LEAST_DRAWS: Final = 32
MOST_DRAWS: Final = 512
PILOT_DRAWS: Final = 16
HALF_WIDTH: Final = 0.005
"""Targeted half width of the interval over the draws, subject to `MOST_DRAWS`."""


def run_drawn(
    subject: Subject,
    suite: Suite,
    threat: ThreatConfig,
    *,
    seed: int = 0,
    seeds: int = 1,
    store: Any = None,
    checks: str = "quick",
    log: Log = lambda _: None,
    progress: Progress = SILENT,
    keep_images: bool = False,
    draws: Draws | None = None,
) -> Report:
    """Run or resume a suite on a `Stochastic`; arguments, files and errors as in `run_suite`.

    `draws` has the numbers of seeds by purpose; by default a pilot run determines them.
    """
    network, x = subject.ensemble, subject.x
    assert isinstance(network, Stochastic)
    check_plan(subject, suite, threat)
    made = provenance(seed, x.device) | plugins_of(suite, subject.data_name)
    # before any attack: it decides how draws are computed
    check_draws(network, x)
    # the network answers by a draw: the view "protocol" is the sampled one
    plan = [_for_draws(planned) for planned in plan_of(suite, threat, True)]
    job = Job(
        subject=subject, suite=suite, threat=threat_of(plan) or threat, seed=seed, seeds=seeds,
        store=store, checks=checks, log=log, progress=progress, keep_images=keep_images,
    )  # fmt: skip
    before = drawn_checks.before(network, subject)
    rough = Draws(score=LEAST_DRAWS, attack=network.num_members)
    # the number of scoring draws is not known before the pilot run
    progress.plan(planned_passes(job, run_order(plan), rough.of))
    draws = draws or _pilot(job, network)
    log(f"{suite.name}: every attack is scored by {draws.score} fresh draws")
    clean = clean_drawn(subject, network, draws.score, seed=seed)
    job.write_cell("clean", clean)
    runner = Runner(
        job, plan, np.full(draws.score, 1 / draws.score), clean,
        lambda task, kept: attack_drawn(
            subject, network, task.attack, task.threat, task.view, draws,
            seed=seed, name=task.name, kept=kept, progress=progress, keep=task.keep,
        ),
    )  # fmt: skip
    found = cast("tuple[dict[str, DrawnCell], dict[str, list[DrawnCell]]]", runner.cells(plan))
    records, repeats = {"clean": clean, **found[0]}, found[1]
    examples = known_examples(job, plan, runner.attacked, records, {}, None)
    runner.forget_points()
    corrects, doubled = _everything(job, plan, records, repeats, network, draws)
    done = [*before, *doubled]
    data = _facts(job, network, made, records["clean"]) | {
        "cells": [_cell_json(p, records, repeats[p.identity], suite, x, seed) for p in plan],
        "further_cells": _further(job, plan, records, repeats, corrects),
        "headline": _headline(job, plan, records, repeats, corrects, network, draws),
    }
    if proven := _certified(job, network, records["clean"]):
        data["certificate"] = proven.as_dict()
        done.append(drawn_checks.below_attack(proven, data["headline"]))
    done += drawn_checks.after(data, records, full=checks == "full")
    data["checks"] = [check.as_dict() for check in sorted(done, key=lambda check: check.id)]
    name_images(data, runner.attacked, examples)
    return Report(
        data, records, subject.index, images=runner.attacked.images if keep_images else {},
        examples=examples,
    )  # fmt: skip


def _for_draws(planned: Planned) -> Planned:
    """Adapt a black-box attack that queries single draws to noisy answers."""
    attack = planned.attack
    # else a lucky draw would be kept as the best answer for the rest of the search
    if isinstance(attack, Square) and attack.preset is None and planned.spec.view == "sampled":
        return replace(planned, attack=replace(attack, reevaluate=True))
    return planned


def _everything(
    job: Job,
    plan: Sequence[Planned],
    records: Mapping[str, DrawnCell],
    repeats: Mapping[str, Sequence[DrawnCell]],
    network: Stochastic,
    draws: Draws,
) -> tuple[dict[str, Bools], list[Check]]:
    """(S, n) of all attacks at the headline's threat, and of the attack with twice the seeds."""
    threat = threat_of(plan)
    if threat is None:
        return {}, []
    corrects: dict[str, Bools] = {}
    for planned in plan:
        if planned.attack.bounded and planned.threat == threat:
            each = enumerate((records[planned.identity], *repeats[planned.identity]))
            corrects |= {planned.run_name(i): cell.correct for i, cell in each}
    corrects["clean"] = records["clean"].correct
    check, found = drawn_checks.doubled_seeds(
        job.subject, network, threat, draws, corrects, seed=job.seed
    )
    return corrects | {DOUBLED: found}, [check]


DOUBLED: Final = "doubled-seeds"
"""Name of the record of the attacks with twice the seeds."""


def _further(
    job: Job,
    plan: Sequence[Planned],
    records: dict[str, DrawnCell],
    repeats: Mapping[str, Sequence[DrawnCell]],
    corrects: Mapping[str, Bools],
) -> list[dict[str, Any]]:
    """Attacks that count for the headline but are no cells of the suite; added to the records."""
    if not corrects:
        return []
    found = {
        planned.run_name(repeat): cell
        for planned in plan
        if planned.identity in corrects
        for repeat, cell in enumerate(repeats[planned.identity], 1)
    }
    # its points were not kept: the other fields are those of the clean images
    found[DOUBLED] = replace(records["clean"], correct=corrects[DOUBLED])
    records |= found
    job.write_cell(DOUBLED, found[DOUBLED])
    return [
        job.described(
            Further(
                identity=name, attack=name, view="members", label=None, cell=cell,
                repr="attacks with twice the seeds" if name == DOUBLED else name,
            ),
            float(cell.correct.mean()),
        )
        for name, cell in sorted(found.items())
    ]  # fmt: skip


def _pilot(job: Job, network: Stochastic) -> Draws:
    """The number of scoring draws, from the variance of a few pilot draws.

    It is fixed before the first scoring draw and equal for all cells, since optional stopping would
    bias the figures. Pilot draws are not used for scoring.
    """
    found = read_object(job.place("pilot.json"), "spread")
    if found is None:
        # an unaware and an aware attack, whose accuracies vary differently over the draws
        tried = ((PGD(steps=5, keep_best=False), "sampled"), (Hinge(steps=5), "members"))
        few = Draws(score=PILOT_DRAWS, attack=min(4, network.num_members))
        cells = [
            attack_drawn(
                job.subject, network, attack, job.threat, view, few, seed=job.seed,
                name=f"pilot {view}", purpose="pilot",
            )
            for attack, view in tried
        ]  # fmt: skip
        # of the noisier attack, so that both have enough draws
        spread = max(float(cell.correct.mean(1).std(ddof=1)) for cell in cells)
        found = {"spread": spread, "draws": PILOT_DRAWS}
        job.write_json("pilot.json", found)
        job.subject.workers.wait()
    # the two halves are treated as fully dependent
    wanted = (1.96 * 2**0.5 * float(found["spread"]) / HALF_WIDTH) ** 2
    # even, since one half of the draws selects for the other
    score = int(min(max(2 * np.ceil(wanted / 2), LEAST_DRAWS), MOST_DRAWS))
    return Draws(score=score, attack=network.num_members)


SINGLE: Final = ("best_single_member", "best_single_member_interval")
"""Entries of the headline that need members."""


def _headline(
    job: Job,
    plan: Sequence[Planned],
    records: Mapping[str, DrawnCell],
    repeats: Mapping[str, Sequence[DrawnCell]],
    corrects: Mapping[str, Bools],
    network: Stochastic,
    draws: Draws,
) -> dict[str, Any]:
    """The estimated figures of the headline; None where the suite does not measure them."""
    facts = {"exact": False, "draws": draws.score, "attack_draws": draws.attack}
    if not corrects:
        return dict.fromkeys((*FIGURES, *SINGLE)) | NOTHING | facts
    unaware = [p.identity for p in plan if not p.aware and p.identity in corrects]
    cells = [
        cell for p in plan if p.identity in corrects
        for cell in (records[p.identity], *repeats[p.identity])
    ]  # fmt: skip
    averages = average_and_vote(job, plan, network, draws, [*cells, records["clean"]])
    return dict.fromkeys(SINGLE) | pair(corrects, unaware, TRIES, job.seed) | averages | facts


def _certified(job: Job, network: Stochastic, clean: DrawnCell) -> Certificate | None:
    """The certificate of Gaussian noise at the headline's threat; None for other defences."""
    # Gaussian noise certifies L2 radii only (Cohen et al., 2019)
    noise = network.model
    if not isinstance(noise, GaussianNoise) or noise.sigma <= 0 or job.threat.norm != "2":
        return None
    right = clean.correct.sum(0)
    return certificate(right, len(clean.correct), sigma=noise.sigma, radius=job.threat.eps)


def _facts(
    job: Job, network: Stochastic, made: Mapping[str, Any], clean: DrawnCell
) -> dict[str, Any]:
    suite = job.suite
    return {
        **job.facts(made),
        "mixture": None,
        "randomized": True,
        "stochastic": True,
        # whether one call computes several draws, as copies of each image
        "draws_per_call": {"draws": BLOCK, "rows": network.rows} if network.rows else None,
        "clean": {
            **_shares(clean),
            "per_member": [],
            "interval": interval(clean.correct),
            "interval_draws": draws_interval(clean.correct),
            "per_image": f"{suite.name}/clean.npz",
        },
    }


def _shares(cell: DrawnCell) -> dict[str, float]:
    return {
        "expected": float(cell.correct.mean()),
        "averaged": float(cell.averaged.mean()),
        "vote": float((cell.vote == 1).mean()),
        "vote_abstained": float((cell.vote == -1).mean()),
    }


def _cell_json(
    planned: Planned,
    records: Mapping[str, DrawnCell],
    repeats: Sequence[Cell],
    suite: Suite,
    x: Images,
    seed: int,
) -> dict[str, Any]:
    cell = records[planned.identity]
    each = cell.correct[:PROTOCOL_DRAWS].mean(1)
    shares = np.full(len(cell.correct), 1 / len(cell.correct))
    every = [float(c.correct.mean()) for c in (cell, *repeats)]
    return {
        **planned.described(cell, every, suite.name, x),
        **planned.stated(cell, records["clean"], shares),
        "distortion": {k: float(np.median(getattr(cell, k))) for k in ("l0", "l2", "linf")},
        "accuracy": {
            # the attack once, then as many fresh draws
            "protocol": float(each.mean()),
            "protocol_sd": float(each.std(ddof=1)),
            **_shares(cell),
            **dict.fromkeys(("worst_member", "best_member", "any", "all")),
        },
        "interval": interval(cell.correct, seed=seed),
        "interval_draws": draws_interval(cell.correct),
        "unchanged": float((cell.linf <= 0).mean()),
    }
