"""Recomputes the figures of a claim, from its settings or from given weights, and compares."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from redefense.claims.check import current
from redefense.claims.format import Claim, Evaluated, Figure, Plan, estimate_of
from redefense.claims.make import of_run, of_weights
from redefense.config import parse_run
from redefense.data import load_dataset
from redefense.errors import ConfigError, DataError
from redefense.evaluation.api import evaluate, evaluate_run
from redefense.evaluation.suite import SUITES, Suite, fixes_threat
from redefense.hub.pretrained import CONFIG, from_pretrained
from redefense.report.tables import with_interval
from redefense.results.records import load
from redefense.runtime.folders import EVALUATION
from redefense.threat import Threat
from redefense.train.experiment import train
from redefense.train.loading import find_final, load_checkpoint

Log = Callable[[str], None]


def recompute(
    it: Claim,
    data: str,
    folder: Path,
    *,
    weights: Path | nn.Module | None = None,
    device: str = "cpu",
    log: Log | None = None,
) -> list[str]:
    """Train and evaluate again in `folder`; return a line for every headline that differs.

    Training on another machine gives different weights. Figures agree if each is within the 95 %
    interval of the other. The same call with the same folder resumes an interrupted computation.

    Args:
        it: the claim.
        data: specification of its data on this machine.
        folder: for the run and its evaluations.
        weights: a run, a folder for a model hub, or a network in memory: evaluated instead of
            training, if these are the weights of the claim.
        device: to compute on.
        log: called with each log line.

    Raises:
        ConfigError: if the claim's weights were not trained by redefense and none are given.
        DataError: if the weights are not those of the claim, suites are of another version, or the
            data have another name.
    """
    for plan in (plan for e in it.evaluations for plan in e.suites):
        # older claims state no version, so it is unknown whether their attacks are the present ones
        if isinstance(plan.suite, str) and plan.version is not None and not current(plan):
            commit = plan.provenance.get("commit") or plan.provenance.get("version")
            raise DataError(
                f"suite {plan.suite} has other attacks now than the claim's (version "
                f"{plan.version}): recompute it with redefense of {commit}"
            )
    if isinstance(weights, Path) and (weights / CONFIG).is_file():
        weights = from_pretrained(weights, device=device)
    if weights is None and not it.trained:
        raise ConfigError(
            f"the weights of {it.name} were not trained by redefense: get them from {it.link} and "
            "pass their folder with --weights"
        )
    if it.trained and isinstance(weights, nn.Module):
        raise ConfigError(
            f"{it.name} is the claim of a run, whose hash is that of the run's file: pass the "
            "run's directory, or no weights, to train it"
        )
    if it.trained:
        assert weights is None or isinstance(weights, Path)
        return differences(it, _of_run(it, data, folder, weights, device, log))
    if isinstance(weights, Path):
        weights = load_checkpoint(find_final(weights), device=device)
    assert isinstance(weights, nn.Module)
    return differences(it, _of_weights(it, data, folder, weights, log))


def _plans(it: Claim) -> list[Plan]:
    return list({plan.file: plan for e in it.evaluations for plan in e.suites}.values())


def _of_run(
    it: Claim, data: str, folder: Path, trained: Path | None, device: str, log: Log | None
) -> Claim:
    """The recomputed claim: of a new training, or of the given run."""
    path = trained or folder / it.name
    if trained is None:
        _check_name(it, data)
        run = parse_run(it.run, it.name)
        # the claim names the data without its path on another machine
        run = run.model_copy(update={"data": run.data.model_copy(update={"spec": data})})
        train(run, path, resume=True, device=device, quiet=log is None)
    checkpoint = find_final(path)
    if trained is not None:
        # before the attacks, which take hours
        _require(it, checkpoint.weights_sha256(), trained)
    stored = []
    for plan in _plans(it):
        suite = plan.suite
        if not isinstance(suite, str):
            (folder / "suites").mkdir(parents=True, exist_ok=True)
            file = folder / "suites" / f"{plan.file}.json"
            # a custom suite reaches `evaluate_run` as a file
            file.write_text(json.dumps(suite))
            suite = str(file)
        # `evaluate_run` refuses a threat for a suite that has its own
        eps, norm = (None, None) if fixes_threat(plan.suite) else (plan.eps, plan.norm)
        _, target = evaluate_run(
            path, data=data, suite=suite, out=folder / EVALUATION / f"{plan.file}.json",
            eps=eps, norm=norm, device=device, log=log, **_settings(plan),
        )  # fmt: skip
        stored += load(target)
    return of_run(checkpoint, stored, it.name, _attributed(it))


def _check_name(it: Claim, data: str) -> None:
    """Check the name of the data, which determines the validation split of a new training.

    Raises:
        DataError: if it is not the claim's.
    """
    found = load_dataset(data).name
    names = sorted({str(e.data["name"]) for e in it.evaluations})
    if found not in names:
        raise DataError(
            f"{data} is named {found}, and the data of {it.name} {' or '.join(names)}: the name "
            "determines which images are held out, so give the claim's data under their own name"
        )


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "images": plan.images, "seed": plan.seed, "seeds": plan.seeds, "checks": plan.checks,
        "cascade": plan.cascade, "precision": plan.precision, "stochastic": plan.stochastic,
        "batch_size": plan.batch_size,
    }  # fmt: skip


def _require(it: Claim, found: str, where: object) -> None:
    if found != it.training.weights:
        raise DataError(f"{where} has weights {found}, the claim is of {it.training.weights}")


def _of_weights(it: Claim, data: str, folder: Path, model: nn.Module, log: Log | None) -> Claim:
    """The recomputed claim of a network in memory."""
    stored = []
    for plan in _plans(it):
        suite = plan.suite
        named = SUITES[suite] if isinstance(suite, str) else Suite.model_validate(suite)
        evaluate(
            model, data, suite=named, out=folder / plan.file, progress=log is not None,
            threat=None if fixes_threat(suite) else Threat(norm=plan.norm, eps=plan.eps),
            **_settings(plan),
        )  # fmt: skip
        stored += load(folder / plan.file / EVALUATION / f"{named.name}.json")
        found = stored[-1].plan
        # the evaluation computes the hash of a network in memory
        _require(it, "" if found is None else str(found.weights), "the network")
    return of_weights(stored, it.name, _attributed(it))


def _attributed(it: Claim) -> dict[str, str | None]:
    return {"authors": it.authors, "link": it.link, "licence": it.licence}


def differences(one: Claim, other: Claim) -> list[str]:
    """Headlines of two claims of one run that are outside each other's intervals."""
    found = []
    # further results of the other claim are additions, not differences
    again = {_about(e): e for e in other.evaluations}
    for mine in one.evaluations:
        theirs = again.get(_about(mine))
        if theirs is None:
            message = (
                f"{mine.data['num_images']} {mine.data['split']} images of {mine.data['name']}"
            )
            found.append(f"{one.name}: the claim has no results on these {message}")
            continue
        now = _figures(theirs)
        for key, a in _figures(mine).items():
            b = now.get(key)
            if not (a == b or (a is not None and b is not None and _agree(a, b))):
                shown = [with_interval(estimate_of(f)) for f in (a, b)]
                images = mine.data["num_images"]
                found.append(f"{one.name}, {images} images, {key}: {shown[0]}, now {shown[1]}")
    return found


def _figures(found: Evaluated) -> dict[str, Figure | None]:
    """The headlines, and those of the members and the gains of the draw, by name."""
    keys = ["clean", "unaware", "aware", "best_single_member", "averaged"]
    if found.further is None:  # in older claims the attacks of members were not matched
        return {key: getattr(found, key) for key in keys}
    keys += ["over_single", "over_averaged", "over_alone"]
    alone = {f"member {m} alone": figure for m, figure in enumerate(found.alone)}
    return {key: getattr(found, key) for key in keys} | alone


def _about(found: Evaluated) -> tuple[object, ...]:
    """The images, by their hash if it is known, and the threat."""
    data = found.data
    which = data.get("sha256") or str(data)
    return data["num_images"], which, found.norm, found.eps


def _agree(a: Figure, b: Figure) -> bool:
    def inside(value: float, of: Figure) -> bool:
        # a figure without interval agrees with equal ones only
        low, high = (of.value if v is None else v for v in (of.low, of.high))
        return low <= value <= high

    # both ways: one wide interval alone would agree with anything
    return inside(a.value, b) and inside(b.value, a)
