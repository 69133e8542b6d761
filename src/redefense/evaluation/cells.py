"""What one attack does to every image: attacked in chunks, verified, and put to every member."""

import hashlib
import math
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

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
from redefense.evaluation.workers import ALONE, Workers
from redefense.rng import stream
from redefense.threat import Threat, norms
from redefense.types import Ensemble, Images, Labels, Victim, check_images, check_labels

CHUNK = 100
"""Images attacked at a time. Streams are named by chunk, so it is part of every result."""

BUDGET_SLACK = 1e-6


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
        """Write the records aside and rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with aside.open("wb") as file:
            np.savez_compressed(file, index=index, **asdict(self))
        aside.rename(path)

    @classmethod
    def read(cls, path: Path) -> "Cell":
        with np.load(path, allow_pickle=False) as stored:
            fields = {key: stored[key] for key in stored.files if key != "index"}
        values: dict[str, Any] = {k: v if v.ndim else float(v) for k, v in fields.items()}
        return cls(**values)


def image_digest(x: Images, y: Labels) -> str:
    """SHA-256 of the evaluated images and labels: what makes two evaluations comparable."""
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    for tensor in (x.float(), y.long()):
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def check_outputs(ensemble: Ensemble, x: Images, y: Labels) -> None:
    """Ask one image of every member, so that a misfit is one line and not a traceback later.

    Raises:
        InputError: if a member cannot take the images, does not give (B, C) logits, or a label
            lies outside [0, C).
    """
    try:
        with torch.no_grad():
            logits = ensemble.member_logits(x[:1])
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"the model cannot take images of {tuple(x.shape[1:])}: {first}") from None
    if logits.ndim != 3 or logits.shape[1] != 1:
        raise InputError(
            f"members must give (B, C) logits, got {tuple(logits.shape[1:])} for B = 1"
        )
    check_labels(y, len(x), logits.shape[2])


def whole(path: Path) -> bool:
    """Whether records lie there and can be read; damaged ones are made again."""
    if not path.is_file():
        return False
    try:
        # opened here: numpy leaves a file that it cannot read to the garbage collector
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return all(stored[key] is not None for key in stored.files)
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error):
        return False


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
) -> Cell:
    """Attack all images in fixed chunks; verify the ball; ask every member about the result."""
    budget, found = as_threat(threat), []
    for start in subject.workers.share(range(0, len(subject.x), CHUNK)):
        x, y = subject.x[start : start + CHUNK], subject.y[start : start + CHUNK]
        meter = Meter()
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
        judged = judge(subject.ensemble, x_adv, x, y)
        found.append((judged, meter.forwards, meter.backwards, seconds))
    parts = subject.workers.gather(found)
    count = len(subject.x)
    return Cell(
        **_merge([judged for judged, *_ in parts]),
        forwards=sum(part[1] for part in parts) / count,
        backwards=sum(part[2] for part in parts) / count,
        seconds=sum(part[3] for part in parts),
    )


def verify_ball(x_adv: Tensor, x: Tensor, threat: Threat, name: str) -> None:
    """Refuse points outside the box or the ball: a breach is an error, not something to clip.

    Raises:
        InputError: naming the attack and the largest distance.
    """
    check_images(x_adv, f"images returned by {name}")
    furthest = float(norms(x_adv.double() - x.double(), threat.norm).max())
    if furthest > threat.eps + BUDGET_SLACK:
        raise InputError(f"{name} left the ball: {furthest:.8f} > eps = {threat.eps}")


def judge(ensemble: Ensemble, x_adv: Tensor, x: Tensor, y: Tensor) -> dict[str, NDArray[Any]]:
    """What every member and the averaged ensemble say to the images, and how far they moved."""
    with torch.no_grad():
        logits = ensemble.member_logits(x_adv)
        averaged = mean_log_probs(logits, ensemble.mixture)
    delta = x_adv - x
    return {
        "correct": (logits.argmax(-1) == y).cpu().numpy(),
        "averaged": (averaged.argmax(-1) == y).cpu().numpy(),
        "linf": norms(delta, math.inf).double().cpu().numpy(),
        "l2": norms(delta, 2.0).double().cpu().numpy(),
        "l0": norms(delta, 0.0).double().cpu().numpy(),
    }


def clean_cell(subject: Subject) -> Cell:
    """The images as they are, put to every member."""
    parts = []
    for start in range(0, len(subject.x), CHUNK):
        x, y = subject.x[start : start + CHUNK], subject.y[start : start + CHUNK]
        parts.append(judge(subject.ensemble, x, x, y))
    return Cell(**_merge(parts))


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
) -> Bools:
    """(n,) whether a deterministic classifier is right on the image and after every attack."""
    alone = as_ensemble(model)
    with evaluating(model):
        parts = []
        for start in workers.share(range(0, len(x), CHUNK)):
            xs, ys = x[start : start + CHUNK], y[start : start + CHUNK]
            right = judge(alone, xs, xs, ys)["correct"][0]
            for attack in attacks:
                rng = stream(seed, "beside", name, repr(attack), start)
                x_adv = attack(alone, xs, ys, threat, rng=rng)  # type: ignore[arg-type]  # an ensemble is a module
                verify_ball(x_adv, xs, threat, name)
                right = right & judge(alone, x_adv, xs, ys)["correct"][0]
            parts.append(right)
    return np.concatenate(workers.gather(parts))
