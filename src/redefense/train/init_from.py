"""Initialises a run from the members of another: copied, or fitted to hypernetworks."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from redefense.config import StartConfig
from redefense.defences import Stage
from redefense.ensembles import Ensemble, Hyper, Independent, evaluating
from redefense.ensembles.configs import EnsembleConfig, HyperConfig, IndependentConfig
from redefense.errors import ConfigError, DataError, first_of
from redefense.models import fitting, hyper
from redefense.models.layers import Normalise
from redefense.models.published import Fitted, State, fit, read_states
from redefense.runtime.files import sha256_of
from redefense.train.checkpoint import Checkpoint
from redefense.train.loading import find_final, load_checkpoint, resolve
from redefense.types import Batch

MOMENT_IMAGES = 2048


@dataclass(frozen=True, slots=True)
class Source:
    """The initial weights of a run.

    Attributes:
        path: as given.
        sha256: checksum of the weights.
        networks: builds the networks, from the configuration of the new ensemble and an untrained
            one; of a file also returns unmatched names, `fresh` and `unused`, and the
            `normalisation` of the images with its origin, "file" or "settings".
    """

    path: Path
    sha256: str
    networks: Callable[[EnsembleConfig, Ensemble], tuple[list[nn.Module], dict[str, Any]]]


def open_source(path: Path, device: str = "cpu") -> Source:
    """A finished run, or a file of weights.

    Raises:
        CheckpointError: if there is no finished run.
        DataError: if the file cannot be read, or would execute code.
    """
    if path.is_file():
        states = read_states(path)
        return Source(path, sha256_of(path), partial(_from_file, path, states))
    checkpoint = find_final(path)
    return Source(path, checkpoint.weights_sha256(), partial(_from_run, checkpoint, device))


def _from_run(
    checkpoint: Checkpoint, device: str, kind: EnsembleConfig, like: Ensemble
) -> tuple[list[nn.Module], dict[str, Any]]:
    model = load_checkpoint(checkpoint, device=device)
    nets = [model.member(m) for m in range(model.num_members)]
    theirs = resolve(checkpoint.run)[1].plain()
    check_alike(theirs, kind.plain(), nets[0], like.member(0), checkpoint.path)
    return nets, {}


def _from_file(
    path: Path, states: Sequence[State], kind: EnsembleConfig, like: Ensemble
) -> tuple[list[nn.Module], dict[str, Any]]:
    nets: list[nn.Module] = []
    fits: list[Fitted] = []
    for m, state in enumerate(states):
        # members in turn: a file of one network starts all of them
        nets.append(copy.deepcopy(like.member(m % like.num_members)))
        fits.append(fit(nets[-1], state))
    # each name once: networks of a file may lack different tensors
    fresh, unused = (
        tuple(dict.fromkeys(name for fitted in fits for name in getattr(fitted, key)))
        for key in ("fresh", "unused")
    )
    if not all(fitted.taken for fitted in fits):
        raise DataError(
            f"nothing in {path} fits a {kind.plain().model}: it holds {', '.join(unused[:5])} ..."
        )
    found: dict[str, Any] = {"fresh": fresh, "unused": unused}
    for layer in (part for part in nets[0].modules() if isinstance(part, Normalise)):
        origin = "file" if fits[0].normalised else "settings"
        values = {"mean": layer.mean.tolist(), "std": layer.std.tolist()}
        found["normalisation"] = {"from": origin, **values}
    return nets, found


def recorded(start: StartConfig, source: Source) -> StartConfig:
    """`start` with the checksum of its weights.

    Raises:
        DataError: if it already names a different checksum.
    """
    if start.sha256 not in (None, source.sha256):
        raise DataError(
            f"{start.path} holds weights {source.sha256[:12]}, not those that this run starts from "
            f"({start.sha256[:12]})"
        )
    return start.model_copy(update={"sha256": source.sha256})


def check_alike(
    there: IndependentConfig,
    here: IndependentConfig,
    net_there: nn.Module,
    net_here: nn.Module,
    source: Path,
) -> None:
    """Check that network, images and classes of the initial members match the run.

    Raises:
        ConfigError: naming what differs.
    """
    theirs, ours = asdict(there), asdict(here)
    for settings in (theirs, ours):
        del settings["width"]  # None may be the same width: shapes are compared
        del settings["num_members"]  # members are used in turn
    shapes = [
        {n: tuple(t.shape) for n, t in net.state_dict().items()} for net in (net_there, net_here)
    ]
    theirs |= shapes[0]
    ours |= shapes[1]
    for name, wanted in ours.items():
        if theirs.get(name) != wanted:
            raise ConfigError(
                f"cannot start from {source}: {name} is {theirs.get(name)} there, the run needs "
                f"{wanted}"
            )


def check_apart(kind: EnsembleConfig, stages: Sequence[Stage]) -> None:
    """Check that no stage trains a part of the members if all share a hypernetwork.

    Raises:
        ConfigError: naming the stage.
    """
    if not (isinstance(kind, HyperConfig) and kind.shared):
        return
    for stage in stages:
        if len(stage.members) < kind.num_members:
            raise ConfigError(
                f"stage {stage.name!r} trains {len(stage.members)} of {kind.num_members} members, "
                "but the hypernetwork that they share would change all: set ensemble.shared=false"
            )


def initialise_from(
    start: StartConfig,
    nets: Sequence[nn.Module],
    ensemble: Ensemble,
    batches: Iterable[Batch],
    judge: Callable[[Ensemble], float],
) -> dict[str, Any]:
    """Initialise an untrained ensemble from plain networks, used cyclically.

    Returns:
        The source, the index of the network that each member starts `from`, each member's
        `kernel_error` (see `adopt`), and the results of `judge` for the networks and the ensemble:
        `validation_accuracy` of `source` and `start`.
    """
    chosen = [m % len(nets) for m in range(ensemble.num_members)]
    errors = adopt(ensemble, [nets[k] for k in chosen])
    # copied kernels have the moments that were copied with them
    if any(errors):
        measure_moments(ensemble, batches)
    return {
        **start.model_dump(),
        "from": chosen,
        "kernel_error": list(errors),
        "validation_accuracy": {"source": judge(Independent(nets)), "start": judge(ensemble)},
    }


def summary_of_start(started: Mapping[str, Any]) -> str:
    """Lines that report the result of `initialise_from` and unmatched names of a file."""
    errors = ", ".join(f"{error:.3f}" for error in started["kernel_error"])
    accuracy = {k: 100 * v for k, v in started["validation_accuracy"].items()}
    lines = [
        f"starting from {started['path']}: relative error of kernels {errors}; "
        "validation accuracy {source:.1f} % there, {start:.1f} % here".format(**accuracy)
    ]
    chosen = started["from"]
    alike = [m for m, k in enumerate(chosen) if chosen.count(k) > 1]
    if alike:
        lines.append(
            f"members {', '.join(map(str, alike))} start alike ({len(set(chosen))} networks for "
            f"{len(chosen)} members): a method that shows them the same examples keeps them so"
        )
    if normalisation := started.get("normalisation"):
        mean, std = (", ".join(f"{v:.4g}" for v in normalisation[key]) for key in ("mean", "std"))
        lines.append(
            f"images are normalised by mean {mean} and deviation {std}, as the file states"
            if normalisation["from"] == "file"
            else f"the file states no normalisation of images: mean {mean} and deviation {std} are "
            "used; if the weights were trained with others, set ensemble.mean and ensemble.std"
        )
    for what, outcome in (("fresh", "stay as initialised"), ("unused", "are not used")):
        if names := started.get(what):
            lines.append(f"{len(names)} tensors {outcome}: {first_of(names, 8)}")
    return "\n".join(lines)


def measure_moments(ensemble: Ensemble, batches: Iterable[Batch]) -> None:
    """Replace batch norm's running moments by those of some 2000 images, equally weighted.

    Activations of fitted kernels have other moments than those of the original ones.
    """
    norms = [c for c in ensemble.modules() if isinstance(c, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then computes the plain average
    seen = 0
    with evaluating(ensemble), torch.no_grad():
        # batch norm updates its running statistics in training mode only
        ensemble.train_members(range(ensemble.num_members))
        for batch in batches:
            ensemble.member_logits(batch.x)
            seen += len(batch.x)
            if seen >= MOMENT_IMAGES:
                break
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def adopt(ensemble: Ensemble, nets: Sequence[nn.Module]) -> tuple[float, ...]:
    """Copy the weights of the plain networks `nets` to the members of `ensemble`.

    Stem, batch norm and classifier are copied; kernels too, or, on a `Hyper`, the hypernetworks and
    embeddings are fitted to them.

    Returns:
        For each member the root mean square over its kernels of |generated - target| / |target|.
    """
    if not isinstance(ensemble, Hyper):
        for m, net in enumerate(nets):
            ensemble.member(m).load_state_dict(net.state_dict())
        return (0.0,) * len(nets)
    wanted = [_kernels(net, grids) for net, grids in zip(nets, ensemble.grids, strict=True)]
    all_members = tuple(range(len(nets)))
    for group in [all_members] if ensemble.shared else [(m,) for m in all_members]:
        _fit(ensemble, group, wanted)
    for member, net in zip(ensemble.members, nets, strict=True):
        # without the kernels, which the hypernetwork writes
        mine = member.state_dict()
        member.load_state_dict({name: t for name, t in net.state_dict().items() if name in mine})
    return tuple(_error(ensemble, m, wanted[m]) for m in all_members)


def _fit(ensemble: Hyper, group: Sequence[int], wanted: Sequence[Sequence[Tensor]]) -> None:
    """Fit one hypernetwork, and the embeddings of its members."""
    targets = [
        fitting.target_of(ensemble.grids[m], wanted[m], ensemble.unit, ensemble.taps) for m in group
    ]
    writer = cast(hyper.Hypernetwork, ensemble.writers[0 if ensemble.shared else group[0]])
    found = fitting.fit(
        fitting.joined(targets), writer.first.in_features, writer.second.in_features
    )
    width, used = found.second.shape[1], found.z.shape[1]
    with torch.no_grad():
        # directions that the kernels do not use retain their random initialisation, times zero
        first = writer.first.weight.unflatten(0, (-1, writer.second.in_features))
        first.zero_()[:, :width, :used] = found.first
        writer.first.bias.view(first.shape[:2]).zero_()[:, :width] = found.first_bias
        writer.second.weight[:, :width] = found.second
        writer.second.bias.copy_(found.second_bias)
        blocks = found.z.split([len(t.units) for t in targets])
        for m, own in zip(group, blocks, strict=True):
            ensemble.embeddings[m][:, :used] = own


def _kernels(net: nn.Module, grids: Sequence[hyper.Grid]) -> tuple[Tensor, ...]:
    return tuple(net.get_parameter(f"{grid.name}.weight").detach() for grid in grids)


def _error(ensemble: Hyper, m: int, wanted: Sequence[Tensor]) -> float:
    net = ensemble.member(m)
    pairs = zip(_kernels(net, ensemble.grids[m]), wanted, strict=True)
    # relative, so that layers of small kernels count as much as others
    shares = [float((a - b).square().sum() / b.square().sum().clamp_min(1e-30)) for a, b in pairs]
    return float((sum(shares) / len(shares)) ** 0.5)
