"""Writes the bundle of an ensemble: one ONNX file per member, probes, records, runner, card.

A bundle is written to a temporary folder, every member is compared with torch, and then the folder
is renamed to `out`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import redefense
from redefense.checks.answers import check_batches, check_modes, query_member
from redefense.ensembles import Ensemble, Hyper, Independent
from redefense.errors import ConfigError, InputError
from redefense.export import runner
from redefense.export.compact import write_compact
from redefense.export.graph import check_finite, member_graph, portable
from redefense.export.quantise import Int8, quantised
from redefense.export.rules import graph_faults
from redefense.export.signing import Sign
from redefense.networks import check_values, mode_of, query
from redefense.report.card import unmeasured_card
from redefense.rng import stream
from redefense.runtime.files import write_text, writing
from redefense.stochastic.ensemble import Stochastic
from redefense.threat import Threat
from redefense.types import Images, check_images

PROBES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """Description of the ensemble, stored in the bundle.

    Attributes:
        shape: channels, height and width of an image.
        classes: their names, in the order of the logits.
        data: name of the data set; empty if unknown.
        threat: the threat that the ensemble was trained against, if any.
        settings: settings of the ensemble, as stored by a run, if redefense can build it.
        card: maps the bundle's name to its README; by default one without figures.
    """

    shape: tuple[int, int, int]
    classes: Sequence[str]
    data: str = ""
    threat: Threat | None = None
    settings: dict[str, Any] | None = None
    card: Callable[[str], str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        sizes = list(self.shape)
        if len(sizes) != 3 or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ConfigError(f"shape must be (channels, height, width), got {self.shape!r}")
        if isinstance(self.classes, str) or not all(isinstance(n, str) for n in self.classes):
            raise ConfigError(f"classes must be a list of names, got {self.classes!r}")


def export(
    ensemble: Ensemble,
    out: str | Path,
    about: About,
    *,
    probes: Images | None = None,
    int8: Int8 | None = None,
    sign: Sign | None = None,
) -> Path:
    """Write the bundle `out` of an ensemble of any networks that torch can export.

    Args:
        ensemble: `Independent` members become one file each; `Hyper` ones stay compact. It is not
            changed.
        out: a folder that does not exist, or is empty.
        about: description of the ensemble.
        probes: images whose logits are stored for verification; synthetic ones by default.
        int8: settings of quantisation; fp32 by default.
        sign: computes the signature of the manifest; none by default.

    Returns:
        The bundle's folder.

    Raises:
        ConfigError: if `out` is not empty, or a member cannot be exported, or differs from torch;
            nothing is written then.
        InputError: if probes are no images in [0, 1], or a member does not accept them, is given in
            training mode and differs in evaluation mode, or depends on the other images of a batch.
    """
    if not isinstance(ensemble, Ensemble):
        got = type(ensemble).__name__
        raise InputError(f"export takes an ensemble, such as Independent([network]), got {got}")
    images = synthetic(about.shape) if probes is None else probes
    check_images(images, "probes")
    # as the members are exported
    images = images.float().cpu()
    if tuple(images.shape[1:]) != about.shape:
        raise ConfigError(f"probes must be {about.shape} images, got {tuple(images.shape[1:])}")
    check_values(ensemble)
    if isinstance(ensemble, Stochastic):
        raise ConfigError(
            "a stochastic network cannot be exported: a bundle's members answer every image in one "
            "way, and the draw among them is made outside of the graph; export the network without "
            "its noise, or a list of networks of which one is drawn"
        )
    if int8 is not None and isinstance(ensemble, Hyper):
        raise ConfigError(
            "int8 needs plain members, those of PS-RED are written in fp32: "
            "`redefense materialise` the run first"
        )
    target = Path(out)
    try:
        with writing(target), runner.aside(target) as folder:
            _write(ensemble, folder, about, images, int8, target.name)
            # read back from disk: what is checked are the files that users get
            _check(runner.open_bundle(folder))
            # last, so that only a checked bundle is signed
            if sign is not None:
                signature = sign((folder / runner.MANIFEST).read_bytes())
                (folder / runner.SIGNATURE).write_bytes(signature)
    except runner.BundleError as error:
        raise ConfigError(str(error)) from None
    return target


def _check(bundle: runner.Bundle) -> None:
    """Apply the checks of `verify` to the members.

    Raises:
        ConfigError: naming member and fault.
    """
    for m in range(bundle.num_members):
        if faults := graph_faults(bundle.member(m), bundle.shape, len(bundle.classes)):
            raise ConfigError(f"member {m} cannot be exported: {faults[0]}")
    if wrong := runner.check(bundle):
        raise ConfigError(f"the exported {wrong[0]}")


def synthetic(shape: tuple[int, int, int], count: int = PROBES) -> Images:
    """(count, C, H, W) fixed smooth random patterns in [0, 1]."""
    rng = stream(0, "probes")
    coarse = torch.rand(count, shape[0], 4, 4, generator=rng)
    fine = torch.rand(count, *shape, generator=rng)
    # mostly smooth: on pure noise all members of many networks name one class
    smooth = F.interpolate(coarse, shape[1:], mode="bilinear", align_corners=False)
    return (0.8 * smooth + 0.2 * fine).clamp(0.0, 1.0)


def _write(
    ensemble: Ensemble, folder: Path, about: About, images: Tensor, int8: Int8 | None, name: str
) -> None:
    """All files of a bundle."""
    members = range(ensemble.num_members)
    names = [f"members/{m}.onnx" for m in members]
    config: dict[str, Any] = {
        "schema": runner.SCHEMA,
        "format": runner.FORMAT,
        "kind": "plain",
        "precision": "fp32" if int8 is None else "int8",
        "num_members": ensemble.num_members,
        "mixture": ensemble.mixture.tolist(),
        "randomized": int((ensemble.mixture > 0).sum()) > 1,
        "classes": list(about.classes),
        "input": {
            "name": "images", "shape": list(about.shape), "dtype": "float32", "range": [0, 1],
        },
        "output": {"name": "logits"},
        "members": names,
        "data": {"name": about.data},
        "threat": about.threat and {"norm": f"{about.threat.norm:g}", "eps": about.threat.eps},
        "ensemble": about.settings,
        "version": redefense.__version__,
    }  # fmt: skip
    nets = [portable(ensemble.member(m)) for m in members]
    with torch.no_grad():
        answers = [query(net, images) for net in nets]
    shapes = {tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__ for z in answers}
    if shapes != {(len(images), len(about.classes))}:
        raise ConfigError(
            f"{len(about.classes)} classes are named, members give logits of shape "
            f"{', '.join(map(str, shapes))} for {len(images)} images"
        )
    logits = torch.stack(answers)
    check_finite(logits)
    # the exported members are in evaluation mode, which must not change their outputs
    if any(mode_of(part) for m in members for part in ensemble.member(m).modules()):
        check_modes(Independent([portable(ensemble.member(m), as_given=True) for m in members]),
                    images)  # fmt: skip
    plain = Independent(nets)
    for m in members:
        # a network that draws is refused for its random nodes
        if torch.equal(query_member(plain, m, images), logits[m]):
            check_batches(plain, m, images, logits[m])
    if isinstance(ensemble, Hyper):
        config |= {
            "kind": "compact",
            "compact": write_compact(ensemble, nets[0], folder, about.shape),
        }
    else:
        graphs = [member_graph(net, about.shape) for net in nets]
        if int8 is not None:
            before, graphs = graphs, [quantised(graph, int8.calibration) for graph in graphs]
            config["quantisation"] = int8.record(before, graphs)
        (folder / "members").mkdir()
        for path, graph in zip(names, graphs, strict=True):
            (folder / path).write_bytes(graph)
    # logits of torch, not of the written files: they are what verification compares with
    np.savez(folder / "probes.npz", images=images.numpy(), logits=logits.numpy())
    # as bytes, which `verify` compares with those of its own runner
    (folder / "run.py").write_bytes(runner.text().encode())
    text = (
        about.card(name)
        if about.card
        else unmeasured_card(name, data=about.data, num_members=ensemble.num_members)
    )
    write_text(folder / "README.md", text)
    runner.write_records(folder, config)
