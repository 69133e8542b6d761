"""Chooses the attacked images that every report shows."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from redefense.evaluation.cascade.attacked import SUFFIX, Attacked
from redefense.evaluation.cells import Cell
from redefense.evaluation.plan import Job, Planned
from redefense.evaluation.store import read_arrays, write_arrays
from redefense.results.accuracy import Floats
from redefense.results.examples import CANDIDATES, SHOWN, Examples
from redefense.stochastic.ensemble import Stochastic

FILE: Final = "examples.npz"
"""File name of the examples, in the folder of the records."""


def known_examples(
    job: Job,
    plan: Sequence[Planned],
    attacked: Attacked,
    records: Mapping[str, Cell],
    others: Mapping[str, Cell],
    mixture: Floats | None,
) -> Examples | None:
    """The worst point of each of the first images that some member classifies correctly when clean.

    Args:
        job: the evaluation.
        plan: its cells; the bounded ones at the threat of the headline count.
        attacked: the images that the attacks returned.
        records: of the cells, including "clean".
        others: records of further attacks at the threat of the headline.
        mixture: (M,) sampling probabilities; None for draws.

    Returns:
        The examples, which are saved as well; None for finished evaluations without saved images.
    """
    place = job.place(FILE)
    known = {p.identity for p in plan if p.attack.bounded and p.threat == job.threat}
    cells = {name: cell for name, cell in {**records, **others}.items()
             if (name in known or name in others) and name in attacked.images}  # fmt: skip
    # nothing was attacked now: the evaluation was finished before, and its examples are stored
    if not cells:
        stored = read_arrays(place)
        return None if stored is None else Examples.read(stored, str(place))
    found = _chosen(job, cells, records["clean"], attacked.images, mixture)
    if (saved := job.save(place)) is not None:
        write_arrays(saved, found.arrays())
    return found


def name_images(data: dict[str, Any], attacked: Attacked, examples: Examples | None) -> None:
    """Add the names of the image files to an evaluation's JSON."""
    if examples is not None:
        data["examples"] = f"{data['suite']}/{FILE}"
    if attacked.all:
        for cell in (*data["cells"], *data["further_cells"]):
            if cell["id"] in attacked.images:
                cell["images"] = f"{data['suite']}/{cell['id']}{SUFFIX}"


def _chosen(
    job: Job,
    cells: Mapping[str, Cell],
    clean: Cell,
    images: Mapping[str, NDArray[np.floating]],
    mixture: Floats | None,
) -> Examples:
    # the first ones, in the published random order, so that none is selected by its looks
    count = min(CANDIDATES, len(job.subject.x))
    rows = np.flatnonzero(clean.correct[:, :count].any(0))[:SHOWN]
    names = ["clean", *cells]
    corrects = [cell.correct[:, rows] for cell in (clean, *cells.values())]
    # of several attacks with the same accuracy, the earliest
    worst = np.stack([np.average(c, axis=0, weights=mixture) for c in corrects]).argmin(0)
    x = job.subject.x[:count].cpu().numpy()
    points = [x[row] if names[w] == "clean" else images[names[w]][row]
              for row, w in zip(rows, worst, strict=True)]  # fmt: skip
    attacked = np.stack(points) if points else x[:0]
    correct = np.stack([corrects[w][:, i] for i, w in enumerate(worst)], axis=1) if points else (
        clean.correct[:, :0]
    )  # fmt: skip
    return Examples(
        index=rows,
        label=job.subject.y[torch.from_numpy(rows).to(job.subject.y.device)].cpu().numpy(),
        attack=np.array([names[w] for w in worst], dtype=np.str_),
        clean=x[rows],
        attacked=attacked,
        correct=correct,
        predicted=_predicted(job, attacked),
    )


def _predicted(job: Job, attacked: NDArray[np.floating]) -> NDArray[np.int64]:
    """(M, k) predicted classes."""
    ensemble = job.subject.ensemble
    if isinstance(ensemble, Stochastic):  # the scoring draws cannot be repeated
        return np.zeros((0, len(attacked)), dtype=np.int64)
    with torch.no_grad():
        logits = ensemble.member_logits(torch.from_numpy(attacked).to(job.subject.x))
    found: NDArray[np.int64] = logits.argmax(-1).cpu().numpy()
    return found
