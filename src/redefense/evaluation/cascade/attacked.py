"""Keeps attacked images: always of a few images, for display, and of all on request."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from redefense.evaluation.cascade.worst_case import WorstCase
from redefense.evaluation.cells import Cell, Keep, Task
from redefense.evaluation.plan import Job
from redefense.evaluation.store import ChunkStore, read_arrays, write_arrays
from redefense.results.examples import CANDIDATES
from redefense.types import Images

SUFFIX: Final = ".images.npz"
"""Suffix of the file with a cell's attacked images, next to its records."""


class Attacked:
    """The images that each attack returned.

    Args:
        job: the evaluation; if it keeps images, those of each finished attack are saved next to its
            records and read from there when resuming.

    Attributes:
        images: (k, C, H, W) by the name of the attack: all images if the job keeps them, else the
            first `CANDIDATES`.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._x = job, job.subject.x
        # chunks of the first images alone do not serve a call that keeps all
        self._chunks = ChunkStore(job.place("attacked" + ".all" * job.keep_images))
        self._count = len(self._x) if job.keep_images else min(len(self._x), CANDIDATES)
        self._bytes = 0
        self.images: dict[str, NDArray[np.floating]] = {}

    @property
    def all(self) -> bool:
        """Whether all images are kept."""
        return self._job.keep_images

    def kept(self, task: Task) -> Task:
        """The same task, with a callback that keeps its images."""
        return replace(task, keep=self.keeping(task.name, task.keep))

    def keeping(self, name: str, before: Keep | None = None) -> Keep:
        """A callback that keeps the images of an attack, after calling `before`."""

        def keep(
            images: slice, rows: NDArray[np.int64], x_adv: Images, correct: NDArray[np.bool_]
        ) -> None:
            if before is not None:
                before(images, rows, x_adv, correct)
            if images.start >= self._count:
                return
            some = images.start + rows < self._count
            points = x_adv[torch.from_numpy(some).to(x_adv.device)].cpu().numpy()
            arrays = {"rows": images.start + rows[some], "points": points}
            self._chunks.write(name, images.start, arrays)

        return keep

    def chunks_of(self, name: str) -> Path | None:
        """The folder of an unfinished attack; without saved images its chunks cannot be reused."""
        return self._job.place(f"{name}{'.images' * self.all}.chunks")

    def stored(self, name: str) -> bool:
        """Whether all images of a finished attack are saved, if they were requested."""
        if not self.all:
            return True
        found = read_arrays(self._job.place(name + SUFFIX))
        if found is None or len(found.get("images", ())) != self._count:
            return False
        self.images[name] = found["images"]
        return True

    def finish(self, name: str, cell: Cell, worst: WorstCase | None = None) -> None:
        """Collect the images of an attack."""
        if name in self.images:
            return
        # a copy: on the CPU the array shares the memory of the evaluated images
        images = self._x[: self._count].cpu().numpy().copy()
        size = self._job.subject.chunk
        for start in range(0, self._count, size):
            if not cell.met[start : min(start + size, self._count)].any():
                continue
            if (part := self._chunks.read(name, start)) is None:
                return  # the evaluation was finished without saved images
            images[part["rows"]] = part["points"]
        # skipped images get the point that fooled them before, which the records describe
        if worst is not None:
            for row in np.flatnonzero(~cell.met[: self._count]).tolist():
                if (fooled_by := worst.source[row]) in self.images:
                    images[row] = self.images[fooled_by][row]
        self.images[name] = images
        if self.all and (place := self._job.save(self._job.place(name + SUFFIX))):
            write_arrays(place, {"index": self._job.subject.index, "images": images})
            self._bytes += place.stat().st_size

    def forget(self) -> None:
        """Remove the saved chunks, and log the size of the files of all images."""
        if self._job.subject.workers.first:
            self._chunks.forget()
        if self._bytes:
            self._job.log(
                f"{self._job.suite.name}: attacked images of {len(self.images)} attacks, "
                f"{self._bytes / 1e6:.3g} MB, in {self._job.place('*' + SUFFIX)}"
            )
