"""Keeps the best adversarial points so far, as starting points for later attacks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redefense.evaluation.cascade.worst_case import EQUAL, WorstCase
from redefense.evaluation.cells import Task
from redefense.evaluation.store import Arrays, ChunkStore
from redefense.results.accuracy import Bools
from redefense.results.intervals import exact_expectation
from redefense.types import Images

LIMIT: Final = 2**30
"""Limit in bytes of images whose points are kept; attacks on others have no starting points."""


class Points:
    """For each attack, its points on the images whose worst case it lowered.

    They are kept until the evaluation ends. If points are missing, the same attack computes them
    again.

    Args:
        x: (n, C, H, W) the clean images.
        folder: folder of the points, by chunk; in memory if None.
    """

    def __init__(self, x: Images, folder: Path | None) -> None:
        self._x, self._chunks = x, ChunkStore(folder)
        self._tasks: dict[str, Task] = {}
        self._count = LIMIT // max(1, x[0].numel() * x.element_size())

    def kept(self, task: Task, worst: WorstCase) -> Task:
        """The same task, with a callback that keeps points worse than all before."""
        mixture, q = worst.mixture, worst.q

        def keep(images: slice, rows: NDArray[np.int64], x_adv: Images, correct: Bools) -> None:
            left = exact_expectation(correct, mixture)
            # points that fool all members start nothing: their images are not attacked again
            some = (left < q[images][rows] - EQUAL) & (left > EQUAL)
            some &= images.start + rows < self._count
            points = x_adv[torch.from_numpy(some).to(x_adv.device)].cpu().numpy()
            arrays = {"rows": rows[some], "points": points}
            self._chunks.write(task.name, images.start, arrays)

        self._tasks[task.name] = replace(task, keep=keep)
        return self._tasks[task.name]

    def starts(self, worst: WorstCase) -> Callable[[slice], Tensor]:
        """Function from a chunk to its current best points (1, B, C, H, W), or clean images."""
        # copied now, so that a chunk that is computed again starts from the same points
        source = np.array(worst.source)

        def best(images: slice) -> Tensor:
            x, names = self._x[images].clone(), source[images]
            for name in np.unique(names[names != "clean"]).tolist():
                if (found := self._read(name, images)) is None:
                    continue
                chosen = names[found["rows"]] == name
                rows = torch.from_numpy(found["rows"][chosen]).to(x.device)
                x[rows] = torch.from_numpy(found["points"][chosen]).to(x)
            return x[None]

        return best

    def forget(self) -> None:
        """Remove them."""
        self._chunks.forget()

    def _read(self, name: str, images: slice) -> Arrays | None:
        found = self._chunks.read(name, images.start)
        if found is None and name in self._tasks:
            # the records of an earlier process were reused, which did not leave its points
            self._tasks[name].chunk(images)
            found = self._chunks.read(name, images.start)
        return found
