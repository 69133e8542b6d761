"""Exports a trained run, with its data description, evaluation and card."""

from collections.abc import Callable
from pathlib import Path

import torch

from redefense.config import settings_of
from redefense.data import Dataset, train_validation
from redefense.data.dataset import stratified_order
from redefense.ensembles.configs import ENSEMBLES
from redefense.errors import ConfigError, DataError
from redefense.export.quantise import Int8
from redefense.export.signing import sign_with
from redefense.export.write import PROBES, About, export, synthetic
from redefense.limits import one_of
from redefense.report.card import card, unmeasured_card
from redefense.rng import stream
from redefense.runtime.device import computing
from redefense.runtime.folders import evaluation_files
from redefense.threat import Threat
from redefense.train.checkpoint import Checkpoint
from redefense.train.loading import Signature, data_of, find_final, load_checkpoint, not_of, resolve

CALIBRATION = 512
_EIGHT_BIT = (
    " The members of this bundle are 8-bit. With rounded weights and activations their predictions "
    "differ from those of the run they were made from, so its figures do not apply to them."
)


@computing()
def export_run(
    path: Path,
    out: Path,
    *,
    data: str | None = None,
    precision: str = "fp32",
    calibration: int | None = None,
    license_name: str = "mit",
    sign: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the bundle of the run (or checkpoint) at `path` to `out`.

    Probes are images of the validation split. If the run's data are not available an fp32 bundle
    gets synthetic ones; an 8-bit bundle is refused. The test split is never used.

    Args:
        path: a run directory.
        out: a folder that does not exist, or is empty.
        data: data specification; the run's by default.
        precision: "fp32" or "int8".
        calibration: for "int8", number of training images for the ranges of activations, 512 by
            default; with 0 ranges are computed per batch, so that logits depend on the rest of the
            batch.
        license_name: licence of the weights, as an SPDX identifier.
        sign: a PEM file with the Ed25519 private key that signs the bundle.
        log: called with lines on what was measured.

    Raises:
        CheckpointError: if `path` is not trained, or damaged.
        ConfigError: if a setting, the key or `out` does not fit, or members cannot be exported.
        DataError: if needed data cannot be read or are not those of the run; if there is no key.
    """
    one_of("--precision", precision, ("fp32", "int8"))
    if calibration is not None and precision != "int8":
        raise ConfigError("--calibration goes with --precision int8")
    # first: an unsuitable key is refused before anything is measured
    signature_by = None if sign is None else sign_with(sign)
    checkpoint = find_final(path)
    run, kind, _ = resolve(checkpoint.run)
    ensemble, signature = load_checkpoint(checkpoint), Signature.stored(checkpoint.state)
    # data that the user names, or that calibration uses, must be readable
    dataset = _dataset(checkpoint, data, needed=data is not None or precision == "int8", log=log)
    probes, int8 = synthetic(signature.shape), None
    if dataset is not None:
        train, validation, _ = train_validation(dataset, run.data.validation)
        real = validation.float(torch.arange(min(PROBES, len(validation))))
        # a small validation split is filled up with synthetic images
        probes = torch.cat([real, probes[len(real) :]])
        count = min(CALIBRATION, len(train)) if calibration is None else calibration
        if count > len(train):
            raise ConfigError(f"--calibration must be at most {len(train)}, got {count}")
        # every prefix of this order is stratified
        order = stratified_order(train.labels, stream(0, "calibration"))[:count]
        chosen = train.float(order) if count else None
        int8 = Int8(calibration=chosen, validation=validation) if precision == "int8" else None
    about = About(
        shape=signature.shape,
        classes=signature.classes,
        data=signature.name,
        threat=Threat(norm=float(run.threat.norm), eps=run.threat.eps),
        # others cannot build networks that were given as objects or by a plug-in
        settings=None
        if any(name.startswith("models.") for name in run.plugins)
        else settings_of(ENSEMBLES, kind),
        card=lambda name: _card(path, name, checkpoint, license_name, precision),
    )
    return export(ensemble, out, about, probes=probes, int8=int8, sign=signature_by)


def _dataset(
    checkpoint: Checkpoint, data: str | None, *, needed: bool, log: Callable[[str], None]
) -> Dataset | None:
    """The run's data, or None where they are not needed and not available."""
    try:
        found, own = data_of(checkpoint, data or checkpoint.run.data.spec)
    except DataError as error:
        if needed:
            raise
        log(f"probes are synthetic, since the run's data are not available: {error}")
        return None
    if not own:
        raise not_of(checkpoint, data)
    return found


def _card(path: Path, name: str, checkpoint: Checkpoint, license_name: str, precision: str) -> str:
    """The card with the run's evaluations; without figures if none is of these members."""
    run = checkpoint.run
    # hidden files are incomplete ones, see `runtime.files.UNFINISHED`
    if precision == "fp32" and any(evaluation_files(path)):
        text = card(path, license_name=license_name, name=name)
    else:
        text = unmeasured_card(
            name,
            data=Signature.stored(checkpoint.state).name,
            num_members=int(run.ensemble["num_members"]),
            model=str(run.ensemble["model"]),
            method=str(run.defence["name"]),
            license_name=license_name,
            why=_EIGHT_BIT if precision == "int8" else "",
        )
    return f"{text}\n{_DEPLOYED}"


_DEPLOYED = """## On a device

`run.py` needs Python, numpy and onnxruntime (and pillow to read pictures), neither torch nor
redefense. A member is drawn for every image, from the operating system's entropy.

    python run.py IMAGE...
    python run.py --check        # compare all members with their recorded outputs
    redefense verify BUNDLE      # the same and more, where redefense is installed
"""
