"""Resolves a suite into cells with threats, names and attacks, and validates it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redefense.attacks import ATTACKS, Attack
from redefense.checks.answers import check_outputs
from redefense.config import ThreatConfig, construct, suggestion
from redefense.errors import ConfigError
from redefense.evaluation.cells import Cell, Subject, as_threat, image_digest, outside_ball
from redefense.evaluation.progress import Progress
from redefense.evaluation.suite import CellSpec, Suite
from redefense.stochastic.ensemble import Stochastic
from redefense.types import Images

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be evaluated and how, and where it is kept and told.

    Attributes:
        threat: of all cells that do not fix one.
        seed: of all draws.
        seeds: how often each attack is run, each time from other streams.
        store: folder of all that is saved on the way, if any.
        checks: "quick" or "full".
        say: takes lines.
        progress: is told how far it is.
        keep_images: whether the attacked images of every attack are kept.
    """

    subject: Subject
    suite: Suite
    threat: ThreatConfig
    seed: int
    seeds: int
    store: Path | None
    checks: str
    say: Say
    progress: Progress
    keep_images: bool = False

    def place(self, name: str) -> Path | None:
        """Where something of that name is saved."""
        return None if self.store is None else self.store / name

    def save(self, place: Path | None) -> Path | None:
        """The same place for the one process that writes, None for others."""
        return place if self.subject.workers.first else None

    def facts(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """What an evaluation is of: the suite, the run, `made` (its provenance) and the data."""
        subject = self.subject
        return {
            "schema": 1,
            "suite": self.suite.name,
            "run": dict(subject.run),
            "provenance": dict(made),
            "data": {
                "name": subject.data_name,
                "split": subject.split,
                "num_images": len(subject.x),
                "sha256": image_digest(subject.x, subject.y),
            },
        }


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

    def described(
        self, cell: Cell, expected: Sequence[float], suite: str, x: Images
    ) -> dict[str, Any]:
        """What is stored of a cell whoever is attacked; `expected` has each repeat's accuracy."""
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
    """Refuse a suite or a subject that cannot be run, before anything is written.

    Raises:
        ConfigError: for an unknown attack, setting or view.
        InputError: for images, labels or members that do not fit together.
    """
    attacks = [planned.attack for planned in plan_of(suite, threat, subject.randomized)]
    attacks += [attack_of(spec) for spec in suite.beside]
    drawn = isinstance(subject.ensemble, Stochastic)
    classes = check_outputs(subject.ensemble, subject.x, subject.y, drawn=drawn)
    for attack in attacks:
        if attack.least_classes > classes:
            raise ConfigError(
                f"suite {suite.name}: {attack!r} needs at least {attack.least_classes} classes, "
                f"the model has {classes}; quick, aware or a suite of your own can do with 2"
            )


def plan_of(suite: Suite, threat: ThreatConfig, randomized: bool) -> list[Planned]:
    """The suite's cells, for a defence that answers at random or by its average.

    Raises:
        ConfigError: for an unknown attack or setting, an eps that is no threat, or a view that does
            not go with the attack.
    """
    plan: list[Planned] = []
    for listed in suite.cells:
        spec = listed.answered(randomized)
        cell_threat = spec.threat or threat
        cell_threat.check()
        attack = attack_of(spec)
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


def threat_of(plan: Sequence[Planned]) -> ThreatConfig | None:
    """The one threat of all bounded aware cells, that of the headline; None if not just one."""
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
