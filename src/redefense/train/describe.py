"""Sizes of an ensemble: parameters by part, on disk and in memory."""

from pathlib import Path
from typing import Any

from torch import nn

from redefense.config import Run
from redefense.data import published
from redefense.ensembles import Ensemble, Hyper
from redefense.ensembles.configs import EnsembleConfig
from redefense.errors import ConfigError
from redefense.train.checkpoint import Checkpoint
from redefense.train.loading import Signature, find_final


def known_images(what: str, run: Run) -> tuple[Checkpoint | None, int, tuple[int, int, int]]:
    """The checkpoint of a run directory, if it is one, and classes and shape of the images.

    Raises:
        ConfigError: for data of unknown shape, before a run is trained on it.
    """
    if Path(what).is_dir():
        checkpoint = find_final(Path(what))
        signature = Signature.stored(checkpoint.state)
        return checkpoint, len(signature.classes), signature.shape
    if (known := published(run.data.spec)) is not None:
        return None, known.num_classes, known.shape
    family = run.data.spec.partition(":")[0]
    raise ConfigError(f"the shape of {family} data is known once a run is trained: give its DIR")


def count_parameters(what: str, run: Run, kind: EnsembleConfig) -> dict[str, Any]:
    """Sizes of the ensemble of a run directory, or of a recipe or record not yet trained.

    Returns:
        Numbers of parameters, *stored* (trained and saved) and *written* (computed from those by a
        hypernetwork); the share `saved` against plain members; bytes of the weights' file (of
        its tensors, if there is none yet) and, in single precision, in memory. `parts` are those
        of member 0; with a shared hypernetwork each member's parameters count it.

    Raises:
        ConfigError: for data of unknown shape, before a run is trained on it.
    """
    checkpoint, num_classes, shape = known_images(what, run)
    ensemble = kind.build(num_classes=num_classes, shape=shape, seed=0)
    sizes = _sizes(ensemble)
    if checkpoint is not None:
        sizes["bytes on disk"] = (checkpoint.path / "weights.safetensors").stat().st_size
    return sizes


def _sizes(ensemble: Ensemble) -> dict[str, Any]:
    everyone = range(ensemble.num_members)
    written = [num_written(ensemble, m) for m in everyone]
    # all but the kernels that are written, embeddings and hypernetworks is in plain members too
    common = sum(p.numel() for n, p in ensemble.named_parameters() if n.startswith("members."))
    stored = sum(p.numel() for p in ensemble.parameters())
    state = sum(t.numel() * t.element_size() for t in ensemble.state_dict().values())
    plain = common + sum(written)
    sizes: dict[str, Any] = {
        "members": ensemble.num_members,
        "parameters": stored,
        "parameters of a member": sum(p.numel() for p in ensemble.parameters_of(0)),
        "written": sum(written),
        "written for a member": written[0],
    }
    if isinstance(ensemble, Hyper):
        sizes["units of a member"] = sum(grid.num_units for grid in ensemble.grids[0])
    return {
        **sizes,
        "parameters of plain members": plain,
        "saved": round(1 - stored / plain, 6),
        "bytes on disk": state,
        "bytes on disk of plain members": state + 4 * (plain - stored),
        "bytes in memory, all members written": state + 4 * sum(written),
        "bytes in memory, one member written": state + 4 * max(written),
        "parts": _parts(ensemble),
    }


def num_written(ensemble: Ensemble, m: int) -> int:
    """Numbers of member m's kernels that a hypernetwork writes; none in plain members."""
    if not isinstance(ensemble, Hyper):
        return 0
    return sum(grid.num_weights(ensemble.unit) for grid in ensemble.grids[m])


def _parts(ensemble: Ensemble) -> dict[str, dict[str, int]]:
    """Stored and written parameters of member 0 by part."""
    net = ensemble.get_submodule("members.0")
    stored: dict[str, int] = {}
    convolutions = 0
    for module in net.modules():
        count = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.Conv2d):
            part = "convolutions" if convolutions else "stem"
            convolutions += 1
        elif isinstance(module, nn.BatchNorm2d):
            part = "batch norm"
        else:
            part = "other layers"
        if count:
            stored[part] = stored.get(part, 0) + count
    written = num_written(ensemble, 0)
    parts = {name: {"stored": count, "written": 0} for name, count in stored.items()}
    if isinstance(ensemble, Hyper):
        parts.setdefault("convolutions", {"stored": 0})["written"] = written
        embeddings = ensemble.embeddings[0].numel()
        writer = sum(p.numel() for p in ensemble.writers[0].parameters())
        parts["embeddings"] = {"stored": embeddings, "written": 0}
        parts["hypernetwork"] = {"stored": writer, "written": 0}
    return parts
