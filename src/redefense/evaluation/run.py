"""Runs a suite on an ensemble, cell by cell, and keeps what every member said to every image."""

import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from torch import Tensor, nn

from redefense.attacks import ATTACKS, Attack
from redefense.config import ThreatConfig, construct, suggestion
from redefense.errors import ConfigError
from redefense.evaluation.cells import (
    BUDGET_SLACK,
    Cell,
    Subject,
    as_threat,
    attack_cell,
    check_outputs,
    clean_cell,
    image_digest,
    robust_correctness,
    whole,
)
from redefense.evaluation.checks import after_run
from redefense.evaluation.checks_full import full_checks
from redefense.evaluation.checks_victim import before_run
from redefense.evaluation.measures import joint_measures, member_measures
from redefense.evaluation.metrics import (
    Bools,
    Floats,
    accuracies,
    exact_expectation,
    worst_case,
)
from redefense.evaluation.provenance import provenance
from redefense.evaluation.statistics import accuracy_interval
from redefense.evaluation.suite import CellSpec, Suite
from redefense.types import check_images, check_labels

SELECTION_IMAGES = 200
"""Validation images on which the best single member is chosen."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation: the JSON of schema 1, and the records behind every figure.

    Attributes:
        data: what `DIR/evaluation/SUITE.json` holds.
        cells: per-image records by cell id, "clean" among them.
    """

    data: dict[str, Any]
    cells: Mapping[str, Cell] = field(repr=False)

    @property
    def headline(self) -> dict[str, Any]:
        """The pair unaware and aware, and what stands beside it; fractions, None where unknown."""
        headline: dict[str, Any] = self.data["headline"]
        return headline

    def to_json(self) -> str:
        return json.dumps(self.data, indent=1) + "\n"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(c['label'] or c['id'])}</td>"
            f"<td>{100 * c['accuracy']['expected']:.1f} %</td></tr>"
            for c in self.data["cells"]
        )
        return f"<table>{rows}</table>"


def run_suite(
    subject: Subject,
    suite: Suite,
    threat: ThreatConfig,
    *,
    seed: int = 0,
    seeds: int = 1,
    store: Path | None = None,
    checks: str = "quick",
    say: Say = lambda _: None,
) -> Report:
    """Run (or finish) a suite.

    Args:
        subject: the ensemble in evaluation mode and its images.
        suite: what to run.
        threat: of all cells that do not fix one.
        seed: of all draws.
        seeds: how often each attack is run, each time from other streams; the cell's own figures
            are those of the first run.
        store: folder in which each cell is saved as soon as it is done, and found again.
        checks: "quick", or "full" for the S-checks that need attacks of their own.
        say: takes progress lines.

    Raises:
        InputError: for images or labels that break the contract.
        ConfigError: for an unknown attack or setting.
    """
    ensemble, x, y = subject.ensemble, subject.x, subject.y
    check_images(x)
    check_labels(y, len(x))
    check_outputs(ensemble, x, y)
    if subject.workers.count > 1 and store is None:
        raise ConfigError("several processes need a store in which to meet")
    mixture = ensemble.mixture.detach().double().cpu().numpy()
    plan = _plan(suite, threat, subject.randomized)
    before = before_run(ensemble, x, y)
    records, repeats = _records(subject, plan, mixture, seed, seeds, store, say)
    beside, alone, single = _beside(subject, suite, threat, seed=seed, store=store, say=say)
    cells = [
        _cell_json(planned, records, repeats[planned.identity], mixture, suite, seed)
        for planned in plan
    ]
    clean = records["clean"]
    accuracy = accuracies(clean.correct, clean.averaged, mixture, seed=seed, name="clean")
    found = headline(plan, records, mixture)
    data: dict[str, Any] = {
        "schema": 1,
        "suite": suite.name,
        "run": dict(subject.run),
        "provenance": provenance(seed),
        "data": {
            "name": subject.data_name,
            "split": subject.split,
            "num_images": len(x),
            "sha256": image_digest(x, y),
        },
        "mixture": mixture.tolist(),
        "clean": {
            "expected": accuracy["expected"],
            "averaged": accuracy["averaged"],
            "per_member": clean.correct.mean(1).tolist(),
            "interval": _interval(exact_expectation(clean.correct, mixture)),
            "per_image": f"{suite.name}/clean.npz",
        },
        "cells": cells,
        "headline": {**found.figures, **beside},
    }
    if found.worst is None:
        # half a pair would be read as the whole
        data["headline"] = dict.fromkeys(data["headline"])
    else:
        data |= joint_measures(found.worst, mixture, found.corrects)
        if suite.measures:
            data |= _measured(subject, suite, threat, found.worst, alone, seed, store, say)
    done = [
        *before,
        *after_run(data, records, mixture, worst=found.worst, single=single, log=subject.drift),
        *(full_checks(ensemble, x, y, data, records, seed) if checks == "full" else ()),
    ]
    data["checks"] = [check.as_dict() for check in sorted(done, key=lambda check: check.id)]
    return Report(data, records)


def _records(
    subject: Subject,
    plan: "Sequence[Planned]",
    mixture: Floats,
    seed: int,
    seeds: int,
    store: Path | None,
    say: Say,
) -> tuple[dict[str, Cell], dict[str, list[Cell]]]:
    """Every cell's records, attacked now or found in the store, and its repeats."""
    records, repeats = {"clean": clean_cell(subject)}, {}
    first = subject.workers.first
    if store is not None and first:
        records["clean"].save(store / "clean.npz", subject.index)
    for number, planned in enumerate(plan, 1):
        again: list[Cell] = []
        for repeat in range(seeds):
            name = planned.identity + (f".seed{repeat}" if repeat else "")
            saved = store / f"{name}.npz" if store is not None else None
            if saved is not None and whole(saved):
                again.append(Cell.read(saved))
                continue
            cell = attack_cell(
                subject, planned.attack, planned.threat, planned.spec.view, seed=seed, name=name
            )
            again.append(cell)
            if saved is not None and first:
                cell.save(saved, subject.index)
            expected = float(exact_expectation(cell.correct, mixture).mean())
            say(
                f"{number}/{len(plan)} {planned.spec.label or name}: {100 * expected:.1f} % "
                f"expected accuracy, {cell.seconds:.1f} s"
            )
        records[planned.identity], *repeats[planned.identity] = again
        # nobody looks for the next cell before this one is written
        subject.workers.wait()
    return records, repeats


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A cell with everything resolved."""

    spec: CellSpec
    threat: ThreatConfig
    identity: str
    attack: Attack

    @property
    def aware(self) -> bool:
        """Whether its attacker knows the ensemble."""
        return self.attack.adaptive if self.spec.aware is None else self.spec.aware


def check_plan(subject: Subject, suite: Suite, threat: ThreatConfig) -> None:
    """Refuse a suite or a subject that cannot be run, before anything is written.

    Raises:
        ConfigError: for an unknown attack, setting or view.
        InputError: for images, labels or members that do not fit together.
    """
    _plan(suite, threat, subject.randomized)
    for spec in suite.beside:
        _attack(spec)
    check_outputs(subject.ensemble, subject.x, subject.y)


def _plan(suite: Suite, threat: ThreatConfig, randomized: bool) -> list[Planned]:
    plan: list[Planned] = []
    for listed in suite.cells:
        spec = listed.answered(randomized)
        cell_threat = spec.threat or threat
        attack = _attack(spec)
        if attack.adaptive != (spec.view == "members"):
            raise ConfigError(
                f"suite {suite.name}: {spec.attack} "
                + ("needs" if attack.adaptive else "cannot be given")
                + ' the view "members"'
            )
        identity = spec.identity(cell_threat)
        if any(identity == other.identity for other in plan):
            identity = f"{identity}-{len(plan)}"
        plan.append(Planned(spec=spec, threat=cell_threat, identity=identity, attack=attack))
    return plan


def _attack(spec: CellSpec) -> Attack:
    if spec.attack not in ATTACKS:
        raise ConfigError(
            f"unknown attack {spec.attack!r}{suggestion(spec.attack, list(ATTACKS))}; "
            f"there are {', '.join(ATTACKS)}"
        )
    return construct(ATTACKS[spec.attack], spec.settings, spec.attack)


def _cell_json(
    planned: Planned,
    records: Mapping[str, Cell],
    repeats: Sequence[Cell],
    mixture: Floats,
    suite: Suite,
    seed: int,
) -> dict[str, Any]:
    spec, threat, identity, attack = planned.spec, planned.threat, planned.identity, planned.attack
    cell = records[identity]
    moved = cell.linf > 0
    found: dict[str, Any] = {
        "id": identity,
        "attack": spec.attack,
        "label": spec.label,
        "repr": repr(attack),
        "view": spec.view,
        "aware": planned.aware,
        "bounded": attack.bounded,
        "distortion": {k: float(np.median(getattr(cell, k))) for k in ("l0", "l2", "linf")},
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "accuracy": accuracies(cell.correct, cell.averaged, mixture, seed=seed, name=identity),
        "interval": _interval(exact_expectation(cell.correct, mixture)),
        "unchanged": float(1 - moved.mean()),
        "forwards": cell.forwards,
        "backwards": cell.backwards,
        "seconds": round(cell.seconds, 3),
        "per_image": f"{suite.name}/{identity}.npz",
    }
    if not attack.bounded:
        norm, limit = STATED[spec.attack]
        found["stated"] = {
            "norm": norm,
            "limit": limit,
            "accuracy": within(cell, records["clean"], mixture, norm, limit),
        }
    if repeats:
        every = [float(exact_expectation(c.correct, mixture).mean()) for c in (cell, *repeats)]
        found["seeds"] = {
            "expected": every,
            "mean": float(np.mean(every)),
            "sd": float(np.std(every, ddof=1)),
        }
    return found


STATED: Final[Mapping[str, tuple[str, float]]] = MappingProxyType(
    {
        "cw": ("l2", 0.5),
        "deepfool": ("l2", 0.5),
        "sparsefool": ("l0", 10.0),
        "onepixel": ("l0", 1.0),
        "pixle": ("l0", 10.0),
    }
)
"""The distortion at which an attack that nothing bounds is scored: an L2 length, or pixels."""


def within(cell: Cell, clean: Cell, mixture: Floats, norm: str, limit: float) -> float:
    """Expected accuracy if only changes of at most `limit` count; others leave the image clean."""
    allowed = getattr(cell, norm) <= limit + BUDGET_SLACK
    found = np.where(allowed, cell.correct, clean.correct)
    return float(exact_expectation(found, mixture).mean())


def _interval(q: Floats) -> list[float]:
    estimate = accuracy_interval(q)
    assert estimate.low is not None
    assert estimate.high is not None
    return [estimate.low, estimate.high]


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """The pair, and the records behind it.

    Attributes:
        figures: "unaware", "aware" and "aware_interval"; None where the suite cannot know.
        corrects: (A, M, n) every bounded attack at the headline's threat, the clean images last.
        worst: (M, n) the members on the image of the attack that hurts it most; None without pair.
    """

    figures: dict[str, Any]
    corrects: Bools
    worst: Bools | None


def headline(plan: Sequence[Planned], records: Mapping[str, Cell], mixture: Floats) -> Headline:
    """Unaware and aware at one threat, that of the aware cells."""
    threats = {(p.threat.norm, p.threat.eps) for p in plan if p.attack.bounded and p.aware}
    bounded = [p for p in plan if p.attack.bounded and (p.threat.norm, p.threat.eps) in threats]
    figures: dict[str, Any] = dict.fromkeys(("unaware", "aware", "aware_interval"))
    corrects = np.stack(
        [records[name].correct for name in (*(p.identity for p in bounded), "clean")]
    )
    if len(threats) != 1:
        return Headline(figures=figures, corrects=corrects, worst=None)
    q = np.stack([exact_expectation(c, mixture) for c in corrects])
    unaware = [float(q[i].mean()) for i, p in enumerate(bounded) if not p.aware]
    lowest = worst_case(list(q))
    figures |= {
        "unaware": min(unaware) if unaware else None,
        "aware": float(lowest.mean()),
        "aware_interval": _interval(lowest),
    }
    images = np.arange(q.shape[1])
    return Headline(figures=figures, corrects=corrects, worst=corrects[q.argmin(0), :, images].T)


def _measured(
    subject: Subject,
    suite: Suite,
    threat: ThreatConfig,
    worst: Bools,
    alone: Bools | None,
    seed: int,
    store: Path | None,
    say: Say,
) -> dict[str, Any]:
    """What is known of the members beyond the attacks, computed once and kept in the store."""
    saved = store / "measures.json" if store is not None else None
    if saved is not None and saved.is_file():
        stored: dict[str, Any] = json.loads(saved.read_text())
        return stored
    found = member_measures(subject, as_threat(threat), worst, alone, seed=seed)
    subject.workers.wait()
    if saved is not None and subject.workers.first:
        aside = saved.with_name(f".{saved.name}.{os.getpid()}")
        aside.write_text(json.dumps(found, indent=1) + "\n")
        aside.rename(saved)
    say(f"{suite.name}: measured transfer, diversity and accuracy against eps")
    subject.workers.wait()
    return found


def _beside(
    subject: Subject,
    suite: Suite,
    threat: ThreatConfig,
    *,
    seed: int,
    store: Path | None,
    say: Say,
) -> tuple[dict[str, Any], Bools | None, Bools | None]:
    """The best single member and the averaged ensemble under the suite's aware budget.

    Returns:
        What the headline says of them, and (M, n) every member alone under that budget on the
        evaluated images, where it is known; (n,) the best of them.
    """
    keys = ("best_single_member", "averaged")
    nothing = {f"{k}{s}": None for k in keys for s in ("", "_interval")}
    if not suite.beside:
        return nothing, None, None
    members: Bools | None = None
    attacks = [_attack(spec) for spec in suite.beside]
    saved = store / "beside.npz" if store is not None else None
    if saved is not None and whole(saved):
        with np.load(saved, allow_pickle=False) as stored:
            single, averaged = stored["single"], stored["averaged"]
            best, chosen_on = int(stored["best"]), str(stored["chosen_on"])
            members = stored["members"] if "members" in stored.files else None
    else:
        ensemble, on = subject.ensemble, subject.validation

        def robust(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Bools:
            return robust_correctness(
                model, x, y, attacks, as_threat(threat), seed=seed, name=name,
                workers=subject.workers,
            )  # fmt: skip

        def all_robust(x: Tensor, y: Tensor, name: str) -> Bools:
            each = range(ensemble.num_members)
            return np.stack([robust(ensemble.member(m), x, y, f"{name}-{m}") for m in each])

        averaged = robust(ensemble.averaged(), subject.x, subject.y, "averaged")
        if on is None or suite.measures:
            members = all_robust(subject.x, subject.y, "single")
        if on is not None:
            chosen = all_robust(on[0][:SELECTION_IMAGES], on[1][:SELECTION_IMAGES], "choose")
        else:
            assert members is not None
            chosen = members
        chosen_on = "evaluated images" if on is None else "validation"
        best = int(np.argmax(chosen.mean(1)))
        single = (
            members[best]
            if members is not None
            else robust(ensemble.member(best), subject.x, subject.y, f"single-{best}")
        )
        if saved is not None and subject.workers.first:
            aside = saved.with_name(f".{saved.name}.{os.getpid()}")
            known: dict[str, Any] = {} if members is None else {"members": members}
            with aside.open("wb") as file:
                np.savez_compressed(
                    file, single=single, averaged=averaged, best=best, chosen_on=chosen_on, **known
                )
            aside.rename(saved)
        say(
            f"best single member {100 * single.mean():.1f} %, "
            f"averaged ensemble {100 * averaged.mean():.1f} % under the aware budget"
        )
        subject.workers.wait()
    return (
        {
            "best_single_member": float(single.mean()),
            "best_single_member_interval": _interval(single.astype(np.float64)),
            "best_single_member_index": best,
            "chosen_on": chosen_on,
            "averaged": float(averaged.mean()),
            "averaged_interval": _interval(averaged.astype(np.float64)),
        },
        members,
        single,
    )
