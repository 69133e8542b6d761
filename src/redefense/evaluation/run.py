"""Runs a suite on an ensemble, cell by cell, and stores the records of every member."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from redefense.checks.answers import Answers
from redefense.checks.check import Check
from redefense.checks.results import after_run
from redefense.checks.victim import before_run
from redefense.config import ThreatConfig
from redefense.errors import ConfigError
from redefense.evaluation.baselines import NOTHING, attack_baselines, baselines, pieces
from redefense.evaluation.budget_check import stronger_budget
from redefense.evaluation.cascade.examples import known_examples, name_images
from redefense.evaluation.cascade.runner import Runner, planned_passes, run_order
from redefense.evaluation.cascade.tried import record_of
from redefense.evaluation.cells import Cell, Subject, as_threat, clean_cell
from redefense.evaluation.full_checks import full_checks
from redefense.evaluation.headline import headline, interval
from redefense.evaluation.inputs.objects import plugins_of
from redefense.evaluation.inputs.precision import attack_copy
from redefense.evaluation.member_statistics import (
    MEASURED,
    MEASURES,
    ROUGH_PASSES,
    joint_measures,
    member_measures,
)
from redefense.evaluation.plan import Further, Job, Log, Planned, check_plan, plan_of, threat_of
from redefense.evaluation.progress import SILENT, Progress
from redefense.evaluation.provenance import provenance
from redefense.evaluation.report_object import Report
from redefense.evaluation.store import read_object
from redefense.evaluation.suite import Suite
from redefense.results.accuracy import Floats, accuracies, pair_statistics
from redefense.results.intervals import exact_expectation
from redefense.rng import protocol_draws
from redefense.types import Images


def run_suite(
    subject: Subject,
    suite: Suite,
    threat: ThreatConfig,
    *,
    seed: int = 0,
    seeds: int = 1,
    store: Path | None = None,
    checks: str = "quick",
    log: Log = lambda _: None,
    progress: Progress = SILENT,
    keep_images: bool = False,
) -> Report:
    """Run or resume a suite.

    Args:
        subject: the ensemble in evaluation mode and its images.
        suite: the attacks to run.
        threat: of all cells without a threat of their own.
        seed: of all draws.
        seeds: number of runs of each attack, each with other random streams; the figures of the
            cell are those of the first run.
        store: folder in which finished cells and chunks of images are saved, to resume from.
        checks: "quick", or "full" for the S-checks that run further attacks.
        log: called with each log line.
        progress: reports the progress.
        keep_images: keep the attacked images of every attack in the report and in the store.

    Raises:
        InputError: for images or labels that break the contract.
        ConfigError: for an unknown attack or setting.
    """
    ensemble, x, y = subject.ensemble, subject.x, subject.y
    check_plan(subject, suite, threat)
    # now: the commit and the files may change during the work
    made = provenance(seed, x.device) | plugins_of(suite, subject.data_name)
    copy = attack_copy(suite.precision, subject.passes or ensemble, x)
    subject = replace(subject, copy=copy, half=copy is not None and suite.precision == "bf16")
    # attacked points and measurements of one process are read from its files by the others
    if subject.workers.count > 1 and store is None:
        raise ConfigError(
            "an evaluation on several processes must save its results: use redefense evaluate"
        )
    mixture = ensemble.probabilities()
    plan = plan_of(suite, threat, subject.randomized)
    # the baselines and the measures are compared with the headline: at its threat
    job = Job(
        subject=subject, suite=suite, threat=threat_of(plan) or threat, seed=seed, seeds=seeds,
        store=store, checks=checks, log=log, progress=progress, keep_images=keep_images,
    )  # fmt: skip
    # queried again at the end: an attack must not have changed the ensemble
    answers = Answers.to(ensemble, x)
    before = [answers.elsewhere(), *before_run(ensemble, x, y)]
    progress.plan(_pieces(job, plan))
    clean = clean_cell(ensemble, x, y)
    job.write_cell("clean", clean)
    runner = Runner(job, plan, mixture, clean)
    records, repeats = runner.cells(plan)
    records["clean"] = clean
    # after the cells: images on which their points fool a baseline already are not attacked again
    attack_baselines(runner)
    measured = _measured(job, runner) if suite.measures else {}
    full = _full_checks(job, runner, plan, records) if checks == "full" else []
    others = {it.identity: it.cell for it in runner.others}
    examples = known_examples(job, plan, runner.attacked, records, others, mixture)
    # not before: the stronger attacks of the checks start from them
    runner.forget_points()
    baseline, worst = baselines(runner), runner.worst
    data = _facts(job, made, clean, mixture) | {
        "cells": [
            _cell_json(planned, records, repeats[planned.identity], mixture, suite, seed, x)
            for planned in plan
        ],
        "further_cells": [_further_json(it, job, mixture) for it in runner.others],
        "headline": headline(plan, records, worst)
        | (NOTHING if baseline is None else baseline.figures()),
    }
    if worst is not None:
        data |= joint_measures(worst.correct, mixture, np.stack(worst.corrects))
        if measured:
            attacked = {"attacked": pair_statistics(worst.correct)}
            data |= measured | {"diversity": measured["diversity"] | attacked}
    records |= others
    name_images(data, runner.attacked, examples)
    after = after_run(
        data, records, mixture,
        worst=None if worst is None else worst.q,
        single=None if baseline is None else baseline.single,
        log=subject.drift,
    )  # fmt: skip
    done = [*before, answers.later(), *after, *full]
    data["checks"] = [check.as_dict() for check in sorted(done, key=lambda check: check.id)]
    return Report(
        data, records, subject.index, baseline,
        images=runner.attacked.images if keep_images else {}, examples=examples,
    )  # fmt: skip


def _facts(job: Job, made: Mapping[str, Any], clean: Cell, mixture: Floats) -> dict[str, Any]:
    """The evaluation's JSON entries known before the first attack."""
    subject, suite = job.subject, job.suite
    return {
        **job.facts(made),
        "mixture": mixture.tolist(),
        "randomized": subject.randomized,
        "attack_precision": "bf16" if subject.half else "fp32",
        "attacked_copy": subject.copy is not None,
        "clean": {
            "expected": float(exact_expectation(clean.correct, mixture).mean()),
            "averaged": float(clean.averaged.mean()),
            "per_member": clean.correct.mean(1).tolist(),
            "interval": interval(exact_expectation(clean.correct, mixture)),
            "per_image": f"{suite.name}/clean.npz",
        },
    }


def _pieces(job: Job, plan: Sequence[Planned]) -> list[tuple[str, float]]:
    """Labels and estimated passes of the planned work, for the progress."""
    members = job.subject.ensemble.num_members
    found = [*planned_passes(job, run_order(plan), lambda attack: members), *pieces(job)]
    if job.suite.measures:
        images = min(len(job.subject.x), MEASURED)
        found.append((MEASURES, float(ROUGH_PASSES * members * images)))
    return found


def _cell_json(
    planned: Planned,
    records: Mapping[str, Cell],
    repeats: Sequence[Cell],
    mixture: Floats,
    suite: Suite,
    seed: int,
    x: Images,
) -> dict[str, Any]:
    identity, cell = planned.identity, records[planned.identity]
    # the others have distance 0, which is no figure of this attack
    moved = cell.linf[cell.met] > 0
    drawn = protocol_draws(mixture, len(cell.met), seed, identity)
    every = [float(exact_expectation(c.correct, mixture).mean()) for c in (cell, *repeats)]
    return {
        **planned.described(cell, every, suite.name, x),
        **planned.stated(cell, records["clean"], mixture),
        "distortion": {k: _median(getattr(cell, k)[cell.met]) for k in ("l0", "l2", "linf")},
        "accuracy": accuracies(cell.correct, cell.averaged, mixture, drawn),
        "interval": interval(exact_expectation(cell.correct, mixture)),
        "met": int(cell.met.sum()),
        "unchanged": float(1 - moved.mean()) if len(moved) else 0.0,
    }


def _median(values: Floats) -> float | None:
    return float(np.median(values)) if len(values) else None


def _further_json(it: Further, job: Job, mixture: Floats) -> dict[str, Any]:
    expected = float(exact_expectation(it.cell.correct, mixture).mean())
    passes = {"forwards": it.cell.forwards, "backwards": it.cell.backwards}
    return job.described(it, expected) | passes


def _measured(job: Job, runner: Runner) -> dict[str, Any]:
    """Statistics of the members, computed once and saved in the store."""
    worst = runner.worst
    if worst is None:
        return {}
    # both or none: figures without their points would leave the headline too high
    found = read_object(job.place("measures.json"), "diversity")
    cell = Cell.read(job.place("measures.npz"))
    if found is None or cell is None:
        found, first = member_measures(
            job.subject, as_threat(job.threat), worst.correct, seed=job.seed, progress=job.progress
        )
        cell = record_of(first, worst)
        job.write_cell("measures", cell)
        job.write_json("measures.json", found)
        job.log(f"{job.suite.name}: measured transfer, diversity and accuracy against eps")
    job.subject.workers.wait()
    runner.count("measures", "for the transfer matrix and accuracy against eps", cell)
    return found


def _full_checks(
    job: Job, runner: Runner, plan: Sequence[Planned], records: Mapping[str, Cell]
) -> list[Check]:
    """The S-checks that run attacks; their points within the threat count for the headline."""
    # first, since it compares with the worst case of the suite alone
    stronger, worst = stronger_budget(runner, plan), runner.worst
    stored = read_object(job.place("checks.json"), "checks")
    cell = Cell.read(job.place("checks.npz"))
    if stored is None or (worst is not None and cell is None):
        found, first = full_checks(job.subject, plan, records, job.seed, counts=worst is not None)
        if worst is not None and first is not None:
            cell = record_of(first, worst)
            job.write_cell("checks", cell)
        stored = {"checks": [check.as_dict() for check in found]}
        job.write_json("checks.json", stored)
    job.subject.workers.wait()
    if cell is not None and worst is not None:
        runner.count("checks", "for the checks of the attacks on the first images", cell)
    return [*(Check(**check) for check in stored["checks"]), stronger]
