"""Runs a suite on an ensemble, cell by cell, and keeps what every member said to every image."""

import html
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import redefense
from redefense.attacks import ATTACKS, Attack
from redefense.config import ThreatConfig, construct, suggestion
from redefense.ensembles import as_ensemble, evaluating, mean_log_probs
from redefense.errors import ConfigError, InputError
from redefense.evaluation.checks import after_run, before_run
from redefense.evaluation.metering import Meter, Metered
from redefense.evaluation.metrics import (
    Bools,
    Floats,
    accuracies,
    exact_expectation,
    worst_case,
)
from redefense.evaluation.statistics import accuracy_interval
from redefense.evaluation.suite import CellSpec, Suite
from redefense.rng import stream
from redefense.threat import Threat, norms
from redefense.types import Ensemble, Images, Labels, Victim, check_images, check_labels

CHUNK = 100
"""Images attacked at a time. Streams are named by chunk, so it is part of every result."""

BUDGET_SLACK = 1e-6
SELECTION_IMAGES = 200
"""Validation images on which the best single member is chosen."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one attack did to every image.

    Attributes:
        correct: (M, n) whether each member is right on the perturbed image.
        averaged: (n,) whether the averaged ensemble is.
        linf: (n,) largest change of a channel; `l2` its length; `l0` pixels changed.
        forwards: passes of one image through one member, per image; `backwards` likewise.
        seconds: wall-clock time of the attack alone.
    """

    correct: Bools
    averaged: Bools
    linf: Floats
    l2: Floats
    l0: Floats
    forwards: float = 0.0
    backwards: float = 0.0
    seconds: float = 0.0

    def save(self, path: Path, index: NDArray[np.int64]) -> None:
        """Write the records aside and rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with aside.open("wb") as file:
            np.savez_compressed(file, index=index, **asdict(self))
        aside.rename(path)

    @classmethod
    def read(cls, path: Path) -> "Cell":
        with np.load(path, allow_pickle=False) as stored:
            fields = {key: stored[key] for key in stored.files if key != "index"}
        values: dict[str, Any] = {k: v if v.ndim else float(v) for k, v in fields.items()}
        return cls(**values)


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


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom and on what: the ensemble, its test images, and where they stand in the data set.

    Attributes:
        validation: images and labels on which the best single member may be chosen; without them it
            is chosen on the evaluated images, which flatters the single member, not the ensemble.
    """

    ensemble: Ensemble
    x: Images
    y: Labels
    index: NDArray[np.int64]
    data_name: str
    split: str = "test"
    run: Mapping[str, Any] = field(default_factory=dict)
    validation: tuple[Tensor, Tensor] | None = None


def run_suite(
    subject: Subject,
    suite: Suite,
    threat: ThreatConfig,
    *,
    seed: int = 0,
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
    mixture = ensemble.mixture.detach().double().cpu().numpy()
    plan = _plan(suite, threat)
    before = before_run(ensemble, x, y)
    records: dict[str, Cell] = {"clean": _clean(subject)}
    if store is not None:
        records["clean"].save(store / "clean.npz", subject.index)
    for number, (spec, cell_threat, identity, attack) in enumerate(plan, 1):
        saved = store / f"{identity}.npz" if store is not None else None
        if saved is not None and saved.is_file():
            records[identity] = Cell.read(saved)
            continue
        records[identity] = attack_cell(
            subject, attack, cell_threat, spec.view, seed=seed, name=identity
        )
        if saved is not None:
            records[identity].save(saved, subject.index)
        expected = float(exact_expectation(records[identity].correct, mixture).mean())
        say(
            f"{number}/{len(plan)} {spec.label or identity}: {100 * expected:.1f} % expected "
            f"accuracy, {records[identity].seconds:.1f} s"
        )
    beside = _beside(subject, suite, threat, seed=seed, store=store, say=say)
    cells = [
        _cell_json(spec, cell_threat, identity, attack, records[identity], mixture, suite, seed)
        for spec, cell_threat, identity, attack in plan
    ]
    clean = records["clean"]
    data: dict[str, Any] = {
        "schema": 1,
        "suite": suite.name,
        "run": dict(subject.run),
        "provenance": provenance(seed),
        "data": {"name": subject.data_name, "split": subject.split, "num_images": len(x)},
        "mixture": mixture.tolist(),
        "clean": {
            **{
                key: value
                for key, value in accuracies(
                    clean.correct, clean.averaged, mixture, seed=seed, name="clean"
                ).items()
                if key in ("expected", "averaged")
            },
            "per_member": clean.correct.mean(1).tolist(),
            "interval": _interval(exact_expectation(clean.correct, mixture)),
            "per_image": f"{suite.name}/clean.npz",
        },
        "cells": cells,
        "headline": {**_headline(plan, records, mixture), **beside},
    }
    if data["headline"]["aware"] is None:
        # half a pair would be read as the whole
        data["headline"] = dict.fromkeys(data["headline"])
    done = [
        *before,
        *after_run(ensemble, x, y, data, records, mixture, full=checks == "full", seed=seed),
    ]
    data["checks"] = [check.as_dict() for check in done]
    return Report(data, records)


Planned = tuple[CellSpec, ThreatConfig, str, Attack]


def _plan(suite: Suite, threat: ThreatConfig) -> list[Planned]:
    plan: list[Planned] = []
    for spec in suite.cells:
        cell_threat = spec.threat or threat
        attack = _attack(spec)
        if attack.adaptive != (spec.view == "members"):
            raise ConfigError(
                f"suite {suite.name}: {spec.attack} "
                + ("needs" if attack.adaptive else "cannot be given")
                + ' the view "members"'
            )
        identity = spec.identity(cell_threat)
        if any(identity == other for _, _, other, _ in plan):
            identity = f"{identity}-{len(plan)}"
        plan.append((spec, cell_threat, identity, attack))
    return plan


def _attack(spec: CellSpec) -> Attack:
    if spec.attack not in ATTACKS:
        raise ConfigError(
            f"unknown attack {spec.attack!r}{suggestion(spec.attack, list(ATTACKS))}; "
            f"there are {', '.join(ATTACKS)}"
        )
    return construct(ATTACKS[spec.attack], spec.settings, spec.attack)


def as_threat(config: ThreatConfig) -> Threat:
    """The threat that a configuration describes."""
    return Threat(norm=math.inf if config.norm == "inf" else 2.0, eps=config.eps)


def attack_cell(
    subject: Subject,
    attack: Attack,
    threat: ThreatConfig,
    view: str,
    *,
    seed: int,
    name: str,
) -> Cell:
    """Attack all images in fixed chunks; verify the ball; ask every member about the result."""
    meter = Meter()
    metered = Metered(subject.ensemble, meter)
    budget = as_threat(threat)
    seconds, found = 0.0, []
    for start in range(0, len(subject.x), CHUNK):
        x, y = subject.x[start : start + CHUNK], subject.y[start : start + CHUNK]
        victim: Victim = metered
        if view == "sampled":
            victim = metered.sampled(rng=stream(seed, "draws", name, start))
        elif view == "averaged":
            victim = metered.averaged()
        begun = time.perf_counter()
        x_adv = attack(victim, x, y, budget, rng=stream(seed, "attack", name, start))
        seconds += time.perf_counter() - begun
        if attack.bounded:
            verify_ball(x_adv, x, budget, name)
        found.append(judge(subject.ensemble, x_adv, x, y))
    count = len(subject.x)
    return Cell(
        **_merge(found),
        forwards=meter.forwards / count,
        backwards=meter.backwards / count,
        seconds=seconds,
    )


def verify_ball(x_adv: Tensor, x: Tensor, threat: Threat, name: str) -> None:
    """Refuse points outside the box or the ball: a breach is an error, not something to clip.

    Raises:
        InputError: naming the attack and the largest distance.
    """
    check_images(x_adv, f"images returned by {name}")
    furthest = float(norms(x_adv.double() - x.double(), threat.norm).max())
    if furthest > threat.eps + BUDGET_SLACK:
        raise InputError(f"{name} left the ball: {furthest:.8f} > eps = {threat.eps}")


def judge(ensemble: Ensemble, x_adv: Tensor, x: Tensor, y: Tensor) -> dict[str, NDArray[Any]]:
    """What every member and the averaged ensemble say to the images, and how far they moved."""
    with torch.no_grad():
        logits = ensemble.member_logits(x_adv)
        averaged = mean_log_probs(logits, ensemble.mixture)
    delta = x_adv - x
    return {
        "correct": (logits.argmax(-1) == y).cpu().numpy(),
        "averaged": (averaged.argmax(-1) == y).cpu().numpy(),
        "linf": norms(delta, math.inf).double().cpu().numpy(),
        "l2": norms(delta, 2.0).double().cpu().numpy(),
        "l0": norms(delta, 0.0).double().cpu().numpy(),
    }


def _clean(subject: Subject) -> Cell:
    parts = []
    for start in range(0, len(subject.x), CHUNK):
        x, y = subject.x[start : start + CHUNK], subject.y[start : start + CHUNK]
        parts.append(judge(subject.ensemble, x, x, y))
    return Cell(**_merge(parts))


def _merge(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Any]:
    return {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}


def _cell_json(
    spec: CellSpec,
    threat: ThreatConfig,
    identity: str,
    attack: Attack,
    cell: Cell,
    mixture: Floats,
    suite: Suite,
    seed: int,
) -> dict[str, Any]:
    moved = cell.linf > 0
    median = {key: float(np.median(getattr(cell, key))) for key in ("l0", "l2", "linf")}
    return {
        "id": identity,
        "attack": spec.attack,
        "label": spec.label,
        "repr": repr(attack),
        "view": spec.view,
        "aware": attack.adaptive,
        "bounded": attack.bounded,
        "distortion": median,
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "accuracy": accuracies(cell.correct, cell.averaged, mixture, seed=seed, name=identity),
        "interval": _interval(exact_expectation(cell.correct, mixture)),
        "unchanged": float(1 - moved.mean()),
        "forwards": cell.forwards,
        "backwards": cell.backwards,
        "seconds": round(cell.seconds, 3),
        "per_image": f"{suite.name}/{identity}.npz",
    }


def _interval(q: Floats) -> list[float]:
    estimate = accuracy_interval(q)
    assert estimate.low is not None
    assert estimate.high is not None
    return [estimate.low, estimate.high]


def _headline(
    plan: Sequence[Planned], records: Mapping[str, Cell], mixture: Floats
) -> dict[str, Any]:
    """Unaware and aware at the suite's one threat; None where the suite cannot know."""
    bounded = [
        (attack.adaptive, threat, exact_expectation(records[identity].correct, mixture))
        for _, threat, identity, attack in plan
        if attack.bounded
    ]
    one_threat = len({(t.norm, t.eps) for _, t, _ in bounded}) == 1
    unaware = [float(q.mean()) for aware, _, q in bounded if not aware]
    result: dict[str, Any] = {
        "unaware": min(unaware) if unaware and one_threat else None,
        "aware": None,
        "aware_interval": None,
    }
    if one_threat and any(aware for aware, _, _ in bounded):
        clean = exact_expectation(records["clean"].correct, mixture)
        worst = worst_case([clean, *(q for _, _, q in bounded)])
        result |= {"aware": float(worst.mean()), "aware_interval": _interval(worst)}
    return result


def _beside(
    subject: Subject,
    suite: Suite,
    threat: ThreatConfig,
    *,
    seed: int,
    store: Path | None,
    say: Say,
) -> dict[str, Any]:
    """The best single member and the averaged ensemble under the suite's aware budget."""
    keys = ("best_single_member", "averaged")
    nothing = {f"{k}{s}": None for k in keys for s in ("", "_interval")}
    if not suite.beside:
        return nothing
    attacks = [_attack(spec) for spec in suite.beside]
    saved = store / "beside.npz" if store is not None else None
    if saved is not None and saved.is_file():
        with np.load(saved, allow_pickle=False) as stored:
            single, averaged = stored["single"], stored["averaged"]
            best, chosen_on = int(stored["best"]), str(stored["chosen_on"])
    else:
        ensemble = subject.ensemble

        def robust(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Bools:
            return robust_correctness(model, x, y, attacks, as_threat(threat), seed=seed, name=name)

        averaged = robust(ensemble.averaged(), subject.x, subject.y, "averaged")
        on = subject.validation
        chosen_on = "evaluated images" if on is None else "validation"
        x, y = (subject.x, subject.y) if on is None else on
        x, y = (x, y) if on is None else (x[:SELECTION_IMAGES], y[:SELECTION_IMAGES])
        members = [
            robust(ensemble.member(m), x, y, f"choose-{m}") for m in range(ensemble.num_members)
        ]
        best = int(np.argmax([r.mean() for r in members]))
        single = (
            members[best]
            if on is None
            else robust(ensemble.member(best), subject.x, subject.y, "single")
        )
        if saved is not None:
            with saved.open("wb") as file:
                np.savez_compressed(
                    file, single=single, averaged=averaged, best=best, chosen_on=chosen_on
                )
        say(
            f"best single member {100 * single.mean():.1f} %, "
            f"averaged ensemble {100 * averaged.mean():.1f} % under the aware budget"
        )
    return {
        "best_single_member": float(single.mean()),
        "best_single_member_interval": _interval(single.astype(np.float64)),
        "best_single_member_index": best,
        "chosen_on": chosen_on,
        "averaged": float(averaged.mean()),
        "averaged_interval": _interval(averaged.astype(np.float64)),
    }


def robust_correctness(
    model: nn.Module,
    x: Images,
    y: Labels,
    attacks: Sequence[Attack],
    threat: Threat,
    *,
    seed: int,
    name: str,
) -> Bools:
    """(n,) whether a deterministic classifier is right on the image and after every attack."""
    alone = as_ensemble(model)
    with evaluating(model):
        parts = []
        for start in range(0, len(x), CHUNK):
            xs, ys = x[start : start + CHUNK], y[start : start + CHUNK]
            right = judge(alone, xs, xs, ys)["correct"][0]
            for attack in attacks:
                rng = stream(seed, "beside", name, repr(attack), start)
                x_adv = attack(alone, xs, ys, threat, rng=rng)  # type: ignore[arg-type]  # an ensemble is a module
                verify_ball(x_adv, xs, threat, name)
                right = right & judge(alone, x_adv, xs, ys)["correct"][0]
            parts.append(right)
    return np.concatenate(parts)


def provenance(seed: int) -> dict[str, Any]:
    """Where a number comes from: versions, commit, machine, seed, date."""
    return {
        "version": redefense.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Commit of the checkout that this package is run from; empty for an installed one."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
