"""Runs the S-checks that need further attacks, distributed over processes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from redefense.checks.attacks import JOBS
from redefense.checks.check import Check
from redefense.checks.comparisons import BLACK_BOX
from redefense.checks.sample import SAMPLE, Sample
from redefense.config import ThreatConfig
from redefense.evaluation.cascade.tried import Tried
from redefense.evaluation.cells import Cell, Subject, as_threat
from redefense.evaluation.plan import Planned
from redefense.results.accuracy import worst_case
from redefense.results.intervals import exact_expectation


def full_checks(
    subject: Subject,
    plan: Sequence[Planned],
    records: Mapping[str, Cell],
    seed: int,
    *,
    counts: bool,
) -> tuple[list[Check], Cell | None]:
    """Run all full checks at the threat of the suite's first bounded cell, aware cells first.

    They are distributed over the subject's processes; every process returns all results.

    Args:
        subject: the ensemble and its images.
        plan: the cells.
        records: of every cell.
        seed: of all draws.
        counts: whether that threat is the headline's.

    Returns:
        The checks, and the record of their points within the headline's threat on the first images.
    """
    ensemble, x, y = subject.ensemble, subject.x[:SAMPLE], subject.y[:SAMPLE]
    # the aware cells have the threat of the headline
    cells = sorted((p for p in plan if p.attack.bounded), key=lambda p: not p.aware)
    given = cells[0].threat if cells else ThreatConfig(eps=8 / 255)
    mixture = ensemble.probabilities()
    white = [
        exact_expectation(records[p.identity].correct[:, :SAMPLE], mixture)
        for p in cells
        # S17 asks whether black-box attacks find what these did not
        if p.threat == given and p.spec.attack not in BLACK_BOX
    ]
    threat = as_threat(given)
    tried = Tried(ensemble, x, y, threat) if counts else None
    sample = Sample(
        ensemble=ensemble,
        x=x,
        y=y,
        threat=threat,
        seed=seed,
        found=torch.from_numpy(worst_case(white)).to(x.device) if white else None,
    )
    workers = subject.workers
    results = []
    for job in workers.share(JOBS):
        apart = None if tried is None else tried.fork()
        results.append(
            (
                job(replace(sample, keep=None if apart is None else apart.offer_rounds)),
                None if apart is None else apart.cell,
            )
        )
    # summed in a fixed order, so that the result does not depend on the number of processes
    done = workers.gather(results)
    for _, cell in done:
        if tried is not None and cell is not None:
            tried.add(cell)
    found = [check for checks, _ in done for check in checks]
    return found, None if tried is None else tried.cell
