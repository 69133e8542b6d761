"""What the randomness is compared with: the best single member, and the averaged ensemble.

Both are deterministic, and face the attacks that the suite names for it at the headline's threat.
The member is chosen on validation images, whose luck can only make it too weak a rival: so every
member is attacked on the evaluated images too.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from torch import Tensor, nn

from redefense.evaluation.cells import as_threat, robust_correctness
from redefense.evaluation.headline import interval
from redefense.evaluation.metrics import Bools
from redefense.evaluation.plan import Job, attack_of
from redefense.evaluation.progress import rough_passes
from redefense.evaluation.store import forget, own_images, read_arrays, write_arrays

SELECTION_IMAGES: Final = 200
"""Validation images on which the best single member is chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Correctness under the aware budget, all (n,) on the evaluated images but `members`.

    Attributes:
        members: (M, n) of every member alone.
        averaged: of the averaged ensemble.
        best: the single member that is compared with, chosen on `chosen_on`.
    """

    members: Bools
    averaged: Bools
    best: int
    chosen_on: str

    @property
    def single(self) -> Bools:
        """(n,) of the best member."""
        return cast(Bools, self.members[self.best])

    def save(self, path: Path) -> None:
        """Write the records as an npz file."""
        write_arrays(path, asdict(self) | {"single": self.single})

    def figures(self) -> dict[str, Any]:
        """What the headline says of them."""
        return {
            "best_single_member": float(self.single.mean()),
            "best_single_member_interval": interval(self.single.astype(np.float64)),
            "best_single_member_index": self.best,
            "chosen_on": self.chosen_on,
            "single_members": self.members.mean(1).tolist(),
            "averaged": float(self.averaged.mean()),
            "averaged_interval": interval(self.averaged.astype(np.float64)),
        }


NOTHING: Final = dict.fromkeys(
    f"{key}{s}" for key in ("best_single_member", "averaged") for s in ("", "_interval")
)
"""What the headline says of them where a suite does not attack them."""


def beside(job: Job) -> Beside | None:
    """Attack them, or find the records in the store; None for a suite that does not ask for it."""
    if not job.suite.beside:
        return None
    place = job.place("beside.npz")
    stored = read_arrays(place)
    if stored is not None:
        return Beside(
            members=stored["members"],
            averaged=stored["averaged"],
            best=int(stored["best"]),
            chosen_on=str(stored["chosen_on"]),
        )
    found = _attacked(job)
    if (saved := job.save(place)) is not None:
        found.save(saved)
        forget(job.place("beside.chunks"))
    each = ", ".join(f"{100 * share:.1f}" for share in found.members.mean(1))
    job.say(
        f"alone under the aware budget: members {each} %, of which {found.chosen_on} chose "
        f"{100 * found.single.mean():.1f} %; averaged ensemble {100 * found.averaged.mean():.1f} %"
    )
    job.subject.workers.wait()
    return found


def pieces(job: Job) -> Iterator[tuple[str, float]]:
    """What `beside` will do, for the progress: labels and passes, guessed."""
    each = sum(rough_passes(attack_of(spec)) for spec in job.suite.beside)
    members, count = job.subject.ensemble.num_members, len(job.subject.x)
    if not job.suite.beside:
        return
    yield _label("averaged"), each * members * count
    on = job.subject.validation
    yield from ((_label(f"single-{m}"), each * count) for m in range(members))
    if on is not None:
        chosen = min(SELECTION_IMAGES, len(on[0]))
        yield from ((_label(f"choose-{m}"), each * chosen) for m in range(members))


def _label(name: str) -> str:
    return f"beside {name}"


def _attacked(job: Job) -> Beside:
    subject, on = job.subject, job.subject.validation
    ensemble, x, y = subject.ensemble, subject.x, subject.y
    attacks = [attack_of(spec) for spec in job.suite.beside]

    def robust(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Bools:
        folder = job.place("beside.chunks")
        own = own_images(len(x), subject.workers)
        job.progress.begin(_label(name), len(x), share=own)
        return robust_correctness(
            model, x, y, attacks, as_threat(job.threat), seed=job.seed, name=name,
            workers=subject.workers, progress=job.progress,
            kept=None if folder is None else folder / name,
        )  # fmt: skip

    def all_robust(x: Tensor, y: Tensor, name: str) -> Bools:
        each = range(ensemble.num_members)
        return np.stack([robust(ensemble.member(m), x, y, f"{name}-{m}") for m in each])

    averaged = robust(ensemble.averaged(), x, y, "averaged")
    members = chosen = all_robust(x, y, "single")
    if on is not None:
        chosen = all_robust(on[0][:SELECTION_IMAGES], on[1][:SELECTION_IMAGES], "choose")
    return Beside(
        members=members,
        averaged=averaged,
        best=int(np.argmax(chosen.mean(1))),
        chosen_on="evaluated images" if on is None else "validation",
    )
