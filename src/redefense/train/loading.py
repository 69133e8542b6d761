"""Resolves the settings of a run, and loads the ensemble of a finished run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redefense.config import Run, choose, settings_of, to_json
from redefense.data import Dataset, Split, load_dataset
from redefense.data.loader import Loader
from redefense.defences import DEFENCES, Defence
from redefense.ensembles import Ensemble, Independent, Origin, channels_last
from redefense.ensembles.configs import ENSEMBLES, EnsembleConfig, HyperConfig
from redefense.ensembles.guards import modes_kept
from redefense.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    ModelError,
    one_line,
)
from redefense.plugins import check_known, origins
from redefense.rng import seeded
from redefense.runtime.device import check_device
from redefense.runtime.files import write_text
from redefense.runtime.folders import CHECKPOINTS, FINAL, MANIFEST, RUN
from redefense.train.checkpoint import Checkpoint, read, save


@dataclass(frozen=True, slots=True)
class Signature:
    """Description of the training data, stored with the weights.

    Attributes:
        name: of the data set.
        classes: their names, in the order of the labels.
        shape: channels, height, width.
        checksum: SHA-256 of the data set's content.
        images: number of training images, with those held out; None in runs of older versions.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    checksum: str
    images: int | None = None

    @classmethod
    def of(cls, dataset: Dataset) -> "Signature":
        return cls(
            dataset.name, dataset.classes, dataset.shape, dataset.checksum(), len(dataset.train)
        )

    @classmethod
    def stored(cls, state: Mapping[str, Any]) -> "Signature":
        data = state["data"]
        return cls(
            data["name"], tuple(data["classes"]), tuple(data["shape"]), data["checksum"],
            data.get("images"),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "classes": list(self.classes),
            "shape": list(self.shape),
            "checksum": self.checksum,
            "images": self.images,
        }


def resolve(run: Run) -> tuple[Run, EnsembleConfig, Defence]:
    """Resolve all names and fill in every default.

    Raises:
        ConfigError: for an unknown name or setting, or a value of the wrong type.
    """
    # a run can be loaded without its recipe, and evaluated on other data
    check_known({k: v for k, v in run.plugins.items() if k.split(".")[0] in ("models", "defences")})
    kind = choose(ENSEMBLES, run.ensemble, "ensemble")
    defence = choose(DEFENCES, run.defence, "defence")
    named = (
        ("recipes", run.recipe), ("datasets", run.data.spec.partition(":")[0]),
        ("models", kind.plain().model), ("defences", str(run.defence["name"])),
    )  # fmt: skip
    filled = run.model_copy(
        update={
            "ensemble": settings_of(ENSEMBLES, kind),
            "defence": settings_of(DEFENCES, defence),
            "plugins": origins(named),
        }
    )
    return filled, kind, defence


def load(path: str | Path, *, device: str = "cpu") -> Ensemble:
    """The trained ensemble of a run directory (or of one checkpoint folder), in evaluation mode.

    Raises:
        CheckpointError: if there is none, or it is damaged or does not fit its run.
    """
    return load_checkpoint(find_final(Path(path)), device=device)


def checked_path(path: object) -> Path:
    """A user's path.

    Raises:
        InputError: if it is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"expected the path of a folder, got {path!r}")
    return Path(path)


def find_final(path: Path) -> Checkpoint:
    """The final checkpoint of a run directory, or the checkpoint at `path` itself.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    folder = path / FINAL if (path / FINAL).is_dir() else path
    if (folder / "config.json").is_file():  # checkpoints have no such file
        raise CheckpointError(
            f"{path} is a bundle or a folder for a model hub, not a run: give the directory of the "
            "run that it was made from"
        )
    if not (folder / MANIFEST).is_file():
        if (path / CHECKPOINTS).is_dir():
            raise CheckpointError(f"{path} is not fully trained; continue with train --resume")
        raise CheckpointError(
            f"there is no trained run at {path}: train one with redefense train RECIPE --out {path}"
        )
    return read(folder)


def load_checkpoint(checkpoint: Checkpoint, *, device: str = "cpu") -> Ensemble:
    """The ensemble of a checkpoint, in evaluation mode."""
    _, kind, _ = resolve(checkpoint.run)
    ensemble = fresh(kind, Signature.stored(checkpoint.state), checkpoint.run.seed, device)
    load_weights(ensemble, checkpoint)
    ensemble.origin = Origin(checkpoint.run, checkpoint.state["data"], checkpoint.run_dir)
    return channels_last(ensemble).eval()


def fresh(kind: EnsembleConfig, signature: Signature, seed: int, device: str) -> Ensemble:
    """An untrained ensemble for such data.

    Raises:
        ConfigError: if the device is not available, or the ensemble does not fit the data.
    """
    ensemble = kind.build(num_classes=len(signature.classes), shape=signature.shape, seed=seed)
    ensemble.shape = signature.shape
    return ensemble.to(check_device(device))


def loader_of(run: Run, split: Split, device: str, *, rank: int = 0, world_size: int = 1) -> Loader:
    """The batches of a run, or the share of one of several processes."""
    return Loader(
        split, batch_size=run.batch_size, seed=run.seed, augment=run.data.augment,
        cutout=run.data.cutout, limit=run.data.images, device=device,
        rank=rank, world_size=world_size,
    )  # fmt: skip


def check_members(ensemble: Ensemble, images: Split, num_classes: int, device: str) -> None:
    """Check that members can be trained and give logits of the data's classes.

    Raises:
        ModelError: naming the member and what is wrong with it.
    """
    if not any(p.requires_grad for p in ensemble.parameters()):
        raise ModelError("the members have no parameter that requires a gradient: unfreeze them")
    # two, so that a network that ignores the batch axis is found
    x = images.float(torch.arange(min(2, len(images)))).to(device)
    # seeded and in evaluation mode: this pass must not change the training
    with modes_kept(ensemble), seeded(0, device), torch.no_grad():
        ensemble.eval()
        found = [ensemble.logits_of(m, x).shape[1] for m in range(ensemble.num_members)]
    for m, classes in enumerate(found):
        if classes < num_classes or classes != found[0]:
            raise ModelError(
                f"member {m} has outputs for {classes} classes, the data have {num_classes} and "
                f"member 0 has {found[0]}: all members need the same number, at least the data's"
            )


def load_weights(ensemble: nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint into the ensemble.

    Raises:
        CheckpointError: if they do not fit.
    """
    try:
        ensemble.load_state_dict(dict(checkpoint.weights))
    except RuntimeError as error:
        # torch's message names every weight that does not fit
        first = one_line(error)[:300]
        raise CheckpointError(f"{checkpoint.path} does not fit its run: {first}") from None


def input_check(dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Check that data fit the ensemble of a checkpoint.

    Raises:
        DataError: naming what differs.
    """
    signature = Signature.stored(checkpoint.state)
    if dataset.shape != signature.shape or len(dataset.classes) != len(signature.classes):
        raise DataError(
            f"the run was trained on {len(signature.classes)} classes of {signature.shape} images, "
            f"the data has {len(dataset.classes)} of {dataset.shape}"
        )


def as_in_training(dataset: Dataset, signature: Signature) -> Dataset:
    """The data set under the name that it had in training, which names its validation split.

    Unchanged if it is another one. A file may have been renamed, or have another format.
    """
    if dataset.checksum() != signature.checksum:
        return dataset
    return replace(dataset, name=signature.name, known_checksum=signature.checksum)


def data_of(checkpoint: Checkpoint, given: str | None = None) -> tuple[Dataset, bool]:
    """The data of a run, or those of another specification, and whether they are the run's own.

    Raises:
        DataError: if they cannot be read, or none are given and the run's own have changed.
    """
    spec = given or checkpoint.run.data.spec
    signature = Signature.stored(checkpoint.state)
    dataset = as_in_training(load_dataset(spec), signature)
    own = dataset.checksum() == signature.checksum
    if not own and given is None:
        raise not_of(checkpoint)
    return dataset, own


def not_of(checkpoint: Checkpoint, given: str | None = None) -> DataError:
    """The error for data that are not those of a run."""
    spec = given or checkpoint.run.data.spec
    return DataError(
        f"{spec} is not the data that {checkpoint.run_dir} was trained on: give them with --data"
    )


def materialise(path: Path, out: Path) -> None:
    """Write a finished run `out` of independent members that compute the same as those of `path`.

    Evaluations are not copied: they belong to the original run.

    Raises:
        ConfigError: if the members of `path` are plain already, or `out` exists.
        CheckpointError: if there is no trained run at `path`.
        WriteError: if `out` cannot be written.
    """
    checkpoint = find_final(path)
    run, kind, _ = resolve(checkpoint.run)
    if not isinstance(kind, HyperConfig):
        raise ConfigError(f"the members of {path} are plain networks already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; choose another --out")
    written = load_checkpoint(checkpoint)
    plain = Independent([written.member(m) for m in range(written.num_members)], written.mixture)
    run = run.model_copy(update={"ensemble": settings_of(ENSEMBLES, kind.plain())})
    write_text(out / RUN, to_json(run))
    state = {"data": checkpoint.state["data"]}
    save(out / FINAL, run=run, weights=plain.state_dict(), state=state)
