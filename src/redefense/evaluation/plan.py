"""Resolves a suite into cells with threats, names and attacks, and validates it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redefense.attacks import ATTACKS, Attack
from redefense.checks.answers import check_outputs
from redefense.config import ThreatConfig, construct
from redefense.errors import ConfigError, suggestion
from redefense.evaluation.cells import (
    BUDGET_SLACK,
    Cell,
    Subject,
    as_threat,
    outside_ball,
)
from redefense.evaluation.progress import Progress
from redefense.evaluation.suite import CellSpec, Suite
from redefense.results.accuracy import Floats
from redefense.results.intervals import exact_expectation
from redefense.runtime.files import write_json
from redefense.stochastic.ensemble import Stochastic
from redefense.types import Images, check_images, check_labels

Log = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Settings of an evaluation: subject, suite, storage and logging.

    Attributes:
        threat: of all cells without a threat of their own.
        seed: of all draws.
        seeds: number of runs of each attack, each with other random streams.
        store: folder of intermediate results, if any.
        checks: "quick" or "full".
        log: called with each log line.
        progress: reports the progress.
        keep_images: whether to keep the attacked images of every attack.
    """

    subject: Subject
    suite: Suite
    threat: ThreatConfig
    seed: int
    seeds: int
    store: Path | None
    checks: str
    log: Log
    progress: Progress
    keep_images: bool = False

    def place(self, name: str) -> Path | None:
        """The file or folder of that name in the store."""
        return None if self.store is None else self.store / name

    def save(self, place: Path | None) -> Path | None:
        """The same place on the writing process, None on others."""
        # all processes have the same results, and would write the same file at once
        return place if self.subject.workers.first else None

    def write_cell(self, name: str, cell: Cell) -> bool:
        """Store records as `NAME.npz` on the writing process; whether they were written here."""
        place = self.save(self.place(f"{name}.npz"))
        if place is not None:
            cell.save(place, self.subject.index)
        return place is not None

    def write_json(self, name: str, value: object) -> None:
        """Store JSON on the writing process."""
        if (place := self.save(self.place(name))) is not None:
            write_json(place, value)

    def described(self, it: "Further", expected: float) -> dict[str, Any]:
        """JSON of an attack that counts for the headline but is no cell of the suite."""
        return {
            "id": it.identity,
            "attack": it.attack,
            "label": it.label,
            "repr": it.repr,
            "view": it.view,
            "aware": True,
            "bounded": True,
            # always that of the headline: points of others do not count
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps},
            "met": int(it.cell.met.sum()),
            "accuracy": {"expected": expected},
            "per_image": f"{self.suite.name}/{it.identity}.npz",
        }

    def facts(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """The evaluation's suite, run, provenance (`made`) and data."""
        subject = self.subject
        return {
            "schema": 1,
            "suite": self.suite.name,
            "run": dict(subject.run),
            "provenance": dict(made),
            "batch_size": subject.batch_size,
            "data": subject.facts(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Further:
    """An attack at the headline's threat that is no cell of the suite; its points count, too."""

    identity: str
    attack: str
    repr: str
    view: str
    label: str | None
    cell: Cell


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A cell with resolved threat, name and attack."""

    spec: CellSpec
    threat: ThreatConfig
    identity: str
    attack: Attack

    @property
    def aware(self) -> bool:
        """Whether the attack is aware of the ensemble."""
        return self.attack.adaptive if self.spec.aware is None else self.spec.aware

    def run_name(self, repeat: int) -> str:
        """Name of the records of a run with other random streams; the first has the cell's."""
        return self.identity + (f".seed{repeat}" if repeat else "")

    def stated(self, cell: Cell, clean: Cell, shares: Floats) -> dict[str, Any]:
        """The JSON entry `stated` of an unbounded attack; empty for others.

        Its accuracy is that where larger perturbations are replaced by the clean image. `shares`
        has the probabilities of the rows of `correct`.
        """
        if self.attack.scored_at is None:
            return {}
        norm, limit = self.attack.scored_at
        allowed = getattr(cell, norm) <= limit + BUDGET_SLACK
        q = exact_expectation(np.where(allowed, cell.correct, clean.correct), shares)
        return {"stated": {"norm": norm, "limit": limit, "accuracy": float(q.mean())}}

    def described(
        self, cell: Cell, expected: Sequence[float], suite: str, x: Images
    ) -> dict[str, Any]:
        """The cell's JSON entries common to all models; `expected` has each repeat's accuracy."""
        found: dict[str, Any] = {
            "id": self.identity,
            "attack": self.spec.attack,
            "label": self.spec.label,
            "repr": repr(self.attack),
            "view": self.spec.view,
            "aware": self.aware,
            "bounded": self.attack.bounded,
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps},
            "forwards": cell.forwards,
            "backwards": cell.backwards,
            "seconds": round(cell.seconds, 3),
            "per_image": f"{suite}/{self.identity}.npz",
        }
        if outside := outside_ball(cell, as_threat(self.threat), x):
            found["outside"] = outside
        if len(expected) > 1:
            mean, sd = float(np.mean(expected)), float(np.std(expected, ddof=1))
            found["seeds"] = {"expected": list(expected), "mean": mean, "sd": sd}
        return found


def check_plan(subject: Subject, suite: Suite, threat: ThreatConfig) -> None:
    """Validate a suite and a subject before anything is written.

    Raises:
        ConfigError: for an unknown attack, setting or view.
        InputError: for images, labels or members that do not match.
    """
    check_images(subject.x)
    check_labels(subject.y, len(subject.x))
    plan = plan_of(suite, threat, subject.randomized)
    # these run last: a wrong name or setting is found before hours of work
    baselines = [attack_of(spec) for spec in suite.baseline_attacks]
    attacks = [*(planned.attack for planned in plan), *baselines]
    headline = threat_of(plan) or threat
    for attack, at in [
        *((planned.attack, planned.threat) for planned in plan),
        *((attack, headline) for attack in baselines),
    ]:
        attack.check_threat(as_threat(at))
    drawn = isinstance(subject.ensemble, Stochastic)
    if drawn and suite.precision == "bf16":
        raise ConfigError("stochastic networks are attacked in fp32: remove precision bf16")
    classes = check_outputs(subject.ensemble, subject.x, subject.y, drawn=drawn)
    for attack in attacks:
        if attack.least_classes > classes:
            raise ConfigError(
                f"suite {suite.name}: {attack!r} needs at least {attack.least_classes} classes, "
                f"the model has {classes}; use quick, aware or a suite without this attack"
            )


def plan_of(suite: Suite, threat: ThreatConfig, randomized: bool) -> list[Planned]:
    """The suite's resolved cells, for a randomized or an averaged defence.

    Raises:
        ConfigError: for an unknown attack or setting, an invalid eps, or a view that the attack
            does not support.
    """
    plan: list[Planned] = []
    for listed in suite.cells:
        spec = listed.resolved(randomized)
        cell_threat = spec.threat or threat
        # a suite may be made in Python, past the checks of files
        cell_threat.check()
        attack = attack_of(spec)
        # adaptive attacks query single members, which only this view has
        if attack.adaptive != (spec.view == "members"):
            raise ConfigError(
                f"suite {suite.name}: {spec.attack} "
                + ("needs" if attack.adaptive else "cannot be given")
                + ' the view "members"'
            )
        identity = spec.identity(cell_threat)
        # the same attack with other settings needs records of its own
        if any(identity == other.identity for other in plan):
            identity = f"{identity}-{len(plan)}"
        plan.append(Planned(spec=spec, threat=cell_threat, identity=identity, attack=attack))
    return plan


def threat_of(plan: Sequence[Planned]) -> ThreatConfig | None:
    """The threat of the headline: that of all bounded aware cells, None if they differ."""
    # a worst case over several budgets would be that of none of them
    threats = {
        (p.threat.norm, p.threat.eps): p.threat for p in plan if p.attack.bounded and p.aware
    }
    return next(iter(threats.values())) if len(threats) == 1 else None


def attack_of(spec: CellSpec) -> Attack:
    """The attack of a cell, with its settings."""
    if spec.made is not None:
        made: Attack = spec.made
        return made
    if spec.attack not in ATTACKS:
        raise ConfigError(
            f"unknown attack {spec.attack!r}{suggestion(spec.attack, list(ATTACKS))}; "
            f"there are {', '.join(ATTACKS)}"
        )
    return construct(ATTACKS[spec.attack], spec.settings, spec.attack)
