"""Runs one attack on all images in chunks, verifies its budget and records every member."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redefense.attacks import Attack, Foreign
from redefense.config import ThreatConfig
from redefense.ensembles import Ensemble, mean_log_probs
from redefense.errors import InputError
from redefense.evaluation.inputs.precision import InBfloat16
from redefense.evaluation.pass_counter import Meter, Metered
from redefense.evaluation.progress import SILENT, Progress
from redefense.evaluation.store import chunk_size, in_chunks, read_arrays, write_arrays
from redefense.radius import norm_text
from redefense.results.accuracy import Bools, Floats
from redefense.rng import stream
from redefense.runtime.workers import SINGLE_PROCESS, Workers
from redefense.threat import Threat, norms
from redefense.types import Images, Labels, Victim, check_images, correct

BUDGET_SLACK = 1e-6

Keep = Callable[[slice, NDArray[np.int64], Images, Bools], None]
"""Called with a chunk, the attacked rows of it, their perturbed images, and `correct`."""

COST: Final = ("forwards", "backwards", "seconds")


@dataclass(frozen=True, slots=True)
class Cell:
    """Per-image records of one attack.

    Attributes:
        correct: (M, n) whether each member is correct on the perturbed image; False for all
            members if the image was not attacked, since an earlier attack had fooled every member.
        averaged: (n,) whether the averaged ensemble is correct.
        linf: (n,) L-inf norm of the perturbation; `l2`, `l0` its L2 norm and changed pixels.
        met: (n,) the images that were attacked; default: all.
        alone: (M, n) whether each member is correct on all points of the image; `correct` unless
            several points were tried, of which `correct` is the worst.
        reached: (n,) norm of the perturbation of a user's attack before it was projected onto the
            ball, in the threat's norm; 0 for built-in attacks.
        forwards: forward passes of one image through one member, per attacked image; `backwards`
            likewise.
        seconds: wall-clock time of the attack, without its verification.
    """

    correct: Bools
    averaged: Bools
    linf: Floats
    l2: Floats
    l0: Floats
    met: Bools = field(default_factory=lambda: np.zeros(0, dtype=bool))
    alone: Bools = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    reached: Floats = field(default_factory=lambda: np.zeros(0))
    forwards: float = 0.0
    backwards: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.met.size:
            object.__setattr__(self, "met", np.ones(self.correct.shape[1], dtype=bool))
        if not self.alone.size:
            object.__setattr__(self, "alone", self.correct)
        if not self.reached.size:
            object.__setattr__(self, "reached", np.zeros(self.correct.shape[1]))

    @property
    def whole(self) -> bool:
        """Whether all images were attacked."""
        return bool(self.met.all())

    def save(self, path: Path, index: NDArray[np.int64]) -> None:
        """Write the records, and the indices (n,) of their images in the data set."""
        arrays = {"index": index, **asdict(self)}
        # equal for attacks with one point per image: half of the file
        if self.alone is self.correct:
            del arrays["alone"]
        if not self.reached.any():
            del arrays["reached"]
        write_arrays(path, arrays)

    @classmethod
    def read(cls, path: Path | None) -> "Cell | None":
        """Read saved records; None if they are missing or damaged."""
        stored = read_arrays(path)
        if stored is None:
            return None
        stored.pop("index", None)
        values: dict[str, Any] = {k: v if v.ndim else float(v) for k, v in stored.items()}
        return cls(**values)


def image_digest(x: Images, y: Labels) -> str:
    """SHA-256 of the evaluated images and labels; only equal digests can be compared."""
    # the bytes alone do not tell the shape
    digest = hashlib.sha256(str(tuple(x.shape)).encode())
    for images in x.split(chunk_size(x.shape[1:])):  # a whole copy would double the memory
        digest.update(images.float().contiguous().cpu().numpy().data)
    digest.update(y.long().contiguous().cpu().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Subject:
    """The ensemble under evaluation, its test images, and their indices in the data set.

    Attributes:
        validation: images and labels on which the best single member is chosen; without them it is
            chosen on the evaluated images, which favours the single member, not the ensemble.
        randomized: whether queries are answered by a member drawn at random; else by the average.
        drift: clean validation accuracy minus the one in the training log.
        workers: the processes over which the chunks are distributed.
        passes: the ensemble with recorded passes, queried by attacks in its place.
        batch_size: largest number of images per call of a network; None if that is not bounded.
        copy: what aware attacks query in place of the ensemble, from `attack_copy`.
        half: whether they query it in bfloat16.
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
    workers: Workers = SINGLE_PROCESS
    copy: Ensemble | None = None
    half: bool = False
    passes: Ensemble | None = None
    batch_size: int | None = None

    @property
    def chunk(self) -> int:
        """Images per chunk."""
        return chunk_size(self.x.shape[1:])

    def facts(self) -> dict[str, Any]:
        """The images, as evaluations state them."""
        return {
            "name": self.data_name,
            "split": self.split,
            "num_images": len(self.x),
            "sha256": image_digest(self.x, self.y),
        }

    def some(self, rows: NDArray[np.int64]) -> "Subject":
        """The same with only some of the images."""
        at = torch.from_numpy(rows).to(self.x.device)
        return replace(self, x=self.x[at], y=self.y[at], index=self.index[rows])

    def metered(self, meter: Meter, *, aware: bool = True, foreign: bool = False) -> Ensemble:
        """The ensemble that attacks query, with counted passes.

        Args:
            meter: counts the passes.
            aware: whether the attack knows the ensemble; others query the ensemble itself.
            foreign: whether the attack is a user's: these query the networks themselves, since
                they may need second derivatives, which recorded passes do not have.
        """
        if foreign:
            return Metered(self.ensemble, meter)
        exact = Metered(self.ensemble if self.passes is None else self.passes, meter)
        if self.copy is None or not aware:
            return exact
        copy = Metered(self.copy, meter)
        return InBfloat16(exact, copy) if self.half else copy


def as_threat(config: ThreatConfig) -> Threat:
    """The threat that a configuration describes."""
    return Threat(norm=math.inf if config.norm == "inf" else 2.0, eps=config.eps)


def outside_ball(cell: Cell, threat: Threat, x: Images) -> dict[str, Any] | None:
    """Number of images that a user's attack moved out of the ball, and the largest distance."""
    left = cell.reached > threat.eps + slack_of(threat, x)
    return (
        {"images": int(left.sum()), "furthest": float(cell.reached.max())} if left.any() else None
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attack on given images, in fixed chunks.

    Attributes:
        view: "sampled", "averaged", "members", or "member 0" for the first member alone.
        name: of its random streams.
        aware: whether the attack is aware of the draw, and may query the copy of the ensemble.
        met: (n,) the images to attack; the others count as fooled.
        starts: returns starting points (K, B, C, H, W) of a chunk.
        keep: called after each attacked chunk.
    """

    subject: Subject
    attack: Attack
    threat: ThreatConfig
    view: str
    seed: int
    name: str
    met: Bools
    aware: bool = True
    starts: Callable[[slice], Tensor] | None = None
    keep: Keep | None = None

    def chunk(self, images: slice, progress: Progress = SILENT) -> dict[str, Any]:
        """Attack a chunk, verify the ball, and record every member's correctness."""
        subject, met = self.subject, self.met[images]
        rows = met.nonzero()[0]
        empty = _unmet(subject.ensemble.num_members, met)
        if len(rows) == 0:
            return empty | dict.fromkeys(COST, 0.0)
        chosen = torch.from_numpy(rows).to(subject.x.device)
        whole = len(rows) == len(met)
        x, y = subject.x[images], subject.y[images]
        if not whole:
            x, y = x[chosen], y[chosen]
        budget, meter = as_threat(self.threat), Meter(progress.passed)
        foreign = isinstance(self.attack, Foreign)
        queried = subject.metered(meter, aware=self.aware, foreign=foreign)
        victim = self._victim(queried, images.start)
        more = {}
        if self.starts is not None:
            points = self.starts(images)
            more["starts"] = points if whole else points[:, chosen]
        # by the chunk, so that it can be computed alone, by any process
        rng = stream(self.seed, "attack", self.name, images.start)
        begun = time.perf_counter()
        x_adv = self.attack(victim, x, y, budget, rng=rng, **more)
        # before the points are judged, which is no part of the attack
        seconds = time.perf_counter() - begun
        x_adv, reached = projected(x_adv, x, budget) if foreign else (x_adv, {})
        if self.attack.bounded:
            verify_ball(x_adv, x, budget, self.name)
        judged = judge(subject.ensemble, x_adv, x, y) | reached
        if self.keep is not None:
            self.keep(images, rows, x_adv, judged["correct"])
        for key, values in judged.items():
            empty[key][..., rows] = values
        cost = {"forwards": meter.forwards, "backwards": meter.backwards, "seconds": seconds}
        return empty | cost

    def _victim(self, metered: Ensemble, start: int) -> Victim:
        if self.view == "sampled":
            return metered.sampled(rng=stream(self.seed, "draws", self.name, start))
        if self.view == "averaged":
            return metered.averaged()
        if self.view.startswith(MEMBER):
            return metered.member(member_of(self.view))
        return metered

    def run(self, kept: Path | None = None, progress: Progress = SILENT) -> Cell:
        """Attack all chunks. Finished chunks are saved in the folder `kept`, as by `in_chunks`."""

        def fits(images: slice, part: Mapping[str, NDArray[Any]]) -> bool:
            # a chunk of other images, saved before an earlier attack found more, cannot be reused
            return "met" in part and np.array_equal(part["met"], self.met[images])

        parts = in_chunks(
            len(self.met), partial(self.chunk, progress=progress), size=self.subject.chunk,
            fits=fits, kept=kept, workers=self.subject.workers, progress=progress,
        )  # fmt: skip
        return Cell(**joined(parts, int(self.met.sum())))


MEMBER: Final = "member "
"""Prefix of the view of a single member."""


def member_of(view: str) -> int:
    """The member's number in the view of a single member."""
    return int(view.removeprefix(MEMBER))


def _unmet(num_members: int, met: Bools) -> dict[str, Any]:
    """The records of a chunk without attacked images."""
    nothing = {key: np.zeros(len(met)) for key in ("linf", "l2", "l0", "reached")}
    correct, averaged = np.zeros((num_members, len(met)), bool), np.zeros(len(met), bool)
    return {"correct": correct, "averaged": averaged, **nothing, "met": met}


def verify_ball(x_adv: Tensor, x: Tensor, threat: Threat, name: str) -> None:
    """Check that points lie within the box and the ball; they are not clipped silently.

    Raises:
        InputError: if a point lies outside; it names the attack and the largest distance.
    """
    check_images(x_adv, f"images returned by {name}")
    # in double precision, so that the check itself adds no rounding
    furthest = float(norms(x_adv.double() - x.double(), threat.norm).max())
    if furthest > threat.eps + slack_of(threat, x):
        raise InputError(
            f"{name} left the ball: a point has an {norm_text(threat.norm)} distance of "
            f"{furthest:.8f} > eps = {threat.eps}; end the attack with threat.project(x_adv, x)"
        )


def slack_of(threat: Threat, x: Tensor) -> float:
    """Tolerance for rounding errors in the distance of an image from the ball's centre."""
    # float32 rounds each pixel by up to half a unit, which adds up in the L2 norm of a large image
    pixels = x[0].numel() if threat.norm == 2 else 1
    ulp = float(torch.finfo(torch.float32).eps)
    return BUDGET_SLACK + ulp * (0.5 * math.sqrt(pixels) + threat.eps)


def judge(ensemble: Ensemble, x_adv: Tensor, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Correctness of every member and of the averaged ensemble, and norms of the perturbations."""
    with torch.no_grad():
        logits = ensemble.member_logits(x_adv)
        averaged = mean_log_probs(logits, ensemble.mixture)
    return {
        "correct": correct(logits, y).cpu().numpy(),
        "averaged": correct(averaged, y).cpu().numpy(),
        **sizes(x_adv - x),
    }


def sizes(delta: Tensor) -> dict[str, Floats]:
    """(n,) norms of each perturbation, as records have them."""
    return {"linf": lengths(delta, math.inf), "l2": lengths(delta, 2.0), "l0": lengths(delta, 0.0)}


def lengths(delta: Tensor, p: float) -> Floats:
    """(n,) p-norm of each perturbation."""
    found: Floats = norms(delta, p).double().cpu().numpy()
    return found


def projected(x_adv: Images, x: Images, threat: Threat) -> tuple[Images, dict[str, Floats]]:
    """The points of a user's attack on the ball, and how far they were from its centre before."""
    # it may have a budget of its own: the nearest allowed points are scored
    return threat.project(x_adv, x), {"reached": lengths(x_adv - x, threat.norm)}


def clean_cell(ensemble: Ensemble, images: Images, labels: Labels) -> Cell:
    """Records of the clean images."""
    size = chunk_size(images.shape[1:])
    pairs = zip(images.split(size), labels.split(size), strict=True)
    return Cell(**merged([judge(ensemble, x, x, y) for x, y in pairs]))


def merged(parts: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Any]:
    """The arrays of all chunks, joined along the images."""
    return {key: np.concatenate([part[key] for part in parts], axis=-1) for key in parts[0]}


def joined(parts: Sequence[dict[str, NDArray[Any]]], attacked: int) -> dict[str, Any]:
    """The records of all chunks, with the passes per attacked image and the seconds of all."""
    totals = {key: sum(float(part.pop(key)) for part in parts) for key in COST}
    each = {key: totals[key] / max(1, attacked) for key in ("forwards", "backwards")}
    return merged(parts) | each | {"seconds": totals["seconds"]}
