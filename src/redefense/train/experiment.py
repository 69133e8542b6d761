"""Trains a `Run` into a run directory; `loading` loads it."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redefense.config import Run, StartConfig, parse_run, to_json
from redefense.data import Dataset, Split, load_dataset, train_validation
from redefense.defences import Defence
from redefense.ensembles import Ensemble, Origin, channels_last
from redefense.ensembles.configs import EnsembleConfig
from redefense.errors import BAD_JSON, CheckpointError, ConfigError, RedefenseError
from redefense.limits import one_of
from redefense.runtime.device import computing
from redefense.runtime.files import UNFINISHED, locked, write_json, write_text
from redefense.runtime.folders import CHECKPOINTS, FINAL, LOCK, MANIFEST, RUN
from redefense.runtime.mesh import Mesh, processes
from redefense.runtime.progress import note
from redefense.runtime.recording import REPLAY, Recorder, recorder_for
from redefense.train.checkpoint import ASIDE, Checkpoint, latest, read, save
from redefense.train.exchange import check_weights
from redefense.train.init_from import (
    check_apart,
    initialise_from,
    open_source,
    recorded,
    summary_of_start,
)
from redefense.train.loading import (
    Signature,
    as_in_training,
    check_members,
    fresh,
    load_checkpoint,
    load_weights,
    loader_of,
    not_of,
    resolve,
)
from redefense.train.loop import Position, Start
from redefense.train.profile import profiled
from redefense.train.session import Session, accuracy


@computing()
def train(
    run: Run,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    quiet: bool = False,
    download: bool = False,
    profile: bool = False,
    mesh: str | None = None,
    replay: str = "auto",
) -> Ensemble:
    """Train `run` into the directory `out` and return the ensemble in evaluation mode.

    The test split is never read. With `resume`, an interrupted run continues from its last valid
    checkpoint with bit-identical results; a finished one is loaded. With `profile`, the seconds of
    each phase are printed at the end and saved in `out/profile.json`.

    Under `torchrun`, or within an existing process group, all processes call this and share each
    batch; `mesh` "DATAxMEMBER" arranges them in DATA rows that share batches and MEMBER columns
    that share the members. The number of processes is no part of the run: it changes rounding only,
    is saved with each checkpoint, and may differ when the run is resumed.

    With `replay` "auto" one process on a CUDA device records its steps as CUDA graphs and replays
    them bit-identically (`train.replay`); not while profiling. "off" disables it.

    Raises:
        ConfigError: for an invalid setting, an `out` that already holds a run (without `resume`),
            or a different run than the one to be resumed.
        DataError: if the data cannot be read.
        TrainingError: if the loss is not finite or a parameter gets no gradient.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    one_of("--replay", replay, REPLAY)
    with processes(mesh, device) as team, contextlib.ExitStack() as held:
        # a replayed step is not divided into phases, and collectives are not recorded
        records = replay == "auto" and team.size == 1 and not profile
        recorder = recorder_for(team.device) if records else None
        return _train(
            run, out, team, resume, quiet or not team.first, download, profile, recorder, held
        )


def _train(
    run: Run,
    out: Path,
    team: Mesh,
    resume: bool,
    quiet: bool,
    download: bool,
    profile: bool,
    recorder: Recorder | None,
    held: contextlib.ExitStack,
) -> Ensemble:
    """See `train`; `held` keeps the lock of the directory until the training has ended."""
    device = str(team.device)
    with team.agreed():
        run, kind, defence = resolve(run)
        run = _with_start(run, out)
        stages = defence.stages(kind.num_members, run.epochs)
        check_apart(kind, stages)
        _check_mesh(team, run, defence, kind.num_members)
    # one process decides: the others could see a folder that it is about to write
    begun = team.first_does(lambda: _check_folder(run, out, resume))
    final = team.first_does(lambda: _finished(out) if begun is not None else None)
    # finished: data of the same name need not even be read
    if final is not None and begun == run.data.spec:
        return _loaded(final, out, device, quiet)
    dataset = _load_data(run, team, download, progress=not quiet)
    checkpoint = team.first_does(
        lambda: latest(out / CHECKPOINTS, note) if begun is not None and final is None else None
    )
    if checkpoint is not None:
        dataset = as_in_training(dataset, Signature.stored(checkpoint.state))
    signature = Signature.of(dataset)
    if final is not None:
        with team.agreed():
            _check_data(run, out, begun, final, signature)
        return _loaded(final, out, device, quiet)
    held.enter_context(_alone(team, out))
    train_split, validation, _ = train_validation(dataset, run.data.validation)
    with team.agreed():
        loader = loader_of(run, train_split, device, rank=team.row, world_size=team.shape[0])
        check_batch(team.shape[0], loader.batch_size)
    ensemble = fresh(kind, signature, run.seed, device)
    channels_last(ensemble)
    # before any work, since it cannot be repaired later
    check_weights(team, ensemble)
    start = Start()
    with team.agreed():
        if begun is not None:
            _check_data(run, out, begun, checkpoint, signature)
        if checkpoint is not None:
            load_weights(ensemble, checkpoint)
            start = Start(
                Position(**checkpoint.state["position"]),
                checkpoint.state["totals"],
                checkpoint.optimizer,
            )
            if not quiet:
                _say_resumed(checkpoint, team)
        else:
            # only at the start: a run that is resumed has passed these checks
            check_members(ensemble, train_split, len(signature.classes), device)
            defence.check(ensemble, len(signature.classes))
            started = _start(run, kind, ensemble, signature, train_split, validation, device)
            if team.first:
                if started is not None:
                    write_json(out / "start.json", started)
                # last: without it a folder is that of a run which has not begun
                write_text(out / RUN, to_json(run))
            if started is not None and not quiet:
                note(summary_of_start(started))
    session = Session(
        run, out, defence, stages, ensemble, loader, validation, signature, start, quiet, team
    )
    with profiled(out, device) if profile and team.first else contextlib.nullcontext():
        session.train(recorder)
    team.first_does(lambda: _finish(run, out, ensemble, signature))
    ensemble.origin = Origin(run, signature.as_dict(), out)
    return ensemble.eval()


@contextlib.contextmanager
def _alone(team: Mesh, out: Path) -> Iterator[None]:
    """Lock a run directory against other trainings.

    Raises:
        ConfigError: on every process of the team, if another training is writing to it.
    """
    lock = locked(out / LOCK, wait=False) if team.first else contextlib.nullcontext(True)
    with lock as free:
        if not all(team.gathered(free)):
            raise team.mark_reported(
                ConfigError(
                    f"another process is training in {out}: wait until it ends, or choose "
                    "another out"
                )
            )
        yield


def _check_mesh(team: Mesh, run: Run, defence: Defence, num_members: int) -> None:
    """Check that the method, the members and the batch can be distributed over the mesh."""
    columns = team.shape[1]
    if columns > num_members:
        raise ConfigError(f"{columns} columns of processes are too many for {num_members} members")
    if columns > 1 and not defence.spreads:
        raise ConfigError(
            f"{run.defence['name']} with these settings needs all members in one process: let the "
            f"processes share the batch instead, with --mesh {team.size}x1"
        )


def check_batch(rows: int, batch_size: int) -> None:
    """Check that rows of processes can share a batch.

    Raises:
        ConfigError: if they cannot.
    """
    if rows > 1 and batch_size % (2 * rows):
        raise ConfigError(
            f"{rows} processes cannot split a batch of {batch_size} images into even numbers, as "
            "methods that halve it need: change the batch size or --mesh"
        )


def _finished(out: Path) -> Checkpoint | None:
    """The final checkpoint; None if missing, or damaged with an earlier one to resume from.

    Raises:
        CheckpointError: if it and all earlier ones are damaged.
    """
    folder = out / FINAL
    # a workflow engine creates the folders of the files that a command is to write
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        return read(folder)
    except CheckpointError as error:
        if latest(out / CHECKPOINTS, note) is None:
            raise
        note(f"{error}; trying the one before it")
        return None


def _loaded(final: Checkpoint, out: Path, device: str, quiet: bool) -> Ensemble:
    if not quiet:
        note(f"{out} is finished; nothing to do")
    return load_checkpoint(final, device=device)


def _another(out: Path, differs: str) -> str:
    return (
        f"{out} holds another run (it differs in {differs}): repeat the settings that it was begun "
        "with, or choose another out"
    )


def _check_data(
    run: Run, out: Path, stored: str | None, checkpoint: Checkpoint | None, signature: Signature
) -> None:
    """Check that the data of a resumed run are those it was trained on, in any location.

    A checkpoint stores the checksum of its data; without one the data specification must equal
    `stored`, that of the start of the run.

    Raises:
        ConfigError: if the run names other data.
        DataError: if the data have changed.
    """
    if checkpoint is None:
        if stored != run.data.spec:
            raise ConfigError(_another(out, f"data, which is {stored}"))
        return
    if checkpoint.state["data"]["checksum"] == signature.checksum:
        return
    if stored != run.data.spec:
        raise ConfigError(f"{out} holds another run: {run.data.spec} is not its data, {stored}")
    raise not_of(checkpoint)


def _load_data(run: Run, team: Mesh, download: bool, progress: bool) -> Dataset:
    """The data set."""
    # the first process before the others: it downloads, which must happen once
    found: list[Dataset] = []
    for turn in (True, False):
        with team.agreed():
            if team.first == turn:
                found.append(load_dataset(run.data.spec, download=download, progress=progress))
    return found[0]


def _say_resumed(checkpoint: Checkpoint, team: Mesh) -> None:
    note(f"resuming from {checkpoint.path.name}")
    rows, columns = checkpoint.state.get("mesh", (1, 1))
    if (rows, columns) != team.shape:
        note(
            f"it was trained by {rows}x{columns} processes and continues with "
            f"{team.shape[0]}x{team.shape[1]}: rounding will differ"
        )


def _with_start(run: Run, out: Path) -> Run:
    """The run with the checksum of its initial weights, if it names any."""
    # with a checksum it was recorded before, and `_start` verifies it
    if run.start is None or run.start.sha256 is not None:
        return run
    try:
        start = recorded(run.start, open_source(Path(run.start.path)))
    except RedefenseError:
        # a run that has begun has its members in checkpoints and does not need them any more
        known = _begun_from(out)
        if known is None:
            raise
        start = known
    return run.model_copy(update={"start": start})


def _begun_from(out: Path) -> StartConfig | None:
    """The initial weights of the run in `out`, if it has a record of them."""
    try:
        return parse_run(json.loads((out / RUN).read_text()), f"{out}/{RUN}").start
    except (OSError, *BAD_JSON, ConfigError):
        return None


def _start(
    run: Run,
    kind: EnsembleConfig,
    ensemble: Ensemble,
    signature: Signature,
    train_split: Split,
    validation: Split,
    device: str,
) -> dict[str, Any] | None:
    """Initialise a new run from the members it names; return how well they are matched."""
    # in every process, on whole batches, so that all start from equal weights
    if run.start is None:
        return None
    source = open_source(Path(run.start.path), device)
    recorded(run.start, source)
    like = (
        kind.plain()
        .build(num_classes=len(signature.classes), shape=signature.shape, seed=run.seed)
        .to(device)
    )
    nets, fitted = source.networks(kind, like)
    batches = loader_of(run, train_split, device).epoch(0)
    started = initialise_from(
        run.start, nets, ensemble, batches, lambda it: accuracy(it, validation, run.batch_size)
    )
    return {**started, **fitted}


def _check_folder(run: Run, out: Path, resume: bool) -> str | None:
    """The data specification with which this run in `out` was started; None for a new run.

    Raises:
        ConfigError: for another run, for other contents without `resume`, or if `out` is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must name a folder, and {out} is a file")
    # remains of a write that was killed are no contents
    if not out.exists() or all(path.name.startswith((UNFINISHED, LOCK)) for path in out.iterdir()):
        return None
    if not (out / RUN).is_file():
        if any((out / CHECKPOINTS).glob("step-*")) or (out / FINAL / MANIFEST).is_file():
            raise ConfigError(
                f"{out} has checkpoints but no {RUN}, which says of what run: restore it, or "
                "choose another out"
            )
        if resume:  # killed before it started: the contents are not of a run
            return None
        raise ConfigError(f"{out} exists and holds no run; choose another --out")
    if not resume:
        raise ConfigError(f"{out} already holds a run: resume it, or choose another out")
    try:
        record = json.loads((out / RUN).read_text())
    except BAD_JSON:
        raise CheckpointError(f"{out}/run.json is damaged; choose another --out") from None
    # parsed as a run, an old record gets the defaults of newer settings
    begun = parse_run(record, f"{out}/run.json")
    stored, wanted = (json.loads(to_json(it)) for it in (resolve(begun)[0], run))
    # as recorded at the start: to resolve it again finds the plug-ins of today
    stored["plugins"] = begun.plugins
    spec = str(stored["data"]["spec"])
    # data and initial weights may have moved: checksums are compared
    for settings in (stored, wanted):
        del settings["data"]["spec"]
        if settings["start"] is not None:
            del settings["start"]["path"]
    if stored != wanted:
        keys = [k for k in wanted if stored.get(k) != wanted[k]]
        raise ConfigError(_another(out, ", ".join(keys)))
    return spec


def _finish(run: Run, out: Path, ensemble: Ensemble, signature: Signature) -> None:
    save(out / FINAL, run=run, weights=ensemble.state_dict(), state={"data": signature.as_dict()})
    for left in out.glob(f"{ASIDE}final-*"):  # left by a killed process
        shutil.rmtree(left, ignore_errors=True)
