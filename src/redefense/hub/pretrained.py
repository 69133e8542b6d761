"""Ensembles in the model hub layout: `config.json`, `model.safetensors` and a card, no pickle.

huggingface_hub is needed only to access a hub. No code is executed on loading: names in
`config.json` resolve through this package's mappings, weights are safetensors, and every tensor
must fit the ensemble that the configuration describes.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

import redefense
from redefense.config import Run, parse_run
from redefense.ensembles import Ensemble, Origin
from redefense.errors import (
    BAD_JSON,
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    need,
    one_line,
)
from redefense.hub.published import from_file
from redefense.report.card import card, unmeasured_card
from redefense.runtime.files import write_bytes, write_json, write_text
from redefense.runtime.folders import evaluation_files
from redefense.train.api import TrainedRun
from redefense.train.checkpoint import Checkpoint
from redefense.train.loading import checked_path, find_final, load_checkpoint

FORMAT: Final = "redefense-ensemble"
SCHEMA: Final = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def save_pretrained(
    ensemble: Ensemble | TrainedRun,
    folder: str | Path,
    *,
    license_name: str = "mit",
    name: str | None = None,
) -> Path:
    """Write `config.json`, `model.safetensors` and the model card `README.md` into a folder.

    The card quotes the evaluations of the run that the ensemble was loaded from if its weights are
    unchanged; else it has no figures. Local paths are omitted.

    Args:
        ensemble: a result of `load`, `from_pretrained` or `train`.
        folder: created if missing; files of the same names are replaced.
        license_name: licence of the weights, as an SPDX identifier.
        name: name in the card; the folder's by default.

    Returns:
        The folder.

    Raises:
        InputError: for an ensemble of networks that redefense did not build.
        ConfigError: if the licence is not a plain identifier.
        WriteError: if a file cannot be written.
    """
    ensemble = _of_run(ensemble)
    origin = _origin(ensemble)
    target = Path(folder)
    weights = {
        # safetensors refuses tensors that share memory or are not contiguous
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in ensemble.state_dict().items()
    }
    text = _card(origin, weights, name or target.resolve().name, license_name)
    config = {
        "schema": SCHEMA,
        "format": FORMAT,
        "library_name": "redefense",
        "version": redefense.__version__,
        "num_members": ensemble.num_members,
        "run": without_paths(origin.run).model_dump(mode="json"),
        "data": dict(origin.data),
    }
    # the metadata that loaders of torch weights expect on the hub
    write_bytes(target / WEIGHTS, save(weights, metadata={"format": "pt"}))
    write_json(target / CONFIG, config)
    write_text(target / CARD, text)
    return target


def from_pretrained(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    model: str | Mapping[str, Any] | None = None,
    num_classes: int = 10,
    shape: tuple[int, int, int] = (3, 32, 32),
) -> Ensemble:
    """The ensemble of a folder, a hub's repository `owner/name`, or a file of published weights.

    It is in evaluation mode.

    Args:
        name_or_folder: an existing folder takes precedence over a repository of the same name; or,
            with `model`, a file that `models.published` can read.
        revision: commit, tag or branch of a repository; pin a commit for reproducibility.
        device: torch device.
        model: of a file: a model's name, or settings such as {"model": "resnet20",
            "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.201]}. A normalisation that
            the file states replaces that of the settings.
        num_classes: of a file: number of logits.
        shape: of a file: channels, height and width of the images.

    Warns:
        UserWarning: if a file has tensors that are not used, or states no normalisation of images
            and none is given.

    Raises:
        CheckpointError: if a file is missing, damaged, of another format or does not fit.
        ConfigError: for a file without `model`, a folder with `revision`, an unknown model or an
            unavailable device, and if a repository is named and huggingface_hub is not installed.
        DataError: if the hub cannot be reached or has no such repository; or if a file cannot be
            read, would execute code, or does not hold all tensors of the model.
        InputError: if the folder is not a path.
    """
    folder = checked_path(name_or_folder)
    if model is not None:
        return from_file(folder, model, num_classes=num_classes, shape=shape, device=device)
    if folder.is_file():
        raise ConfigError(
            f"{folder} is a file: name the model of its weights, as in model='resnet20'"
        )
    if not folder.is_dir():
        folder = _fetch(str(name_or_folder), revision)
    elif revision is not None:
        raise ConfigError(f"{folder} is a folder of this machine and has no revision {revision!r}")
    run, data = _read_config(folder / CONFIG)
    weights = _read_weights(folder / WEIGHTS)
    try:
        if run.ensemble.get("num_members", 0) > len(weights):
            # checked before memory is allocated
            raise CheckpointError(f"{folder / CONFIG} has more members than there are tensors")
        checkpoint = Checkpoint(folder, run, weights, {}, {"data": data})
        return load_checkpoint(checkpoint, device=device)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} describes no ensemble: {one_line(error)[:200]}"
        ) from None


def push_to_hub(
    ensemble: Ensemble | TrainedRun,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload an ensemble of redefense",
    license_name: str = "mit",
) -> str:
    """Save the ensemble and upload it to a hub's repository, which is created if missing.

    Args:
        ensemble: as for `save_pretrained`.
        repo_id: `owner/name`.
        private: whether a new repository is private.
        revision: branch to upload to; the default one unless given.
        token: access token; the one stored by the hub's client by default.
        message: commit message.
        license_name: licence of the weights, as an SPDX identifier.

    Returns:
        The URL of the upload.

    Raises:
        ConfigError: if huggingface_hub is not installed.
        DataError: if the hub rejects the upload or cannot be reached.
        InputError: for an ensemble of networks that redefense did not build.
    """
    hub = _client()
    # refused before a repository is created
    ensemble = _of_run(ensemble)
    _origin(ensemble)
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_pretrained(
            ensemble, Path(scratch) / "upload", license_name=license_name, name=repo_id
        )
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message
            )
        except (OSError, ValueError) as error:  # base classes of the client's errors
            raise DataError(f"cannot upload to {repo_id}: {one_line(error)[:200]}") from None
    return str(getattr(done, "commit_url", done))


def _of_run(ensemble: Ensemble | TrainedRun) -> Ensemble:
    return ensemble.ensemble if isinstance(ensemble, TrainedRun) else ensemble


def _origin(ensemble: Ensemble) -> Origin:
    if not isinstance(ensemble, Ensemble) or ensemble.origin is None:
        raise InputError(
            "only an ensemble that redefense built (by train, load or from_pretrained) can be "
            f"described in {CONFIG}; this {type(ensemble).__name__} was put together by hand"
        )
    return ensemble.origin


def without_paths(run: Run) -> Run:
    """The public part of the data specification, without local paths."""
    spec = run.data.spec.partition(":")[0]
    update: dict[str, Any] = {"data": run.data.model_copy(update={"spec": spec})}
    if run.start is not None:
        update["start"] = run.start.model_copy(update={"path": Path(run.start.path).name})
    return run.model_copy(update=update)


def _card(origin: Origin, weights: Mapping[str, Tensor], name: str, license_name: str) -> str:
    run, folder = origin.run, origin.path
    # hidden files are incomplete ones, or those of a file manager
    measured = any(evaluation_files(folder))
    if measured and _same(weights, find_final(folder).weights):
        return card(folder, license_name=license_name, opened_by="from_pretrained", name=name)
    if all((folder / file).is_file() for file in (CARD, WEIGHTS)) and _same(
        weights, _read_weights(folder / WEIGHTS)
    ):
        # a downloaded ensemble is saved with its known origin
        return (folder / CARD).read_text(encoding="utf-8")
    return unmeasured_card(
        name,
        data=str(origin.data["name"]),
        num_members=int(run.ensemble["num_members"]),
        model=str(run.ensemble["model"]),
        method=str(run.defence["name"]),
        license_name=license_name,
        opened_by="from_pretrained",
    )


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether the figures of `other` may be quoted for `one`."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _read_config(path: Path) -> tuple[Run, dict[str, Any]]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {CONFIG}") from None
    except BAD_JSON as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a {FORMAT}")
    if config.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {config.get('schema')!r}, this version reads {SCHEMA}"
        )
    data = config.get("data")
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} does not state the data that it was made for")
    try:
        return parse_run(config.get("run"), str(path)), data
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} holds no {WEIGHTS}; weights in any other format are not read"
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    for key, tensor in weights.items():
        # a damaged file: training stops before it writes such weights
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path} holds non-finite numbers in {key}")
    return weights


def _fetch(repo_id: str, revision: str | None) -> Path:
    # no `owner/name`: a folder was meant, and no server is contacted for it
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {repo_id}")
    hub = _client(f"{repo_id} is no folder here; ")
    try:
        return Path(
            # nothing else of a repository is read, pickles in particular
            hub.snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG, WEIGHTS])
        )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot fetch {repo_id} from the hub: {one_line(error)[:200]}") from None


def _client(why: str = "") -> Any:
    return need("huggingface_hub", f"{why}reaching a hub", extra="hub")
