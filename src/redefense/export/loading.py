"""Loads an ensemble from a bundle or a run."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redefense.config import choose
from redefense.ensembles import Ensemble, Independent, channels_last
from redefense.ensembles.configs import ENSEMBLES
from redefense.errors import DataError, InputError, need
from redefense.export import runner
from redefense.export.runner import Bundle, BundleError
from redefense.runtime.device import check_device
from redefense.train.loading import checked_path
from redefense.train.loading import load as load_run
from redefense.types import Images, Logits


def load(path: str | PathLike[str], *, device: str = "cpu") -> Ensemble:
    """The ensemble of a run directory, of a checkpoint folder, or of a bundle; in evaluation mode.

    The weights in an fp32 bundle of a run are bit-identical to the run's, so it can be trained,
    attacked and evaluated like the run. The members of an 8-bit bundle, and of networks that
    redefense did not build, run in onnxruntime, as deployed; they have no gradients.

    Raises:
        CheckpointError: if there is no trained run, or it is damaged.
        DataError: if a bundle is damaged or inconsistent.
        ConfigError: if a bundle needs a package that is not installed.
        InputError: if it is not a path.
    """
    folder = checked_path(path)
    # a checkpoint has a manifest, too, but no config.json
    bundle = (folder / "config.json").is_file() and (folder / runner.MANIFEST).is_file()
    return load_bundle(folder, device=device) if bundle else load_run(folder, device=device)


def load_bundle(path: Path, *, device: str = "cpu") -> Ensemble:
    """The ensemble of a bundle; see `load`."""
    check_device(device)
    try:
        bundle = runner.open_bundle(path)
        if bundle.config["precision"] == "fp32" and bundle.config.get("ensemble"):
            ensemble = channels_last(_rebuilt(bundle))
        else:
            need("onnxruntime")
            members = [Deployed(bundle.open(m)) for m in range(bundle.num_members)]
            ensemble = Independent(members, bundle.mixture.tolist())
    except BundleError as error:
        raise DataError(f"{path}: {error}") from None
    ensemble.shape = bundle.shape
    return ensemble.to(torch.device(device)).eval()


class Deployed(nn.Module):
    """A member that runs in onnxruntime, on the CPU. It has no weights and no gradients.

    Args:
        session: a result of `runner.open_session`.
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Images) -> Logits:
        """(B, classes) logits.

        Raises:
            InputError: if a gradient is required.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError(
                "a deployed member has no gradients: evaluate the run that the bundle was made "
                "from, or call an attack that needs none, such as Square"
            )
        logits = runner.logits_of(self.session, x.detach().float().cpu().numpy())
        # onnxruntime's arrays may be read-only, and torch warns of these
        return torch.from_numpy(logits.copy()).to(x)


def _rebuilt(bundle: Bundle) -> Ensemble:
    """The ensemble of the config, with the weights of the bundle."""
    settings = bundle.config["ensemble"]
    # checked before memory is allocated
    if not isinstance(settings, dict) or settings.get("num_members") != bundle.num_members:
        raise BundleError(f"config.json: ensemble must have {bundle.num_members} members")
    try:
        kind = choose(ENSEMBLES, settings, "ensemble")
        # every weight is replaced below, so the seed has no effect
        ensemble = kind.build(num_classes=len(bundle.classes), shape=bundle.shape, seed=0)
    except (TypeError, ValueError) as error:
        raise BundleError(f"config.json: ensemble: {error}") from None
    if bundle.config["kind"] == "compact":
        weights = {name: torch.from_numpy(array) for name, array in bundle.weights().items()}
    else:
        parts = [_weights(bundle.member(m)) for m in range(bundle.num_members)]
        weights = {f"members.{m}.{k}": v for m, part in enumerate(parts) for k, v in part.items()}
    _fill(ensemble, weights)
    ensemble.set_mixture(bundle.mixture.tolist())
    return ensemble


def _weights(model: bytes) -> dict[str, Tensor]:
    """The weights in an ONNX file by name."""
    onnx = need("onnx")
    found = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(model).graph.initializer
    }
    # onnx returns views of read-only bytes
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


def _fill(ensemble: Ensemble, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name; batch norm's counts of batches, which do not affect logits, are reset.

    Raises:
        BundleError: naming a weight that is missing, of another shape, or not finite.
    """
    for name, own in ensemble.state_dict().items():
        if name == "mixture" or not own.is_floating_point():
            continue
        stored = weights.get(name)
        if stored is None or stored.shape != own.shape or not bool(stored.isfinite().all()):
            raise BundleError(f"the weight {name} is missing, of another shape or not finite")
        # `state_dict` gives detached tensors that share the parameters' memory
        own.copy_(stored)
