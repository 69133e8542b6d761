"""Runs attacks in order, reuses stored records, and accumulates the worst case.

In a suite with a cascade, aware attacks that count for the headline skip images on which every
member is already fooled. Unaware attacks run on all images, since the headline reports their own
accuracy. The images of an attack are determined by the records before it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from redefense.attacks import Attack
from redefense.checks.comparisons import BLACK_BOX
from redefense.config import ThreatConfig
from redefense.evaluation.cascade.attacked import Attacked
from redefense.evaluation.cascade.points import Points
from redefense.evaluation.cascade.worst_case import WorstCase
from redefense.evaluation.cells import Cell, Task
from redefense.evaluation.plan import Further, Job, Planned, threat_of
from redefense.evaluation.progress import rough_passes
from redefense.evaluation.store import forget, own_images
from redefense.evaluation.suite import CellSpec
from redefense.results.accuracy import Bools, Floats
from redefense.results.intervals import exact_expectation


def run_order(plan: Sequence[Planned]) -> list[Planned]:
    """The order of the cells: black-box attacks last, before them those that may cascade.

    An image that only a black-box attack fools causes a warning (S17), so all others run before.
    """
    return sorted(plan, key=lambda p: (p.spec.attack in BLACK_BOX, p.aware and p.attack.bounded))


class Runner:
    """Runs attacks and accumulates their records.

    Args:
        job: the evaluation.
        plan: the cells.
        mixture: (M,) sampling probabilities.
        clean: the records of the clean images, of the class of all records.
        run: attacks in another way, in chunks saved in a folder. Then no worst case is accumulated:
            the lowest of several estimates would be biased.

    Attributes:
        worst: the worst case so far; None for a suite without a headline.
        others: further attacks, besides the suite's cells.
        attacked: the images that the attacks returned.
    """

    def __init__(
        self,
        job: Job,
        plan: Sequence[Planned],
        mixture: Floats,
        clean: Cell,
        run: Callable[[Task, Path | None], Cell] | None = None,
    ) -> None:
        self.job, self._mixture, self._read = job, mixture, type(clean).read
        self._run = run or (lambda task, kept: task.run(kept, job.progress))
        self._threat = threat_of(plan) if run is None else None
        self.worst = None if self._threat is None else WorstCase(mixture, clean)
        self.others: list[Further] = []
        self._met: list[tuple[Attack, str, Bools]] = []
        self.attacked = Attacked(job)
        self.points = Points(job.subject.x, job.place("points"))
        # the full checks attack with `Subset`, which starts from points of others
        self._keeps_points = any(p.attack.takes_starts for p in plan) or job.checks == "full"

    @property
    def everything(self) -> Bools:
        """(n,) all images."""
        return np.ones(len(self.job.subject.x), dtype=bool)

    def cells(self, plan: Sequence[Planned]) -> tuple[dict[str, Cell], dict[str, list[Cell]]]:
        """The records of every cell, and those of its repetitions with other seeds."""
        records, repeats = {}, {}
        for number, planned in enumerate(run_order(plan), 1):
            again, met = [], self.everything
            if self.job.suite.cascade and planned.aware and self._counts(planned):
                assert self.worst is not None
                met = ~self.worst.lost
            # repetitions attack the same images, so that they can be compared
            for repeat in range(self.job.seeds):
                name = planned.run_name(repeat)
                cell = self.attack(
                    name, planned.attack, planned.threat, planned.spec.view, met,
                    label=cell_label(number, planned, plan, repeat), aware=planned.aware,
                )  # fmt: skip
                again.append(cell)
                if repeat and self._counts(planned):
                    self.others.append(Further(
                        identity=name, attack=planned.spec.attack, repr=repr(planned.attack),
                        view=planned.spec.view, label=planned.spec.label, cell=cell,
                    ))  # fmt: skip
            records[planned.identity], *repeats[planned.identity] = again
        return records, repeats

    def _counts(self, planned: Planned) -> bool:
        return planned.attack.bounded and planned.threat == self._threat

    def further(self, name: str, spec: CellSpec, attack: Attack, view: str, met: Bools) -> None:
        """Run an attack that is no cell of the suite, at the headline's threat."""
        assert self._threat is not None
        cell = self.attack(name, attack, self._threat, view, met, label=name)
        self.others.append(Further(
            identity=name, attack=spec.attack, repr=repr(attack), view=view, label=spec.label,
            cell=cell,
        ))  # fmt: skip

    def count(self, name: str, what: str, cell: Cell) -> None:
        """Count points that statistics or checks found."""
        assert self.worst is not None
        self.worst.add(name, cell)
        self.others.append(Further(
            identity=name, attack=name, repr=what, view="several", label=None, cell=cell
        ))  # fmt: skip

    def met_by(self, attack: Attack, view: str) -> Bools:
        """(n,) the images that the same attack already attacked on this view."""
        found = ~self.everything
        for other, seen, met in self._met:
            if other == attack and self._same(view) == self._same(seen):
                found |= met
        return found

    def _same(self, view: str) -> str:
        """The view that is equivalent for a single member."""
        return view if self.job.subject.ensemble.num_members > 1 else "members"

    def attack(
        self,
        name: str,
        attack: Attack,
        threat: ThreatConfig,
        view: str,
        met: Bools,
        *,
        label: str,
        aware: bool = True,
    ) -> Cell:
        """The records of an attack on the images `met`, computed now or read from the store."""
        job, subject = self.job, self.job.subject
        task = Task(
            subject=subject, attack=attack, threat=threat, view=view, seed=job.seed, name=name,
            met=met, aware=aware,
        )  # fmt: skip
        # points of other budgets must not count for the headline
        worst = self.worst if attack.bounded and threat == self._threat else None
        if worst is not None and self._keeps_points:
            if attack.takes_starts:
                task = replace(task, starts=self.points.starts(worst))
            task = self.points.kept(task, worst)
        task = self.attacked.kept(task)
        kept = self.attacked.chunks_of(name)
        cell = self._read(job.place(f"{name}.npz")) if self.attacked.stored(name) else None
        # an earlier attack that was run again may have left other images
        if cell is None or not np.array_equal(cell.met, met):
            self.attacked.images.pop(name, None)
            job.progress.begin(
                label, len(met), share=own_images(len(met), subject.workers, subject.chunk)
            )
            cell = self._run(task, kept)
            # filled before it is stored, since readers join the records of all images
            if worst is not None and not cell.whole:
                cell = worst.filled(cell)
            if job.write_cell(name, cell):
                forget(kept)
            self._log(label, cell)
        self.attacked.finish(name, cell, worst)
        # no process reads the next cell before this one is written
        subject.workers.wait()
        if worst is not None:
            worst.add(name, cell)
            self._met.append((attack, view, met))
        return cell

    def forget_points(self) -> None:
        """Remove the points that were saved for later attacks."""
        self.job.subject.workers.wait()  # others may still read them
        if self.job.subject.workers.first:
            self.points.forget()
        self.attacked.forget()

    def _log(self, label: str, cell: Cell) -> None:
        if cell.whole:
            expected = float(exact_expectation(cell.correct, self._mixture).mean())
            found = f"{100 * expected:.1f} % expected accuracy"
        else:
            found = f"attacked {int(cell.met.sum())} of {len(cell.met)} images"
        self.job.log(f"{label}: {found}, {cell.seconds:.1f} s")


def cell_label(number: int, planned: Planned, plan: Sequence[Planned], repeat: int) -> str:
    """The label of a cell in the progress."""
    again = f", run {repeat + 1}" if repeat else ""
    return f"cell {number}/{len(plan)} {planned.spec.label or planned.identity}{again}"


def planned_passes(
    job: Job, plan: Sequence[Planned], queried: Callable[[Attack], int]
) -> Iterator[tuple[str, float]]:
    """Labels and estimated passes of the cells in their order, for the progress.

    Args:
        job: the evaluation.
        plan: the cells.
        queried: number of members that an attack queries on each image.
    """
    for number, planned in enumerate(plan, 1):
        members = 1 if planned.spec.view == "sampled" else queried(planned.attack)
        passes = rough_passes(planned.attack) * members * len(job.subject.x)
        for repeat in range(job.seeds):
            yield cell_label(number, planned, plan, repeat), passes
