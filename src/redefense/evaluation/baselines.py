"""Deterministic baselines of a randomized ensemble: single members and the average.

Each is attacked by the `baseline_attacks` of the suite, on the images that it still classifies
correctly after all other attacks. Its worst case is over all points, as that of the ensemble, and
these points count for the ensemble, too.

The best single member is chosen on validation images. Chance in this choice could only lower this
baseline, so every member is attacked on the evaluated images too.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from redefense.attacks.adaptive import Hinge
from redefense.evaluation.cascade.runner import Runner
from redefense.evaluation.cells import MEMBER, as_threat, judge, member_of
from redefense.evaluation.headline import interval
from redefense.evaluation.pass_counter import Meter
from redefense.evaluation.plan import Job, attack_of
from redefense.evaluation.progress import rough_passes
from redefense.evaluation.store import forget, in_chunks, own_images, read_arrays, write_arrays
from redefense.evaluation.suite import CellSpec
from redefense.results.accuracy import Bools
from redefense.rng import stream
from redefense.runtime.folders import BASELINES

SELECTION_IMAGES: Final = 200
"""Number of validation images on which the best single member is chosen."""

SELECTION: Final = Hinge(steps=20)
"""The attack on each member for this choice; it only has to rank the members."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """Worst cases of the baselines on the evaluated images.

    Attributes:
        members: (M, n) whether each member is correct on all points found.
        averaged: (n,) whether the averaged ensemble is correct on all points found.
        best: the best single member, chosen on `chosen_on`.
    """

    members: Bools
    averaged: Bools
    best: int
    chosen_on: str

    @property
    def single(self) -> Bools:
        """(n,) correctness of the best member."""
        return cast(Bools, self.members[self.best])

    def figures(self) -> dict[str, Any]:
        """Entries of the headline."""
        return {
            "best_single_member": float(self.single.mean()),
            "best_single_member_interval": interval(self.single.astype(np.float64)),
            "best_single_member_index": self.best,
            "chosen_on": self.chosen_on,
            "single_members": self.members.mean(1).tolist(),
            "averaged": float(self.averaged.mean()),
            "averaged_interval": interval(self.averaged.astype(np.float64)),
        }

    def save(self, path: Path) -> None:
        """Write the records as an npz file."""
        write_arrays(path, asdict(self) | {"single": self.single})


NOTHING: Final = dict.fromkeys(
    f"{key}{s}" for key in ("best_single_member", "averaged") for s in ("", "_interval")
)
"""Entries of the headline for a suite that does not attack the baselines."""


def attack_baselines(runner: Runner) -> None:
    """Attack every member and the average on the images that each still classifies correctly.

    Images on which a cell of the suite ran the same attack on the same view are skipped.
    """
    job, worst = runner.job, runner.worst
    if worst is None:  # nothing that the baselines could be compared with
        return
    for name, view, spec in _each(job):
        attack = attack_of(spec)
        remaining = worst.averaged if view == "averaged" else worst.alone[member_of(view)]
        met = remaining & ~runner.met_by(attack, view)
        if met.any():
            runner.further(name, spec, attack, view, met)


def _each(job: Job) -> Iterator[tuple[str, str, CellSpec]]:
    """Name, view and attack of every baseline attack."""
    views = [f"{MEMBER}{m}" for m in range(job.subject.ensemble.num_members)]
    for view in (*views, "averaged"):
        for number, spec in enumerate(job.suite.baseline_attacks):
            yield f"{view.replace(' ', '-')}-{spec.attack}-{number}", view, spec


def baselines(runner: Runner) -> Baselines | None:
    """Worst cases of the baselines over all attacks; None if the suite does not attack them."""
    job, worst = runner.job, runner.worst
    if worst is None or not job.suite.baseline_attacks:
        return None
    chosen, on = _on_validation(job), "validation"
    if chosen is None:
        chosen, on = worst.alone, "evaluated images"
    found = Baselines(
        members=worst.alone,
        averaged=worst.averaged,
        best=int(np.argmax(chosen.mean(1))),
        chosen_on=on,
    )
    if (place := job.save(job.place(BASELINES))) is not None:
        found.save(place)
    return found


def pieces(job: Job) -> Iterator[tuple[str, float]]:
    """Labels and estimated passes of the planned work, for the progress."""
    members, count = job.subject.ensemble.num_members, len(job.subject.x)
    for name, view, spec in _each(job):
        passes = rough_passes(attack_of(spec)) * (members if view == "averaged" else 1)
        yield name, REMAINING_SHARE * passes * count
    on = job.subject.validation
    if on is not None and job.suite.baseline_attacks:
        yield CHOICE, rough_passes(SELECTION) * members * min(SELECTION_IMAGES, len(on[0]))


REMAINING_SHARE: Final = 0.3
"""Assumed share of images that a baseline still classifies correctly, for the progress."""

CHOICE: Final = "choosing a single member"


def _on_validation(job: Job) -> Bools | None:
    """(M, k) correctness of each member on attacked validation images; None without images."""
    if job.subject.validation is None:
        return None
    place = job.place("choice.npz")
    if (stored := read_arrays(place)) is not None:
        return stored["right"]
    # the validation split is ordered so that its first images are stratified by class
    x, y = (part[:SELECTION_IMAGES] for part in job.subject.validation)
    ensemble, workers = job.subject.ensemble, job.subject.workers
    size = job.subject.chunk
    own = own_images(len(x), workers, size)
    job.progress.begin(CHOICE, len(x), share=own)

    def work(images: slice) -> dict[str, Any]:
        meter = Meter(job.progress.passed)
        metered = job.subject.metered(meter)
        xs, ys = x[images], y[images]
        # an image that a member misclassifies when clean is not correct under attack either
        right = judge(ensemble, xs, xs, ys)["correct"]
        for m in range(ensemble.num_members):
            # the same stream for every member, so that equal members get equal attacks
            rng = stream(job.seed, "choice", images.start)
            x_adv = SELECTION(metered.member(m), xs, ys, as_threat(job.threat), rng=rng)
            right[m] &= judge(ensemble, x_adv, xs, ys)["correct"][m]
        return {"right": right, "forwards": meter.forwards}

    kept = job.place("choice.chunks")
    parts = in_chunks(len(x), work, size=size, kept=kept, workers=workers, progress=job.progress)
    right = np.concatenate([part["right"] for part in parts], axis=1)
    if (saved := job.save(place)) is not None:
        write_arrays(saved, {"right": right})
        forget(kept)  # only now, so that an interruption loses nothing
    workers.wait()
    return right
