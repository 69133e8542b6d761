"""`redefense certify`: certified L2 accuracy of a trained run under Gaussian noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from redefense.defences import draws_member
from redefense.ensembles import evaluating
from redefense.errors import ConfigError
from redefense.evaluation.inputs.subjects import subject_of
from redefense.evaluation.plan import Log
from redefense.evaluation.provenance import provenance
from redefense.evaluation.store import chunk_size, read_object
from redefense.limits import at_least
from redefense.models.randomized import GaussianNoise
from redefense.runtime.device import computing
from redefense.runtime.files import write_json
from redefense.runtime.folders import CERTIFICATES
from redefense.stochastic.certificates import certificate
from redefense.stochastic.ensemble import Drawn, Stochastic, seeds_of
from redefense.train.loading import data_of, find_final, input_check, load_checkpoint
from redefense.types import Images, Labels, correct


def right_answers(
    network: nn.Module, x: Images, y: Labels, draws: int, *, seed: int
) -> NDArray[np.int64]:
    """(n,) number of correct draws of a stochastic network, computed in chunks of images."""
    # `draw` is given its seeds: the network's own are not used
    noisy, found, size = Stochastic(network, draws=1), [], chunk_size(x.shape[1:])
    with torch.no_grad():
        for start in range(0, len(x), size):
            points, labels = x[start : start + size], y[start : start + size]
            count = torch.zeros(len(labels), dtype=torch.int64, device=x.device)
            for number in seeds_of(seed, "certify", draws, start):
                count += correct(noisy.draw(number, points), labels)
            found.append(count.cpu().numpy())
    return np.concatenate(found)


@computing()
def certify_run(
    path: Path,
    *,
    sigma: float,
    radii: Sequence[float] = (),
    draws: int = 1000,
    alpha: float = 0.001,
    data: str | None = None,
    images: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    log: Log = lambda _: None,
) -> tuple[dict[str, Any], Path]:
    """Certify a trained run with Gaussian input noise on its test split, and write the figures.

    Args:
        path: a run directory.
        sigma: standard deviation of the noise, in units of the images, > 0; for a run trained with
            noise on the images it must equal that noise.
        radii: in L2; default: 0, sigma / 2 and sigma.
        draws: number of noise samples per image, >= 1.
        alpha: failure probability of the certificates, in (0, 1).
        data: another data set than the run's own.
        images: use the first N images of a fixed permutation of the test split.
        seed: of every draw.
        device: to compute on.
        out: the file; default: `DIR/certificates/sigma-SIGMA.json`.
        log: called with each log line.

    Returns:
        The written data, and its file.

    Raises:
        ConfigError: for settings outside their ranges, and other noise than the run's own.
        DataError: if the run or its data is missing, damaged or does not fit.
    """
    # all checked before anything is computed
    target = out if out is not None else path / CERTIFICATES / f"sigma-{sigma:g}.json"
    if target.suffix != ".json":
        raise ConfigError(f"--out must name a .json file, got {target}")
    if target.exists() and (read_object(target) or {}).get("kind") != "certificate":
        raise ConfigError(
            f"{target} exists and is not a certificate; choose another file with --out"
        )
    at_least(1, draws=draws)
    levels = tuple(radii) or (0.0, sigma / 2, sigma)
    for radius in levels:
        # a trial call, which refuses a sigma, radius or alpha out of range
        certificate(np.ones(1, dtype=np.int64), draws, sigma=sigma, radius=radius, alpha=alpha)
    checkpoint = find_final(path)
    run = checkpoint.run
    ensemble = load_checkpoint(checkpoint, device=device)
    # other data are certified too, but the document says so
    dataset, own_data = data_of(checkpoint, data)
    input_check(dataset, checkpoint)
    subject = subject_of(ensemble, dataset, images, {}, device=device)
    # the deployed view of the run
    drawn = ensemble.num_members > 1 and draws_member(run.defence.get("name"))
    answering = Drawn(ensemble) if drawn else ensemble.averaged()
    own = {member.sigma for member in ensemble.modules() if isinstance(member, GaussianNoise)}
    if own - {sigma}:
        raise ConfigError(
            f"{path} adds noise of standard deviation {max(own):g} itself, got sigma {sigma:g}: "
            f"certify it with --sigma {max(own):g}"
        )
    count = len(subject.x)
    log(f"certify: {count} test images of {dataset.name}, {draws} draws of noise {sigma:g} each")
    with evaluating(ensemble):
        noisy = answering if own else GaussianNoise(answering, sigma=sigma)
        right = right_answers(noisy, subject.x, subject.y, draws, seed=seed)
    found = [
        certificate(right, draws, sigma=sigma, radius=radius, alpha=alpha) for radius in levels
    ]
    document = {
        "schema": 1,
        "kind": "certificate",
        "run": {"name": path.resolve().name},
        "provenance": provenance(seed, subject.x.device) | ({} if own_data else {"data": data}),
        "data": subject.facts(),
        "clean": float(right.mean() / draws),
        "norm": "2",
        "certificates": [one.as_dict() for one in found],
    }
    write_json(target, document)
    return document, target
