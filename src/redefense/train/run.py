"""From a `Run` to a trained run directory, and back from a directory to an ensemble."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redefense.config import Run, choose, settings_of, to_json
from redefense.data import Dataset, Split, load_dataset, train_validation
from redefense.data.loader import Loader
from redefense.defences import DEFENCES, Defence, Stage
from redefense.ensembles import Members, Origin, evaluating
from redefense.errors import CheckpointError, ConfigError, DataError, InputError
from redefense.kinds import ENSEMBLES, Kind
from redefense.train.checkpoint import (
    Checkpoint,
    latest,
    optimizer_tensors,
    prune,
    read,
    restore_optimizer,
    save,
    step_folder,
)
from redefense.train.fit import Position, fit
from redefense.train.log import Metrics, ProgressLine, note
from redefense.train.profile import profiled
from redefense.train.warm import begin_from, check_alike, recorded

VALIDATION_IMAGES = 2000


@dataclass(frozen=True, slots=True)
class Signature:
    """What a trained ensemble must know of its data: it is stored with the weights.

    Attributes:
        name: of the data set.
        classes: their names, in the order of the labels.
        shape: channels, height, width.
        checksum: SHA-256 of the data set's content.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    checksum: str

    @classmethod
    def of(cls, dataset: Dataset) -> "Signature":
        return cls(dataset.name, dataset.classes, dataset.shape, dataset.checksum())

    @classmethod
    def stored(cls, state: Mapping[str, Any]) -> "Signature":
        data = state["data"]
        return cls(data["name"], tuple(data["classes"]), tuple(data["shape"]), data["checksum"])

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "classes": list(self.classes),
            "shape": list(self.shape),
            "checksum": self.checksum,
        }


def resolve(run: Run) -> tuple[Run, Kind, Defence]:
    """Look up all names and fill in every default.

    Raises:
        ConfigError: for an unknown name or setting, or a value of the wrong type.
    """
    kind = choose(ENSEMBLES, run.ensemble, "ensemble")
    defence = choose(DEFENCES, run.defence, "defence")
    filled = run.model_copy(
        update={
            "ensemble": settings_of(ENSEMBLES, kind),
            "defence": settings_of(DEFENCES, defence),
        }
    )
    return filled, kind, defence


def train(
    run: Run,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    quiet: bool = False,
    download: bool = False,
    profile: bool = False,
) -> Members:
    """Train `run` into the directory `out` and return the ensemble in evaluation mode.

    The test split is never read. With `resume`, a run that was stopped goes on from its last sound
    checkpoint to the same bits; a finished one is returned as it is. With `profile`, the seconds of
    each phase are printed at the end and kept in `out/profile.json`.

    Raises:
        ConfigError: for a wrong setting, an `out` that holds a run already (without `resume`), or
            another run than the one to be resumed.
        DataError: if the data cannot be read.
        TrainingError: if the loss is not finite or a parameter gets no gradient.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    run, kind, defence = resolve(run)
    run = _with_start(run)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("training runs in one process; torchrun would write one run many times")
    stages = defence.stages(kind.num_members, run.epochs)
    check_device(device)
    begun = _claim(run, out, resume)
    if (out / "final").is_dir():
        note(f"{out} is finished; nothing to do")
        return load(out, device=device)
    dataset = load_dataset(run.data.spec, download=download, progress=not quiet)
    signature = Signature.of(dataset)
    train_split, validation, _ = train_validation(dataset, run.data.validation)
    loader = Loader(
        train_split,
        batch_size=run.batch_size,
        seed=run.seed,
        augment=run.data.augment,
        limit=run.data.images,
        device=device,
    )
    ensemble = _fresh(kind, signature, run.seed, device)
    channels_last(ensemble)
    checkpoint = latest(out / "checkpoints", note) if begun else None
    position, totals = Position(), {}
    if checkpoint is not None:
        if checkpoint.state["data"]["checksum"] != signature.checksum:
            raise DataError(f"{run.data.spec} is not the data that {out} was trained on")
        _load_weights(ensemble, checkpoint)
        position = Position(**checkpoint.state["position"])
        totals = checkpoint.state["totals"]
        note(f"going on from {checkpoint.path.name}")
    else:
        started = _start(run, kind, ensemble, signature, loader, validation)
        if not begun:
            _begin(run, out)
        if started is not None:
            (out / "start.json").write_text(json.dumps(started, indent=1) + "\n")
    session = _Session(run, out, stages, ensemble, loader, validation, signature, position, quiet)
    with profiled(out, device) if profile else contextlib.nullcontext():
        session.fit(checkpoint, totals)
    _finish(run, out, ensemble, signature)
    ensemble.origin = Origin(run, signature.as_dict(), out)
    return ensemble.eval()


def _with_start(run: Run) -> Run:
    """The run with the checksum of the weights it starts from, if it names any."""
    if run.start is None or run.start.sha256 is not None:
        return run
    return run.model_copy(update={"start": recorded(run.start, find_final(Path(run.start.path)))})


def _start(
    run: Run,
    kind: Kind,
    ensemble: Members,
    signature: Signature,
    loader: Loader,
    validation: Split,
) -> dict[str, Any] | None:
    """Let a new run begin from the members it names, and tell how near it comes to them."""
    if run.start is None:
        return None
    source = find_final(Path(run.start.path))
    recorded(run.start, source)
    model = load_checkpoint(source, device=loader.device.type)
    nets = [model.member(m) for m in range(model.num_members)]
    shape, num_classes = signature.shape, len(signature.classes)
    like = kind.plain().build(num_classes=num_classes, shape=shape, seed=0)
    check_alike(resolve(source.run)[1].plain(), kind.plain(), nets[0], like.member(0), source.path)
    return begin_from(
        run.start, nets, ensemble, loader, lambda it: accuracy(it, validation, run.batch_size)
    )


@dataclass(slots=True)
class _Session:
    """What the loop's callbacks share: where to save, log and show progress."""

    run: Run
    out: Path
    stages: tuple[Stage, ...]
    ensemble: Members
    loader: Loader
    validation: Split
    signature: Signature
    start: Position
    quiet: bool

    def fit(self, checkpoint: Checkpoint | None, totals: dict[str, float]) -> None:
        """Run the loop from the checkpoint, or from the beginning."""
        names = {p: name for name, p in self.ensemble.named_parameters()}
        stored = checkpoint.optimizer if checkpoint is not None else {}
        steps = len(self.loader) * sum(stage.epochs for stage in self.stages)
        # within an epoch, even after its last step, that epoch's record is still to be written
        metrics = Metrics(self.out, resume_step=self.start.total - bool(self.start.step))
        progress = ProgressLine(self.run.recipe, steps, done=self.start.total, quiet=self.quiet)

        def keep(
            position: Position, optimizer: torch.optim.Optimizer, sums: Mapping[str, float]
        ) -> None:
            save(
                step_folder(self.out / "checkpoints", position.total),
                run=self.run,
                weights=self.ensemble.state_dict(),
                optimizer=optimizer_tensors(optimizer, names),
                state={
                    "position": position.as_dict(),
                    "totals": dict(sums),
                    "data": self.signature.as_dict(),
                },
            )
            prune(self.out / "checkpoints")

        def on_step(position: Position, terms: Mapping[str, float]) -> None:
            progress.update(position.total, f"loss {terms['total']:.3f}")

        def on_epoch(stage: Stage, position: Position, means: Mapping[str, float]) -> None:
            clean = accuracy(self.ensemble, self.validation, self.run.batch_size)
            epoch = position.epoch
            metrics.write(
                position.total,
                {"stage": stage.name, "epoch": epoch, **means, "validation_accuracy": clean},
            )
            if not self.quiet:
                text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
                note(
                    f"{self.run.recipe} {stage.name} epoch {epoch}/{stage.epochs}: {text}  "
                    f"validation accuracy {100 * clean:.1f} %"
                )

        try:
            fit(
                self.ensemble,
                self.stages,
                self.loader,
                optim=self.run.optim,
                seed=self.run.seed,
                precision=self.run.precision,
                start=self.start,
                start_totals=totals,
                restore=lambda optimizer: restore_optimizer(optimizer, stored, names),
                save=keep,
                on_step=on_step,
                on_epoch=on_epoch,
            )
        finally:
            progress.close()
            metrics.close()


def accuracy(ensemble: Members, split: Split, batch_size: int) -> float:
    """Exact expected clean accuracy on the first images of a split (2000 at most)."""
    device = ensemble.mixture.device
    right = torch.zeros((), dtype=torch.float64, device=device)
    count = min(len(split), VALIDATION_IMAGES)
    with torch.no_grad(), evaluating(ensemble):
        for index in torch.arange(count).split(batch_size):
            logits = ensemble.member_logits(split.float(index).to(device))
            hits = logits.argmax(-1) == split.labels[index].to(device)
            right += (ensemble.mixture @ hits.to(ensemble.mixture)).sum()
    return float(right) / count


def check_device(device: str) -> None:
    """Refuse a device that is unknown or not there, before anything is done.

    Raises:
        ConfigError: naming the device.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from None


def load(path: str | Path, *, device: str = "cpu") -> Members:
    """The trained ensemble of a run directory (or of one checkpoint folder), in evaluation mode.

    Raises:
        CheckpointError: if there is none, or it is damaged or does not fit its run.
    """
    return load_checkpoint(find_final(Path(path)), device=device)


def find_final(path: Path) -> Checkpoint:
    """The finished checkpoint of a run directory, or the checkpoint that `path` itself is.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    folder = path / "final" if (path / "final").is_dir() else path
    if not (folder / "manifest.json").is_file():
        if (path / "checkpoints").is_dir():
            raise CheckpointError(f"{path} is not trained to its end; go on with train --resume")
        raise CheckpointError(f"no trained run at {path}")
    return read(folder)


def load_checkpoint(checkpoint: Checkpoint, *, device: str = "cpu") -> Members:
    """The ensemble that a checkpoint holds, in evaluation mode."""
    _, kind, _ = resolve(checkpoint.run)
    ensemble = _fresh(kind, Signature.stored(checkpoint.state), checkpoint.run.seed, device)
    _load_weights(ensemble, checkpoint)
    folder = checkpoint.path.parent if checkpoint.path.name == "final" else checkpoint.path
    ensemble.origin = Origin(checkpoint.run, checkpoint.state["data"], folder)
    return channels_last(ensemble).eval()


def _fresh(kind: Kind, signature: Signature, seed: int, device: str) -> Members:
    ensemble = kind.build(num_classes=len(signature.classes), shape=signature.shape, seed=seed)
    check_device(device)
    return ensemble.to(torch.device(device))


def channels_last(ensemble: Members) -> Members:
    """The memory layout in which convolutions run fastest."""
    return ensemble.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it


def _load_weights(ensemble: nn.Module, checkpoint: Checkpoint) -> None:
    try:
        ensemble.load_state_dict(dict(checkpoint.weights))
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.path} does not fit its run: {first}") from None


def _claim(run: Run, out: Path, resume: bool) -> bool:
    """Whether `out` holds a beginning of this very run; refuses anything else that is there."""
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / "run.json").is_file():
        raise ConfigError(f"{out} exists and holds no run; choose another --out")
    if not resume:
        raise ConfigError(f"{out} already holds a run; use --resume or another --out")
    try:
        stored = json.loads((out / "run.json").read_text())
    except ValueError:
        raise CheckpointError(f"{out}/run.json is damaged; choose another --out") from None
    wanted = json.loads(to_json(run))
    # the same data, or members to start from, may lie elsewhere today: checksums are compared
    for settings in (stored, wanted):
        with contextlib.suppress(KeyError, TypeError):
            del settings["data"]["spec"]
        with contextlib.suppress(KeyError, TypeError):
            settings.setdefault("start", None)
            del settings["start"]["path"]
    if stored != wanted:
        keys = [k for k in wanted if stored.get(k) != wanted[k]]
        raise ConfigError(f"{out} holds another run (it differs in {', '.join(keys)})")
    return True


def _begin(run: Run, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").write_text(to_json(run))
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}") from None


def _finish(run: Run, out: Path, ensemble: Members, signature: Signature) -> None:
    save(
        out / "final",
        run=run,
        weights=ensemble.state_dict(),
        state={"data": signature.as_dict()},
    )
    # a finished run keeps its result; what only a resume needs would triple its size
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def input_check(ensemble: Members, dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Refuse data that the ensemble was not made for.

    Raises:
        InputError: naming what differs.
    """
    signature = Signature.stored(checkpoint.state)
    if dataset.shape != signature.shape or len(dataset.classes) != len(signature.classes):
        raise InputError(
            f"the run was trained on {len(signature.classes)} classes of {signature.shape} images, "
            f"the data has {len(dataset.classes)} of {dataset.shape}"
        )
