"""`evaluate` and `evaluate_run`: evaluate any model, or a trained run, under a suite."""

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

import redefense
from redefense.checks.answers import check_modes, laid_out
from redefense.checks.catalogue import explained
from redefense.config import Run, ThreatConfig, read_eps, read_norm
from redefense.data import Dataset, Split, load_dataset, test_indices, train_validation
from redefense.defences import DEFENCES
from redefense.ensembles import Ensemble, evaluating, recorded
from redefense.errors import ConfigError, DataError, Interrupted, RedCheckWarning
from redefense.evaluation.baselines import SELECTION_IMAGES
from redefense.evaluation.cells import Subject, image_digest
from redefense.evaluation.inputs.arguments import (
    check_checks,
    read_ensemble,
    read_threat,
    whole,
)
from redefense.evaluation.inputs.data import read_data
from redefense.evaluation.inputs.objects import (
    answers_of,
    balls_left,
    fingerprints,
    known_to_all,
    plugins_of,
    suite_of,
)
from redefense.evaluation.inputs.precision import computed_in
from redefense.evaluation.inputs.radii import over, read_radii
from redefense.evaluation.plan import Say, check_plan
from redefense.evaluation.progress import SILENT, Progress, shown
from redefense.evaluation.provenance import UNKNOWN, code, joined, place_of
from redefense.evaluation.report_object import Report
from redefense.evaluation.run import run_suite
from redefense.evaluation.stochastic.measure import run_drawn
from redefense.evaluation.stochastic.recognise import Choice, as_stochastic, check_choice
from redefense.evaluation.store import read_object
from redefense.evaluation.suite import Suite, suite_named
from redefense.results.records import OF_DEFENCE
from redefense.runtime.device import computing
from redefense.runtime.files import locked, write_text
from redefense.runtime.recording import check_replay, recorder_for
from redefense.runtime.workers import ALONE, Workers, own_device, workers
from redefense.stochastic.ensemble import Stochastic
from redefense.threat import Threat
from redefense.train.api import weights_digest
from redefense.train.experiment import accuracy
from redefense.train.loading import Signature, find_final, input_check, load_checkpoint


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
    stochastic: str = "auto",
    keep_images: bool = False,
    outputs: str = "logits",
) -> Report:
    """Measure any classifier, ensemble or list of classifiers.

    Args:
        model: a network or a plain function from images in [0, 1] to logits, an ensemble, or a list
            of networks of which each query meets one at random; or what `redefense.train` returned.
        data: a data specification, whose test split is used; (images, labels) as tensors or numpy
            arrays; a torch `Dataset` with a length; or a `DataLoader` that does not shuffle.
        suite: a name of `SUITES` or a `.json` file; a `Suite`; or a list of attacks (or a mapping
            from labels to attacks), each an attack of ours or a callable (model, x, y) -> x_adv of
            another library. Points of a callable outside the ball are projected back into it, and
            the report says so.
        threat: what the adversary may do; of a trained run its own unless given, of any other
            model L-inf 8/255.
        mixture: sampling probabilities of a list of networks; uniform unless given.
        seed: of every draw.
        images: the first N of one published permutation of the test split.
        seeds: how often each attack is run.
        eps: the radius, in place of that of the threat; of several, such as ["2/255", "8/255"], the
            report is that of the largest, and its `curve` has them all.
        out: a folder in which each attack is kept as soon as it is done, and of one under way every
            100 images; called again with the same arguments, the evaluation goes on. The report is
            written to `OUT/evaluation/SUITE.json`.
        progress: show on stderr what is done, and how long it will still take.
        checks: "quick" or "full".
        cascade: whether attacks that know the ensemble leave out images on which every member errs
            already; the suite's own choice unless given. Where attacks start independently of
            others, the headline is the same either way.
        stochastic: "auto" measures a model that answers equal images differently by fresh draws,
            and says so in a warning; "on" measures any model so, "off" refuses one that draws. Its
            layers keep the modes in which they are given: active dropout stays active.
        keep_images: keep the attacked images, for `Report.adversarial`; with `out` they are written
            beside each attack's records, as `ATTACK.images.npz`.
        outputs: what the networks return: "logits", also as log-probabilities or as an attribute
            `logits` of an object, or "probabilities", whose logarithms are then taken.

    Returns:
        The report; without `out` nothing is written.

    Warns:
        RedCheckWarning: for each self-check that says that the measurement flatters.
        UserWarning: if the model was found to answer at random.

    Raises:
        InputError: for models, images or labels that break the input contract.
        ConfigError: for an unknown suite or setting, or a suite that needs more classes.
        DataError: if the data cannot be read.
        Interrupted: on SIGINT or SIGTERM, if `out` keeps what is done.
    """
    if len(radii := read_radii(eps)) > 1:
        home = None if out is None else Path(out)
        return over(
            radii,
            lambda radius, name: evaluate(
                model, data, suite, threat, mixture, seed, images=images, seeds=seeds, eps=radius,
                out=None if home is None else home / name, progress=progress, checks=checks,
                cascade=cascade, stochastic=stochastic, keep_images=keep_images, outputs=outputs,
            ),
        )  # fmt: skip
    plan = suite_of(suite).cascading(cascade)
    seed, seeds = whole(seed, "seed", 0), whole(seeds, "seeds", 1)
    images = None if images is None else whole(images, "images", 1)
    check_checks(checks)
    check_choice(stochastic)
    ensemble = read_ensemble(model, mixture, outputs)
    run = None if ensemble.origin is None else ensemble.origin.run
    allowed = run.threat if run is not None and threat is None else read_threat(threat)
    if radii:
        allowed = ThreatConfig.of(allowed.norm, radii[0])
    if isinstance(data, str):
        place = str(ensemble.mixture.device)
        subject = _subject(ensemble, load_dataset(data), images, {}, device=place)
        ensemble, _ = computed_in(ensemble, subject.x)
        subject = replace(subject, ensemble=ensemble)
    else:
        x, y, index = read_data(data, images)
        x, y = (part.to(ensemble.mixture.device) for part in (x, y))
        ensemble, x = computed_in(ensemble, x)
        subject = Subject(ensemble, x, y, index, "given images", "given")
    drawn = ensemble.num_members > 1 and (run is None or _randomized(run))
    subject = replace(subject, randomized=drawn)
    ensemble, found = as_stochastic(ensemble, subject.x, cast(Choice, stochastic))
    if found:
        warnings.warn(found, stacklevel=3)
    if isinstance(ensemble, Stochastic):
        subject = replace(subject, ensemble=ensemble, randomized=True)
    else:
        check_modes(ensemble, subject.x)
        if ensemble.num_members == 1:
            plan = known_to_all(plan)
    with evaluating(ensemble):
        subject = replace(subject, x=laid_out(ensemble, subject.x))
        settings = {
            "suite": plan.model_dump(mode="json"), "objects": fingerprints(plan),
            "threat": allowed.model_dump(mode="json"), "images": images, "seed": seed,
            "seeds": seeds, "checks": checks, "stochastic": str(stochastic),
            "data": image_digest(subject.x, subject.y), "weights": weights_digest([ensemble]),
            "version": redefense.__version__, "code": code(),
            **plugins_of(plan, subject.data_name), **answers_of(ensemble, subject.x),
        }  # fmt: skip
        with _kept(out, plan, settings, subject, progress=progress) as kept:
            report = _run_of(subject)(
                subject, plan, allowed, seed=seed, seeds=seeds, checks=checks, store=kept.store,
                say=kept.say, progress=kept.progress, keep_images=keep_images,
            )  # fmt: skip
            report.data["plan"] = settings | _described(ensemble)
            kept.finish(report)
    for check in report.data["checks"]:
        if check["passed"] is False and check["id"] not in OF_DEFENCE:
            told = RedCheckWarning(explained(check["id"], check["detail"]), report)
            warnings.warn(told, stacklevel=3)  # the caller's line, not the decorator's
    for line in balls_left(report.data["cells"]):
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
    stochastic: str = "auto",
    keep_images: bool = False,
    replay: str = "auto",
    say: Say | None = None,
) -> tuple[Report, Path]:
    """Evaluate a trained run on its test split and write `DIR/evaluation/SUITE.json`.

    Cells are saved one by one, and of a cell under way every 100 images; called again with the
    same settings, the evaluation goes on.

    Args (of those that `evaluate` does not have):
        replay: "auto" records the passes of members on a CUDA device and replays them in attacks,
            to the same bits (`ensembles.replay`); "off" computes every pass anew.
        say: takes lines about what is done, and how long it will take unless stderr is a terminal,
            which shows a bar; without it nothing is told.

    Returns:
        The report and the file it was written to.

    Raises:
        ConfigError: if an evaluation with other settings is stored there.
        DataError: if the run or its data is missing, damaged or does not fit.
    """
    if len(radii := read_radii(eps, "--eps")) > 1:
        return _over_radii(
            radii, path, suite=suite, data=data, images=images, norm=norm, seed=seed, seeds=seeds,
            device=device, out=out, checks=checks, cascade=cascade,
            stochastic=stochastic, replay=replay, keep_images=keep_images, say=say,
        )  # fmt: skip
    eps = radii[0] if radii else None
    plan, device = suite_named(suite).cascading(cascade), own_device(device)
    check_checks(checks)
    check_choice(stochastic)
    check_replay(replay)
    checkpoint = find_final(path)
    run = checkpoint.run
    threat = _override(run.threat, eps, norm)
    target = out if out is not None else path / "evaluation" / f"{plan.name}.json"
    if target.suffix != ".json":
        raise ConfigError(f"--out must name a .json file, got {target}")
    ensemble = load_checkpoint(checkpoint, device=device)
    dataset = load_dataset(data or run.data.spec)
    input_check(ensemble, dataset, checkpoint)
    own = dataset.checksum() == Signature.stored(checkpoint.state).checksum
    if data is None and not own:
        raise DataError(f"{run.data.spec} is not the data that {path} was trained on")
    settings = {
        "suite": plan.model_dump(mode="json"),
        "threat": threat.model_dump(mode="json"),
        "data": dataset.checksum(),
        "images": images,
        "seed": seed,
        "seeds": seeds,
        "checks": checks,
        "stochastic": stochastic,
        "weights": _manifest(checkpoint.path),
        "version": redefense.__version__,
        "code": code(),
        **plugins_of(plan, dataset.name),
    }
    subject = replace(
        _subject(ensemble, dataset, images, _run_json(path, run), run if own else None, device),
        randomized=_randomized(run),
        # other data has no validation split that the run has kept its hands off
        drift=_drift(path, ensemble, dataset, run) if own else None,
    )
    measured, found = as_stochastic(ensemble, subject.x, cast(Choice, stochastic))
    if isinstance(measured, Stochastic):
        subject = replace(subject, ensemble=measured, randomized=True)
    check_plan(subject, plan, threat)
    if (eps, norm) != (None, None) and all(spec.threat is not None for spec in plan.cells):
        raise ConfigError(f"suite {plan.name} fixes its threat: --eps and --norm cannot change it")
    store = target.with_suffix("")
    with workers() as team, _alone(team, store, target):
        here = team.gather([place_of(subject.x.device)])
        if team.first:
            _claim(store, target, settings, here)
        team.wait()
        # every process reads what the first one wrote, so that all see the same refusal
        started, places = _claim(store, target, settings)
        subject = replace(subject, workers=team)
        voice = say if team.first else None
        tell = voice or _silent
        tell(f"{plan.name}: {len(subject.x)} test images of {dataset.name}, {_words(plan, threat)}")
        if found:
            tell(found)
        named = plan if store.name == plan.name else plan.model_copy(update={"name": store.name})
        drawn = isinstance(subject.ensemble, Stochastic)
        recorder = None if drawn or replay == "off" else recorder_for(subject.x.device)
        with (
            _stoppable(store),
            shown(voice) if voice else nullcontext(SILENT) as progress,
            recorded(subject.ensemble, recorder, tell) as passes,
        ):
            subject = replace(subject, passes=passes)
            report = _run_of(subject)(
                subject, named, threat, seed=seed, seeds=seeds, store=store, checks=checks,
                say=tell, progress=progress, keep_images=keep_images,
            )  # fmt: skip
        report.data["suite"] = plan.name
        report.data["provenance"] |= {**joined(places), "date": started}
        report.data["provenance"] |= plugins_of(plan, dataset.name)
        if data is not None and not own:
            report.data["provenance"]["data"] = data
        if team.first:
            write_text(target, report.to_json())
    return report, target


def _described(ensemble: Ensemble) -> dict[str, Any]:
    """The whole hash of the weights, and the number of parameters: what a claim says of them."""
    parameters = sum(parameter.numel() for parameter in ensemble.parameters())
    return {"weights": weights_digest([ensemble], digits=64), "parameters": parameters}


def _run_of(subject: Subject) -> Callable[..., Report]:
    """What runs a suite on it: by draws of a network, or on members that can be listed."""
    return run_drawn if isinstance(subject.ensemble, Stochastic) else run_suite


def _over_radii(
    radii: Sequence[float], path: Path, *, suite: str, out: Path | None, **settings: Any
) -> tuple[Report, Path]:
    """`evaluate_run` at each radius; the smaller ones lie in the folder of the largest."""
    target = out or path / "evaluation" / f"{suite_named(suite).name}.json"

    def at(radius: float, name: str) -> Report:
        place = target if not name else target.with_suffix("") / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        return evaluate_run(path, suite=suite, eps=radius, out=place, **settings)[0]

    report = over(radii, at)
    if int(os.environ.get("RANK", "0")) == 0:
        write_text(target, report.to_json())
    return report, target


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """Where an evaluation in Python is kept, and how it is shown."""

    target: Path | None
    started: str
    say: Say
    progress: Progress

    @property
    def store(self) -> Path | None:
        """The folder of the records, beside the report."""
        return None if self.target is None else self.target.with_suffix("")

    def finish(self, report: Report) -> None:
        """Write the report where it is wanted."""
        if self.target is not None:
            report.data["provenance"]["date"] = self.started
            write_text(self.target, report.to_json())


@contextmanager
def _alone(team: Workers, store: Path, target: Path) -> Iterator[None]:
    """Refuse to work on an evaluation that other processes work on at the same moment.

    Raises:
        ConfigError: on every process of the team.
    """
    with locked(store / ".lock", wait=False) if team.first else nullcontext(True) as free:
        if not all(team.gather([free])):
            raise ConfigError(
                f"another process is working on {target}: wait until it ends, or name another file "
                "with --out"
            )
        yield


@contextmanager
def _kept(
    out: str | Path | None,
    plan: Suite,
    settings: Mapping[str, Any],
    subject: Subject,
    *,
    progress: bool,
) -> Iterator[_Kept]:
    """Keep an evaluation in a folder, if one is given, and show how far it is, if that is wanted.

    Raises:
        ConfigError: if an evaluation with other settings is kept there.
        Interrupted: on SIGINT or SIGTERM, if the evaluation is kept.
    """
    say = partial(print, file=sys.stderr, flush=True) if progress else _silent
    target, started = None, ""
    with ExitStack() as stack:
        if out is not None:
            target = Path(out) / "evaluation" / f"{plan.name}.json"
            store, here = target.with_suffix(""), [place_of(subject.x.device)]
            stack.enter_context(_alone(ALONE, store, target))
            started, _ = _claim(store, target, settings, here)
            stack.enter_context(_stoppable(store))
        bar = stack.enter_context(shown(say) if progress else nullcontext(SILENT))
        yield _Kept(target=target, started=started, say=say, progress=bar)


@contextmanager
def _stoppable(store: Path) -> Iterator[None]:
    """Ends on SIGTERM as on SIGINT: through the blocks under way, which give the terminal back."""
    told = f"stopped; what is done is kept in {store}, and the same call goes on"

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(told, number)

    if threading.current_thread() is not threading.main_thread():
        yield  # whoever owns the process handles signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(told, signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _silent(line: str) -> None:
    pass


def _drift(path: Path, ensemble: Ensemble, dataset: Dataset, run: Run) -> float | None:
    """Clean validation accuracy now minus as logged; None without a log."""
    log = path / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    try:
        logged = [json.loads(line).get("validation_accuracy") for line in lines]
    except (ValueError, AttributeError):  # a damaged log is no log
        return None
    if not logged or logged[-1] is None:
        return None
    _, validation, _ = train_validation(dataset, run.data.validation)
    return accuracy(ensemble, validation, run.batch_size) - float(logged[-1])


def _randomized(run: Run) -> bool:
    """Whether the method that made this run answers with a member drawn at random."""
    defence = DEFENCES.get(str(run.defence.get("name")))
    return defence is None or defence.randomized


def _subject(
    ensemble: Ensemble,
    dataset: Dataset,
    images: int | None,
    run_json: Mapping[str, Any],
    run: Run | None = None,
    device: str = "cpu",
) -> Subject:
    total = len(dataset.test)
    # always in the published order: its beginnings, on which some measures look, are a fair sample
    index = test_indices(total, total if images is None else images)
    fraction = run.data.validation if run is not None else 0.1
    _, validation, _ = train_validation(dataset, fraction)
    return Subject(
        ensemble,
        *_images(dataset.test, index, device),
        index.numpy(),
        dataset.name,
        "test",
        run_json,
        # a stranger's model may have been trained on these images
        _images(validation, torch.arange(min(SELECTION_IMAGES, len(validation))), device)
        if run is not None
        else None,
    )


def _images(split: Split, index: Tensor, device: str) -> tuple[Tensor, Tensor]:
    # loaded networks have their channels last, and would turn every batch of other images around
    x = split.float(index).to(device, memory_format=torch.channels_last)
    return x, split.labels[index].to(device)


def _run_json(path: Path, run: Run) -> dict[str, Any]:
    return {"name": path.resolve().name, **run.model_dump(mode="json")}


def _override(threat: ThreatConfig, eps: float | str | None, norm: str | None) -> ThreatConfig:
    chosen = threat.norm if norm is None else read_norm(norm, "--norm")
    if chosen != threat.norm and eps is None:
        raise ConfigError(f"--norm {norm} needs --eps: the run's own eps is for another norm")
    return ThreatConfig.of(chosen, threat.eps if eps is None else read_eps(eps, "--eps"))


def _words(suite: Suite, threat: ThreatConfig) -> str:
    """The threats of the cells, each once."""
    threats = dict.fromkeys((t.norm, t.eps) for t in (c.threat or threat for c in suite.cells))
    return ", ".join(f"{'L-inf' if norm == 'inf' else 'L2'} eps {eps:g}" for norm, eps in threats)


def _manifest(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    digest: str = manifest["sha256"]["weights.safetensors"]
    return digest


def _claim(
    store: Path, target: Path, settings: Mapping[str, Any], here: Sequence[dict[str, str]] = ()
) -> tuple[str, list[dict[str, str]]]:
    """Refuse to mix settings: cells that lie there must come from this very plan.

    With places it is written down that an unfinished evaluation is worked on there from now on.

    Returns:
        When the evaluation was first started, so that one that was killed tells the same date; and
        all the places that worked on it.
    """
    plan = store / "plan.json"
    if plan.is_file():
        stored = read_object(plan)
        if stored is None:
            raise DataError(f"{plan} is damaged; remove {store} to start over")
        started, known = str(stored.pop("started", "")), stored.pop("places", [UNKNOWN])
        if stored != settings:
            keys = [k for k in settings if stored.get(k) != settings[k]]
            if keys == ["code"]:
                raise ConfigError(
                    f"{store} was begun by other code, and figures of both must not be mixed: go "
                    f"on with that code, remove {store} and {target.name}, or name another file "
                    "with --out"
                )
            raise ConfigError(
                f"{target} holds an evaluation with other settings ({', '.join(keys)}); "
                "name another file with --out"
            )
        places = known if target.exists() else _distinct([*known, *here])
        if places != known:
            _write_plan(plan, settings, started, places)
        return started, places
    if target.exists():
        raise ConfigError(f"{target} exists and is not ours; name another file with --out")
    store.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    places = _distinct(here)
    _write_plan(plan, settings, now, places)
    return now, places


def _distinct(places: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [place for i, place in enumerate(places) if place not in places[:i]]


def _write_plan(
    plan: Path, settings: Mapping[str, Any], started: str, places: Sequence[Mapping[str, str]]
) -> None:
    known = {**settings, "started": started, "places": places}
    write_text(plan, json.dumps(known, indent=1) + "\n")
