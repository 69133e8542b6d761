"""`evaluate` and `evaluate_run`: evaluate any model, or a trained run, under a suite."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import redefense
from redefense.checks.answers import check_modes, in_fastest_format
from redefense.checks.catalogue import explained
from redefense.config import ThreatConfig
from redefense.data import load_dataset
from redefense.defences import draws_member
from redefense.ensembles import Ensemble, evaluating, recorded
from redefense.errors import ConfigError, RedCheckWarning
from redefense.evaluation.cells import Subject, image_digest
from redefense.evaluation.folder import begin_or_resume, exclusive, keeping, silent, stoppable
from redefense.evaluation.inputs.arguments import check_choices, read_ensemble, read_threat
from redefense.evaluation.inputs.batches import bounded, in_batches, noise_of
from redefense.evaluation.inputs.data import read_data
from redefense.evaluation.inputs.objects import (
    all_aware,
    attributes_digest,
    fingerprints,
    function_digest,
    outside_lines,
    plugins_of,
    suite_of,
)
from redefense.evaluation.inputs.precision import computed_in
from redefense.evaluation.inputs.radii import over, read_radii
from redefense.evaluation.inputs.subjects import SPLITS, drift_of, subject_of
from redefense.evaluation.plan import Log
from redefense.evaluation.progress import SILENT, shown
from redefense.evaluation.provenance import code, joined, place_of
from redefense.evaluation.report_object import Report
from redefense.evaluation.run import run_suite
from redefense.evaluation.stochastic.measure import run_drawn
from redefense.evaluation.stochastic.recognise import Choice, as_stochastic
from redefense.evaluation.suite import AttackPrecision, Suite, fixes_threat, suite_named
from redefense.limits import one_of
from redefense.radius import budget_text, read_eps, read_norm
from redefense.results.schema import OF_DEFENCE
from redefense.runtime.device import computing
from redefense.runtime.files import write_text
from redefense.runtime.folders import EVALUATION
from redefense.runtime.recording import REPLAY, recorder_for
from redefense.runtime.workers import own_device, workers
from redefense.stochastic.ensemble import Stochastic
from redefense.threat import Threat
from redefense.train.api import weights_digest
from redefense.train.loading import data_of, find_final, input_check, load_checkpoint
from redefense.types import whole


@computing()
def evaluate(
    model: Any,
    data: Any,
    suite: Any = "quick",
    threat: Threat | None = None,
    mixture: Sequence[float] | None = None,
    seed: int = 0,
    *,
    images: int | None = None,
    seeds: int = 1,
    eps: Any = None,
    out: str | Path | None = None,
    progress: bool = False,
    checks: str = "quick",
    cascade: bool | None = None,
    precision: str | None = None,
    stochastic: str = "auto",
    keep_images: bool = False,
    outputs: str = "logits",
    batch_size: int | None = None,
) -> Report:
    """Measure any classifier, ensemble or list of classifiers.

    Args:
        model: a network or a plain function from images in [0, 1] to logits; an ensemble; a list of
            networks, one of which is drawn for each query; or the result of `redefense.train`.
        data: a data specification, whose test split is used; (images, labels) as tensors or numpy
            arrays; a torch `Dataset` with a length; or a `DataLoader` that does not shuffle.
        suite: a name of `SUITES` or a `.json` file; a `Suite`; or a list of attacks (or a mapping
            from labels to attacks), each an attack of this package or a callable
            (model, x, y) -> x_adv. Points of a callable outside the ball are projected onto it, and
            the report states it.
        threat: the threat model; default: that of a trained run, else L-inf 8/255.
        mixture: sampling probabilities of a list of networks; default: uniform.
        seed: of every draw.
        images: use the first N images of a fixed permutation of the test split.
        seeds: number of runs of each attack.
        eps: the radius, replaces that of the threat; for several radii, such as
            ["2/255", "8/255"], the report is that of the largest, and its `curve` has all.
        out: a folder in which results are saved after each attack and every 100 images; the same
            call resumes an interrupted evaluation. The report is written to
            `OUT/evaluation/SUITE.json`.
        progress: show progress and the estimated remaining time on stderr.
        checks: "quick"; or "full" for checks that run further attacks, which do not apply to
            models with random outputs.
        cascade: whether aware attacks skip images on which an earlier attack fooled every member;
            default: the suite's setting. The headline is the same either way if attacks do not
            start from points of others. Without effect for models with random outputs.
        precision: how aware attacks query the ensemble: "fp32" as it is, "auto" as a copy with
            folded batch norms, "bf16" as such a copy in bfloat16; default: the suite's setting.
            Points are judged by the ensemble itself. Models with random outputs are queried as they
            are, and "bf16" is refused.
        stochastic: "auto" detects models with random outputs and measures them by fresh draws, with
            a warning; "on" measures every model so; "off" refuses models with random outputs. The
            layers stay in the given modes: active dropout stays active.
        keep_images: keep the attacked images, for `Report.adversarial`; with `out` they are written
            to `ATTACK.images.npz` in the folder of the records.
        outputs: what the networks return: "logits", also as log-probabilities or as an attribute
            `logits` of an object, or "probabilities", whose logarithms are then taken.
        batch_size: largest number of images per call of a network, which bounds the memory; for
            large images the default is as many as have 1,228,800 values (8 of 224 x 224 pixels).
            It does not change the figures beyond rounding, except for random outputs, whose random
            numbers depend on the place in a batch.

    Returns:
        The report; without `out` nothing is written.

    Warns:
        RedCheckWarning: for each self-check that finds that the figures may be too high.
        UserWarning: if random outputs were detected, where networks in bfloat16 answer otherwise
            than in float32, and for images that are transposed from (B, H, W, channels).

    Raises:
        InputError: for models, images or labels that break the input contract.
        ConfigError: for an unknown suite or setting, a suite that needs more classes, or eps or
            threat with a suite that has a threat for each attack.
        DataError: if the data cannot be read.
        Interrupted: on SIGINT or SIGTERM, if results are saved in `out`.
    """
    given = dict(locals())  # the arguments: no other name is bound yet
    if len(radii := read_radii(eps)) > 1:
        home = None if out is None else Path(out)

        def at(radius: float, name: str) -> Report:
            return evaluate(**given | {"eps": radius, "out": None if home is None else home / name})

        curve = over(radii, at)
        if home is not None:
            write_text(home / EVALUATION / f"{curve.data['suite']}.json", curve.to_json())
        return curve
    check_choices(checks=checks, precision=precision, stochastic=stochastic)
    plan = suite_of(suite).cascading(cascade).computing(cast("AttackPrecision | None", precision))
    if (radii or threat is not None) and fixes_threat(plan.model_dump()):
        raise ConfigError(
            f"suite {plan.name} has a threat for each attack: omit eps and threat, or choose "
            "another suite"
        )
    seed, seeds = whole(seed, "seed", 0), whole(seeds, "seeds", 1)
    images = None if images is None else whole(images, "images", 1)
    batch_size = None if batch_size is None else whole(batch_size, "batch_size", 1)
    ensemble = read_ensemble(model, mixture, outputs)
    # before the first query: networks may count them in an attribute
    attributes = attributes_digest(ensemble)
    run = None if ensemble.origin is None else ensemble.origin.run
    allowed = run.threat if run is not None and threat is None else read_threat(threat)
    if radii:
        allowed = ThreatConfig.of(allowed.norm, radii[0])
    if isinstance(data, str):
        place = str(ensemble.mixture.device)
        subject = subject_of(ensemble, load_dataset(data), images, {}, device=place)
        ensemble, _ = computed_in(ensemble, subject.x)
        subject = replace(subject, ensemble=ensemble)
    else:
        x, y, index = read_data(data, images)
        x, y = (part.to(ensemble.mixture.device) for part in (x, y))
        ensemble, x = computed_in(ensemble, x)
        subject = Subject(ensemble, x, y, index, "given images", "given")
    # several networks are drawn from, unless the run's method answers by their average
    drawn = ensemble.num_members > 1 and (run is None or draws_member(run.defence.get("name")))
    # `own` is recorded: the following wrappers would change its digest
    own, subject = ensemble, bounded(replace(subject, randomized=drawn), batch_size)
    ensemble, found = as_stochastic(subject.ensemble, subject.x, cast(Choice, stochastic))
    if found:
        warnings.warn(found, stacklevel=3)
    if isinstance(ensemble, Stochastic):
        subject = replace(subject, ensemble=ensemble, randomized=True)
    else:
        check_modes(ensemble, subject.x)
        if ensemble.num_members == 1:
            plan = all_aware(plan)
    with evaluating(ensemble):
        subject = replace(subject, x=in_fastest_format(ensemble, subject.x))
        # all that determines the records: a call that resumes them must have the same
        settings = {
            "suite": plan.model_dump(mode="json"), "objects": fingerprints(plan),
            "threat": allowed.model_dump(mode="json"), "images": images, "seed": seed,
            "seeds": seeds, "checks": checks, "stochastic": str(stochastic),
            "data": image_digest(subject.x, subject.y), "weights": weights_digest([own]),
            "version": redefense.__version__, "code": code(),
            "attributes": attributes, **plugins_of(plan, subject.data_name),
            **function_digest(ensemble, subject.x),
            **noise_of(subject),
        }  # fmt: skip
        with keeping(out, plan, settings, subject, progress=progress) as kept:
            report = _run_of(subject)(
                subject, plan, allowed, seed=seed, seeds=seeds, checks=checks, store=kept.store,
                log=kept.log, progress=kept.progress, keep_images=keep_images,
            )  # fmt: skip
            report.data["plan"] = settings | _described(own)
            kept.finish(report)
    for check in report.data["checks"]:
        # a red check of the defence does not make the figures wrong
        if check["passed"] is False and check["id"] not in OF_DEFENCE:
            message = RedCheckWarning(explained(check["id"], check["detail"]), report)
            warnings.warn(message, stacklevel=3)  # the caller's line, not the decorator's
    for line in outside_lines(report.data["cells"]):
        warnings.warn(RedCheckWarning(line, report), stacklevel=3)
    return report


@computing()
def evaluate_run(
    path: Path,
    *,
    suite: str = "quick",
    data: str | None = None,
    images: int | None = None,
    eps: Any = None,
    norm: str | None = None,
    seed: int = 0,
    seeds: int = 1,
    device: str = "cpu",
    out: Path | None = None,
    checks: str = "quick",
    cascade: bool | None = None,
    precision: str | None = None,
    stochastic: str = "auto",
    keep_images: bool = False,
    replay: str = "auto",
    batch_size: int | None = None,
    split: str = "test",
    log: Log | None = None,
) -> tuple[Report, Path]:
    """Evaluate a trained run and write `DIR/evaluation/SUITE.json`.

    Results are saved after each cell and every 100 images; the same call resumes an interrupted
    evaluation.

    Args (beyond those of `evaluate`):
        replay: "auto" records the passes of members on a CUDA device and replays them in attacks,
            with bit-identical results (see `recorded_passes`); "off" computes every pass anew.
        split: "test"; or "validation", the images that the training held out, on which settings may
            be chosen: then the file is `DIR/evaluation/SUITE-validation.json`.
        log: called with each log line; the remaining time is a log line unless stderr is a
            terminal, which shows a bar. By default nothing is logged.

    Returns:
        The report and its file.

    Raises:
        ConfigError: if an evaluation with other settings is stored there.
        DataError: if the run or its data is missing, damaged or does not fit.
    """
    given = dict(locals())  # the arguments: no other name is bound yet
    if len(radii := read_radii(eps, "--eps")) > 1:
        return _over_radii(radii, **given)
    eps = radii[0] if radii else None
    plan, device = suite_named(suite).cascading(cascade), own_device(device)
    check_choices(checks=checks, precision=precision, stochastic=stochastic)
    plan = plan.computing(cast("AttackPrecision | None", precision))
    one_of("--replay", replay, REPLAY)
    one_of("--split", split, SPLITS)
    checkpoint = find_final(path)
    run = checkpoint.run
    threat = _override(run.threat, eps, norm)
    target = out if out is not None else _target(path, plan.name, split)
    if target.suffix != ".json":
        raise ConfigError(f"--out must name a .json file, got {target}")
    ensemble = load_checkpoint(checkpoint, device=device)
    dataset, own = data_of(checkpoint, data)
    input_check(dataset, checkpoint)
    if split == "validation" and not own:
        raise ConfigError(
            f"--split validation is of the data of the training, got --data {data}: remove --data, "
            "or evaluate on the test split"
        )
    settings = {
        "suite": plan.model_dump(mode="json"),
        "threat": threat.model_dump(mode="json"),
        "data": dataset.checksum(),
        "split": split,
        "images": images,
        "seed": seed,
        "seeds": seeds,
        "checks": checks,
        "stochastic": stochastic,
        "weights": checkpoint.weights_sha256(),
        "version": redefense.__version__,
        "code": code(),
        **plugins_of(plan, dataset.name),
    }
    record = {"name": path.resolve().name, **run.model_dump(mode="json")}
    subject = subject_of(ensemble, dataset, images, record, run if own else None, device, split)
    subject = bounded(
        replace(subject, randomized=draws_member(run.defence.get("name"))), batch_size
    )
    # the validation split of other data was not held out in training
    drift = drift_of(path, subject.ensemble, dataset, run) if own else None
    subject = replace(subject, drift=drift)
    measured, found = as_stochastic(subject.ensemble, subject.x, cast(Choice, stochastic))
    if isinstance(measured, Stochastic):
        subject = replace(subject, ensemble=measured, randomized=True)
    settings |= noise_of(subject)
    if (eps, norm) != (None, None) and fixes_threat(plan.model_dump()):
        raise ConfigError(
            f"suite {plan.name} fixes its threat: remove --eps and --norm, or choose another suite"
        )
    store = target.with_suffix("")
    with workers() as team, exclusive(team, store, target):
        here = team.gather([place_of(subject.x.device)])
        if team.first:
            begin_or_resume(store, target, settings, here)
        team.wait()
        # every process reads what the first one wrote, so that all raise the same error
        started, places = begin_or_resume(store, target, settings)
        subject = replace(subject, workers=team)
        shared = log if team.first else None
        log = shared or silent
        what = f"{len(subject.x)} {split} images of {dataset.name}"
        log(f"{plan.name}: {what}, {_words(plan, threat)}")
        if found:
            log(found)
        # `per_image` names files in the folder of --out, which may differ from the suite's name
        named = plan if store.name == plan.name else plan.model_copy(update={"name": store.name})
        drawn = isinstance(subject.ensemble, Stochastic)
        # a replay would repeat the numbers that a stochastic network drew when it was recorded
        recorder = None if drawn or replay == "off" else recorder_for(subject.x.device)
        with (
            stoppable(store),
            shown(shared) if shared else nullcontext(SILENT) as progress,
            recorded(ensemble, recorder, log) as passes,
        ):
            # recorded from the ensemble as loaded, which is not bounded
            passes = in_batches(passes, subject.batch_size)
            subject = replace(subject, passes=None if drawn else passes)
            report = _run_of(subject)(
                subject, named, threat, seed=seed, seeds=seeds, store=store, checks=checks,
                log=log, progress=progress, keep_images=keep_images,
            )  # fmt: skip
        report.data["suite"] = plan.name
        report.data["provenance"] |= {**joined(places), "date": started}
        report.data["provenance"] |= plugins_of(plan, dataset.name)
        if not own:
            report.data["provenance"]["data"] = data
        if team.first:
            write_text(target, report.to_json())
    return report, target


def _described(ensemble: Ensemble) -> dict[str, Any]:
    """The hash of the weights and the number of parameters, as claims state them."""
    parameters = sum(parameter.numel() for parameter in ensemble.parameters())
    return {"weights": weights_digest([ensemble], digits=64), "parameters": parameters}


def _run_of(subject: Subject) -> Callable[..., Report]:
    """The function that runs a suite: `run_drawn` for stochastic networks, else `run_suite`."""
    return run_drawn if isinstance(subject.ensemble, Stochastic) else run_suite


def _target(path: Path, suite: str, split: str) -> Path:
    """The file of an evaluation in the run's folder."""
    return path / EVALUATION / f"{suite}{'' if split == 'test' else f'-{split}'}.json"


def _over_radii(
    radii: Sequence[float], *, path: Path, suite: str, out: Path | None, split: str, **settings: Any
) -> tuple[Report, Path]:
    """`evaluate_run` at each radius; smaller radii are saved in the folder of the largest."""
    target = out or _target(path, suite_named(suite).name, split)
    settings["split"] = split

    def at(radius: float, name: str) -> Report:
        place = target if not name else target.with_suffix("") / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        return evaluate_run(path, suite=suite, out=place, **settings | {"eps": radius})[0]

    report = over(radii, at)
    # the group of processes ended with the last evaluation
    if int(os.environ.get("RANK", "0")) == 0:
        write_text(target, report.to_json())
    return report, target


def _override(threat: ThreatConfig, eps: float | str | None, norm: str | None) -> ThreatConfig:
    chosen = threat.norm if norm is None else read_norm(norm, "--norm")
    if chosen != threat.norm and eps is None:
        raise ConfigError(f"--norm {norm} needs --eps: the run's own eps is for another norm")
    return ThreatConfig.of(chosen, threat.eps if eps is None else read_eps(eps, "--eps"))


def _words(suite: Suite, threat: ThreatConfig) -> str:
    """The distinct threats of the cells."""
    threats = dict.fromkeys((t.norm, t.eps) for t in (c.threat or threat for c in suite.cells))
    return ", ".join(budget_text(norm, eps) for norm, eps in threats)
