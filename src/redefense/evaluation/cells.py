"""What one attack does to every image: attacked in chunks, verified, and put to every member."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from redefense.attacks import Attack
from redefense.config import ThreatConfig
from redefense.ensembles import as_ensemble, evaluating, mean_log_probs
from redefense.errors import InputError
from redefense.evaluation.metering import Meter, Metered
from redefense.evaluation.metrics import Bools, Floats
from redefense.evaluation.progress import SILENT, Progress
from redefense.evaluation.store import CHUNK, in_chunks, read_arrays, write_arrays
from redefense.evaluation.workers import ALONE, Workers
from redefense.rng import stream
from redefense.threat import Threat, norms
from redefense.types import Ensemble, Images, Labels, Victim, check_images, correct

BUDGET_SLACK = 1e-6

COST: Final = ("forwards", "backwards", "seconds")


@dataclass(frozen=True, slots=True)
class Cell:
    """What one attack did to every image.

    Attributes:
        correct: (M, n) whether each member is right on the perturbed image.
        averaged: (n,) whether the averaged ensemble is.
        linf: (n,) largest change of a channel; `l2` its length; `l0` pixels changed.
        forwards: passes of one image through one member, per image; `backwards` likewise.
        seconds: wall-clock time of the attack alone.
    """

    correct: Bools
    averaged: Bools
    linf: Floats
    l2: Floats
    l0: Floats
    forwards: float = 0.0
    backwards: float = 0.0
    seconds: float = 0.0

    def save(self, path: Path, index: NDArray[np.int64]) -> None:
        """Write the records, and which images of the data set they are of."""
        write_arrays(path, {"index": index, **asdict(self)})

    @classmethod
    def read(cls, path: Path | None) -> "Cell | None":
        """What was saved there; None where there is nothing whole."""
        stored = read_arrays(path)
        if stored is None:
            return None
        stored.pop("index", None)
        values: dict[str, Any] = {k: v if v.ndim else float(v) for k, v in stored.items()}
        return cls(**values)


def image_digest(x: Images, y: Labels) -> str:
    """SHA-256 of the evaluated images and labels: what makes two evaluations comparable."""
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    for tensor in (x.float(), y.long()):
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom and on what: the ensemble, its test images, and where they stand in the data set.

    Attributes:
        validation: images and labels on which the best single member may be chosen; without them it
            is chosen on the evaluated images, which flatters the single member, not the ensemble.
        randomized: whether queries are answered by a member drawn at random; else by the average.
        drift: clean accuracy on all validation images, now minus as the training logged it.
        workers: the processes among which the chunks are spread.
    """

    ensemble: Ensemble
    x: Images
    y: Labels
    index: NDArray[np.int64]
    data_name: str
    split: str = "test"
    run: Mapping[str, Any] = field(default_factory=dict)
    validation: tuple[Tensor, Tensor] | None = None
    randomized: bool = True
    drift: float | None = None
    workers: Workers = ALONE


def as_threat(config: ThreatConfig) -> Threat:
    """The threat that a configuration describes."""
    return Threat(norm=math.inf if config.norm == "inf" else 2.0, eps=config.eps)


def attack_cell(
    subject: Subject,
    attack: Attack,
    threat: ThreatConfig,
    view: str,
    *,
    seed: int,
    name: str,
    kept: Path | None = None,
    progress: Progress = SILENT,
) -> Cell:
    """Attack all images in fixed chunks; verify the ball; ask every member about the result.

    Finished chunks are kept in the folder `kept`, as `in_chunks` does.
    """
    budget = as_threat(threat)

    def work(images: slice) -> dict[str, Any]:
        x, y, start = subject.x[images], subject.y[images], images.start
        meter = Meter(progress.passed)
        metered = Metered(subject.ensemble, meter)
        victim: Victim = metered
        if view == "sampled":
            victim = metered.sampled(rng=stream(seed, "draws", name, start))
        elif view == "averaged":
            victim = metered.averaged()
        begun = time.perf_counter()
        x_adv = attack(victim, x, y, budget, rng=stream(seed, "attack", name, start))
        seconds = time.perf_counter() - begun
        if attack.bounded:
            verify_ball(x_adv, x, budget, name)
        cost = {"forwards": meter.forwards, "backwards": meter.backwards, "seconds": seconds}
        return judge(subject.ensemble, x_adv, x, y) | cost

    count = len(subject.x)
    parts = in_chunks(count, work, kept=kept, workers=subject.workers, progress=progress)
    totals = {key: sum(float(part.pop(key)) for part in parts) for key in COST}
    return Cell(
        **_merge(parts),
        forwards=totals["forwards"] / count,
        backwards=totals["backwards"] / count,
        seconds=totals["seconds"],
    )


def verify_ball(x_adv: Tensor, x: Tensor, threat: Threat, name: str) -> None:
    """Refuse points outside the box or the ball: a breach is an error, not something to clip.

    Raises:
        InputError: naming the attack and the largest distance.
    """
    check_images(x_adv, f"images returned by {name}")
    furthest = float(norms(x_adv.double() - x.double(), threat.norm).max())
    # float32 rounds each pixel by up to half a unit, which adds up in the L2 norm of a large image
    pixels = x[0].numel() if threat.norm == 2 else 1
    rounding = torch.finfo(torch.float32).eps * (0.5 * pixels**0.5 + threat.eps)
    if furthest > threat.eps + BUDGET_SLACK + rounding:
        raise InputError(f"{name} left the ball: {furthest:.8f} > eps = {threat.eps}")


def judge(ensemble: Ensemble, x_adv: Tensor, x: Tensor, y: Tensor) -> dict[str, Any]:
    """What every member and the averaged ensemble say to the images, and how far they moved."""
    with torch.no_grad():
        logits = ensemble.member_logits(x_adv)
        averaged = mean_log_probs(logits, ensemble.mixture)
    delta = x_adv - x
    return {
        "correct": correct(logits, y).cpu().numpy(),
        "averaged": correct(averaged, y).cpu().numpy(),
        "linf": norms(delta, math.inf).double().cpu().numpy(),
        "l2": norms(delta, 2.0).double().cpu().numpy(),
        "l0": norms(delta, 0.0).double().cpu().numpy(),
    }


def clean_cell(subject: Subject) -> Cell:
    """The images as they are, put to every member."""
    pairs = zip(subject.x.split(CHUNK), subject.y.split(CHUNK), strict=True)
    return Cell(**_merge([judge(subject.ensemble, x, x, y) for x, y in pairs]))


def _merge(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Any]:
    return {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}


def robust_correctness(
    model: nn.Module,
    x: Images,
    y: Labels,
    attacks: Sequence[Attack],
    threat: Threat,
    *,
    seed: int,
    name: str,
    workers: Workers = ALONE,
    kept: Path | None = None,
    progress: Progress = SILENT,
) -> Bools:
    """(n,) whether a deterministic classifier is right on the image and after every attack.

    Images answered wrongly are not attacked any further.
    """

    def work(images: slice) -> dict[str, Any]:
        meter = Meter(progress.passed)
        alone = Metered(as_ensemble(model), meter)
        xs, ys = x[images], y[images]
        right = judge(alone, xs, xs, ys)["correct"][0]
        for attack in attacks:
            rows = torch.from_numpy(right.nonzero()[0]).to(x.device)
            if len(rows) == 0:
                break
            rng = stream(seed, "beside", name, repr(attack), images.start)
            x_adv = attack(alone, xs[rows], ys[rows], threat, rng=rng)
            verify_ball(x_adv, xs[rows], threat, name)
            right[right] = judge(alone, x_adv, xs[rows], ys[rows])["correct"][0]
        return {"right": right, "forwards": meter.forwards}

    with evaluating(model):
        parts = in_chunks(len(x), work, kept=kept, workers=workers, progress=progress)
    return np.concatenate([part["right"] for part in parts])
