"""Checkpoints: folders of safetensors and JSON with a manifest of SHA-256. No pickle anywhere.

A checkpoint is written to a temporary folder, flushed to disk and renamed, so a crash or a full
disk does not damage the previous one. An altered or truncated one is reported and the one before it
is used.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from redefense.config import Run, first_fault, parse_run, to_json
from redefense.errors import BAD_JSON, CheckpointError, TrainingError, WriteError
from redefense.runtime.files import is_full, reason, sha256_of
from redefense.runtime.folders import FINAL, MANIFEST, RUN, STATE, WEIGHTS

FORMAT = 1
KEEP = 2  # the last one and, should it be damaged, the one before it
ASIDE, REPLACED = ".saving-", ".replaced-"
"""Prefixes of folders being written and of folders being replaced."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The verified contents of a checkpoint folder.

    Attributes:
        path: the folder.
        run: the resolved run.
        weights: the ensemble's state dict.
        optimizer: optimizer tensors as `KEY/PARAMETER`; empty in `final/`.
        state: position of the training, and the shape of the data.
    """

    path: Path
    run: Run
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def weights_sha256(self) -> str:
        """SHA-256 of the file of weights, as in the manifest, by which claims name them."""
        manifest = json.loads((self.path / MANIFEST).read_text())
        return str(manifest["sha256"][WEIGHTS])

    @property
    def run_dir(self) -> Path:
        """The run directory of a final checkpoint; the folder itself of any other."""
        return self.path.parent if self.path.name == FINAL else self.path


class _Data(BaseModel):
    name: str
    classes: list[str]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    checksum: str
    images: PositiveInt | None = None


class _Position(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stage: NonNegativeInt = 0
    epoch: NonNegativeInt = 0
    step: NonNegativeInt = 0
    total: NonNegativeInt = 0


class _State(BaseModel):
    """What `state.json` must hold; a final checkpoint has no position."""

    data: _Data
    position: _Position | None = None
    totals: dict[str, float] = {}


def save(
    target: Path,
    *,
    run: Run,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    optimizer: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint folder at `target`, replacing an existing one.

    Raises:
        TrainingError: if a number to be saved is not finite, before anything is written.
        WriteError: if it cannot be written; `target` is then unchanged.
    """
    if (name := _non_finite({**weights, **(optimizer or {})})) is not None:
        raise TrainingError(
            f"{name} is not finite any more, and {target} is not written: numbers overflowed "
            f"in training. Train with a lower optim.lr ({run.optim.lr:g} here) or with optim.clip"
        )
    aside = target.parent / f"{ASIDE}{target.name}-{os.getpid()}"
    replaced = target.parent / f"{REPLACED}{target.name}-{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _tensors(aside / WEIGHTS, weights)
        if optimizer is not None:
            _tensors(aside / "optimizer.safetensors", optimizer)
        (aside / RUN).write_text(to_json(run))
        (aside / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1) + "\n")
        files = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"sha256": files}, indent=1) + "\n")
        # on disk before the rename, or a power failure could leave a renamed folder of empty files
        for path in aside.iterdir():
            _flush(path)
        _flush(aside)
        if target.exists():
            # left by a killed process of the same number
            shutil.rmtree(replaced, ignore_errors=True)
            # a folder cannot be renamed onto another one: after a kill between these two renames
            # `latest` restores it
            target.rename(replaced)
            aside.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            aside.rename(target)
        _flush(target.parent)
    except OSError as error:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
        raise WriteError(
            f"cannot write checkpoint {target}: {reason(error)}", full=is_full(error)
        ) from None


def read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        CheckpointError: if a file is missing, truncated, altered or of the wrong format.
    """
    try:
        state, data, weights, optimizer = _read(path)
        _State.model_validate_json(json.dumps(state), strict=True)
        run = parse_run(data, f"{path}/run.json")
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} lacks {Path(error.filename).name}") from None
    except KeyError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: it lacks {error}") from None
    except ValidationError as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: state.json: {first_fault(error)}"
        ) from None
    except (*BAD_JSON, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    if (name := _non_finite(weights)) is not None:
        raise CheckpointError(f"checkpoint {path} holds non-finite numbers in {name}")
    return Checkpoint(path, run, weights, optimizer, state)


def _non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a non-finite number."""
    return next((name for name, value in tensors.items() if not bool(value.isfinite().all())), None)


def _read(path: Path) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    """State, run, weights and optimizer of a folder, with hashes verified."""
    manifest = json.loads((path / MANIFEST).read_text())["sha256"]
    if not {WEIGHTS, RUN, STATE} <= set(manifest):
        raise CheckpointError(f"checkpoint {path} is not complete: {sorted(manifest)}")
    for name, expected in manifest.items():
        # a manifest must not name files elsewhere
        if Path(name).name != name or sha256_of(path / name) != expected:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has another hash")
    state = json.loads((path / STATE).read_text())
    if not 1 <= state["format"] <= FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {state['format']}, not {FORMAT}")
    run = json.loads((path / RUN).read_text())
    stored = path / "optimizer.safetensors"
    optimizer = load_file(stored) if stored.name in manifest else {}
    return state, run, load_file(path / WEIGHTS), optimizer


def latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint of a run's `checkpoints/`; damaged ones are reported and skipped.

    One whose replacement was interrupted between its two renames is restored first.
    """
    for path in folder.glob(f"{REPLACED}step-*"):
        target = folder / path.name.removeprefix(REPLACED).rpartition("-")[0]
        if not target.exists():
            warn(f"checkpoint {target} was being replaced; restored its older version")
            path.rename(target)
    for path in reversed(_stored(folder)):
        try:
            return read(path)
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
    return None


def step_folder(folder: Path, step: int) -> Path:
    """Name of the checkpoint after `step` optimizer steps; names sort by step."""
    return folder / f"step-{step:09d}"


def prune(folder: Path) -> None:
    """Remove all but the last two checkpoints, and remains of interrupted saves."""
    left = [*folder.glob(f"{ASIDE}*"), *folder.glob(f"{REPLACED}*")]
    for path in [*_stored(folder)[:-KEEP], *left]:
        shutil.rmtree(path, ignore_errors=True)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]
) -> dict[str, Tensor]:
    """The optimizer's state as `KEY/PARAMETER` tensors."""
    return {
        f"{key}/{name}": torch.as_tensor(value)
        for p, name in names.items()
        for key, value in optimizer.state.get(p, {}).items()
        if value is not None
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    names: Mapping[torch.nn.Parameter, str],
) -> None:
    """Load the optimizer's state of the given parameters, on their devices, in their formats."""
    by_name = {name: p for p, name in names.items()}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        if (p := by_name.get(name)) is None:  # trained by another process
            continue
        if tensor.ndim:
            # in the memory format of the parameter, which a fused optimizer expects
            value = torch.empty_like(p).copy_(tensor)
        else:  # a step count: a fused optimizer needs it on the parameter's device
            value = tensor.to(p.device if optimizer.defaults.get("fused") else "cpu", copy=True)
        optimizer.state[p][key] = value


def _stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:  # safetensors raises it for a failed write
        raise OSError(str(error)) from None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
