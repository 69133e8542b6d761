"""Stored evaluations: read, checked and joined image by image. Needs neither torch nor a model.

One *result* is a run at one threat on one set of images. The suites of a run that share all three
are joined, so that the worst case is per image over all attacks.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from redefense.config import first_fault
from redefense.errors import BAD_JSON, DataError
from redefense.results.examples import Examples
from redefense.results.intervals import Estimate, accuracy_interval, exact_expectation
from redefense.results.schema import Accuracy, Budget, Cell, Evaluation, Plan
from redefense.runtime.folders import BASELINES, EVALUATION, PLAN, RUN, evaluation_files

Source = Path | Mapping[str, Any]
"""A run's directory, one evaluation file, or an evaluation already loaded from JSON."""

_Kind = TypeVar("_Kind", bound=BaseModel)

BAD_ARRAYS = (
    OSError, ValueError, EOFError, LookupError, MemoryError, RuntimeError, BadZipFile, zlib.error,
    struct.error,
)  # fmt: skip
"""Exceptions of numpy and zipfile for damaged npz files."""

AGREE = 1e-4  # a stored mean differs from that of its per-image records by rounding only


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scored:
    """A cell with its per-image records, if they exist.

    Attributes:
        correct: (M, n) correctness of every member; None without records.
        q: (n,) exact expected correctness, the mixture-weighted mean of `correct`.
        met: (n,) the images that were attacked; None for all, or if unknown. The others have their
            earlier worst case.
        averaged: (n,) correctness of the averaged ensemble; None without records.
    """

    cell: Cell
    suite: str
    correct: NDArray[np.bool_] | None
    q: NDArray[np.float64] | None
    met: NDArray[np.bool_] | None = None
    num_images: int | None = None
    averaged: NDArray[Any] | None = None

    @property
    def whole(self) -> bool:
        """Whether the attack ran on all images, so that its accuracy does not depend on others."""
        if self.met is not None:
            return bool(self.met.all())
        return self.cell.met is None or self.cell.met == self.num_images

    @property
    def expected(self) -> Estimate | None:
        """Its accuracy; None if it is unknown or not over all images."""
        if not self.whole:
            return None
        value = self.cell.accuracy.expected
        if value is not None and self.cell.interval is not None:
            return Estimate(value, *self.cell.interval)
        if self.q is not None:
            return accuracy_interval(self.q)
        return None if value is None else Estimate(value)

    @property
    def label(self) -> str:
        return self.cell.label or f"{self.cell.attack} ({self.cell.view or 'view unknown'})"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stored:
    """One suite of one run, read from disk or given as JSON (then without records).

    Attributes:
        source: the run or the file given by the user; None for JSON.
        file: path of the evaluation, relative to `source`.
        plan: its settings; None if they are not stored.
        further: attacks that count for the headline, besides the cells of the suite.
        examples: a few attacked images for display, if they are stored.
    """

    name: str
    source: Path | None
    file: Path | None
    plan: Plan | None
    evaluation: Evaluation
    index: NDArray[np.int64] | None
    clean: Scored
    cells: tuple[Scored, ...]
    further: tuple[Scored, ...]
    single: NDArray[np.float64] | None
    averaged: NDArray[np.float64] | None
    alone: NDArray[np.float64] | None
    examples: Examples | None = None

    @property
    def folder(self) -> Path | None:
        """The folder of its records."""
        return None if self.file is None else self.file.parent

    @property
    def missing(self) -> tuple[str, ...]:
        """Missing files of the per-image records that the evaluation lists."""
        scored = (self.clean, *self.cells, *self.further)
        return tuple(s.cell.per_image for s in scored if s.q is None and s.cell.per_image)

    @property
    def budget(self) -> tuple[str, float | None]:
        """The threat of the suite: that of its bounded cells, aware ones first."""
        bounded = [c.cell for c in self.cells if c.cell.bounded and c.cell.threat is not None]
        first = min(bounded, key=lambda cell: not cell.aware, default=None)
        return _budget(first.threat) if first is not None else ("inf", None)

    @property
    def images(self) -> tuple[str, str, int, str]:
        """Identifies the images: suites with equal values can be joined."""
        data = self.evaluation.data
        digest = "" if self.index is None else hashlib.sha256(self.index.tobytes()).hexdigest()
        # indices tell the choice of images, the checksum their content
        return data.name, data.split, data.num_images, f"{digest} {data.sha256}"


def _budget(threat: Budget | None) -> tuple[str, float | None]:
    if threat is None:
        return "inf", None
    return threat.norm, None if threat.eps is None else round(threat.eps, 9)


def parse(document: object, where: str = "evaluation") -> Evaluation:
    """One stored evaluation from decoded JSON.

    Raises:
        DataError: for a missing key or a wrong value; it names the file and the first such key.
    """
    if not isinstance(document, Mapping):
        raise DataError(f"{where} is not an evaluation: expected an object")
    if document.get("schema") != 1:
        raise DataError(f"{where} has schema {document.get('schema')!r}, this version reads 1")
    # claim files have a schema of the same number
    if "evaluations" in document and "suite" not in document:
        raise DataError(
            f"{where} is a claim file, not an evaluation: check it with `redefense claim "
            f"check {where}`, or give the directory of its run"
        )
    return valid(Evaluation, dict(document), f"{where} is not a valid evaluation")


def valid(kind: type[_Kind], document: object, wrong: str) -> _Kind:
    """A record from decoded JSON.

    Raises:
        DataError: that begins with `wrong`, with the first wrong key, the rule and the value.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise DataError(f"{wrong}: {first_fault(error)}") from None


def read_json(path: Path) -> object:
    """Decoded JSON of a file.

    Raises:
        DataError: if the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except BAD_JSON as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None


def _arrays(folder: Path | None, relative: str | None) -> dict[str, NDArray[Any]]:
    """Arrays of one npz below `folder`; empty if there is no such file."""
    if folder is None or relative is None:
        return {}
    path = (folder / relative).resolve()
    # an evaluation may come from elsewhere, and must not read other files
    if not path.is_relative_to(folder.resolve()):
        raise DataError(f"{relative} points outside {folder}: refused")
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except BAD_ARRAYS as error:
        raise DataError(f"cannot read {path}: {error}") from None


def mixture_of(evaluation: Evaluation, num_members: int) -> NDArray[np.float64]:
    """(M,) stored sampling probabilities, or uniform ones."""
    stored = evaluation.mixture
    if stored is None:
        ensemble = evaluation.run.get("ensemble")
        stored = ensemble.get("mixture") if isinstance(ensemble, dict) else None
    if not stored:
        return np.full(num_members, 1 / num_members)
    weights = np.asarray(stored, dtype=np.float64)
    if weights.shape != (num_members,) or weights.min() < 0 or abs(weights.sum() - 1) > 1e-6:
        raise DataError(f"mixture {list(stored)} is not a distribution over {num_members} members")
    return weights


def _scored(evaluation: Evaluation, cell: Cell, arrays: Mapping[str, NDArray[Any]]) -> Scored:
    n, suite = evaluation.data.num_images, evaluation.suite
    if "correct" not in arrays:
        return Scored(cell=cell, suite=suite, correct=None, q=None, num_images=n)
    correct = arrays["correct"].astype(bool)
    if correct.ndim != 2 or correct.shape[1] != n:
        raise DataError(f"records of {cell.id} have shape {correct.shape}, expected (M, {n})")
    q = exact_expectation(correct, mixture_of(evaluation, len(correct)))
    stored = cell.accuracy.expected
    # a figure that its records do not give was edited, or belongs to other records
    if stored is not None and abs(float(q.mean()) - stored) > AGREE:
        raise DataError(
            f"{evaluation.suite}: {cell.id} states an accuracy of {stored:.4f}, "
            f"its per-image records give {q.mean():.4f}"
        )
    met = arrays["met"].astype(bool) if "met" in arrays else None
    if met is not None and met.shape != (n,):
        raise DataError(f"records of {cell.id}: met has shape {met.shape}, expected ({n},)")
    averaged = arrays.get("averaged")
    if averaged is not None and averaged.shape != (n,):
        raise DataError(
            f"records of {cell.id}: averaged has shape {averaged.shape}, expected ({n},)"
        )
    return Scored(
        cell=cell, suite=suite, correct=correct, q=q, met=met, num_images=n, averaged=averaged
    )


def _plan(file: Path | None) -> Plan | None:
    """The plan stored with an evaluation; None if there is none."""
    if file is None or not (path := file.with_suffix("") / PLAN).is_file():
        return None
    return valid(Plan, read_json(path), f"{path} is not a valid plan")


def _stored(
    name: str, evaluation: Evaluation, source: Path | None = None, file: Path | None = None
) -> Stored:
    suite, n = evaluation.suite, evaluation.data.num_images
    folder = None if file is None else file.parent
    clean_cell = Cell(
        id="clean",
        attack="clean",
        accuracy=Accuracy(expected=evaluation.clean.expected),
        interval=evaluation.clean.interval,
    )
    # evaluations given as JSON may not name it
    clean_file = evaluation.clean.per_image or f"{suite}/clean.npz"
    every = (*evaluation.cells, *evaluation.further_cells)
    arrays = [_arrays(folder, cell.per_image) for cell in every]
    plan = evaluation.plan or _plan(file)
    clean = _arrays(folder, clean_file)
    # the folder of the records has the name of the evaluation's file
    baselines_file = str(PurePosixPath(clean_file).with_name(BASELINES))
    baselines = _arrays(folder, baselines_file)
    indices = [a["index"] for a in [clean, *arrays] if "index" in a]
    # a worst case per image needs the same image in each row
    if any(not np.array_equal(indices[0], other) for other in indices):
        raise DataError(f"{name}: cells of suite {suite} were run on different images")
    for key in baselines.keys() & {"single", "averaged"}:
        if baselines[key].shape != (n,):
            raise DataError(f"{name}: {baselines_file}: {key} must have shape ({n},)")
    alone = baselines.get("members")
    if alone is not None and (alone.ndim != 2 or alone.shape[1] != n):
        raise DataError(f"{name}: {baselines_file}: members must have shape (M, {n})")
    scored = [_scored(evaluation, c, a) for c, a in zip(every, arrays, strict=True)]
    own = len(evaluation.cells)
    return Stored(
        name=name,
        source=source,
        file=file,
        plan=plan,
        evaluation=evaluation,
        index=indices[0].astype(np.int64) if indices else None,
        clean=_scored(evaluation, clean_cell, clean),
        cells=tuple(c for c in scored[:own] if c.cell.attack != "clean"),
        further=tuple(scored[own:]),
        single=baselines["single"].astype(np.float64) if "single" in baselines else None,
        averaged=baselines["averaged"].astype(np.float64) if "averaged" in baselines else None,
        alone=None if alone is None else alone.astype(np.float64),
        examples=Examples.read(_arrays(folder, evaluation.examples), str(evaluation.examples)),
    )


def _is_evaluation(document: object) -> bool:
    return isinstance(document, Mapping) and {"schema", "suite", "cells"} <= document.keys()


def load(source: Source, position: int = 1) -> list[Stored]:
    """All suites stored for one run, in the order of their file names.

    Raises:
        DataError: if there is no run or no evaluation, or an evaluation is damaged or contradicts
            its per-image records.
    """
    if isinstance(source, Mapping):
        evaluation = parse(source)
        return [_stored(str(evaluation.run.get("name") or f"run {position}"), evaluation)]
    if source.is_file():
        evaluation = parse(read_json(source), str(source))
        run = source.parent.parent if source.parent.name == EVALUATION else source
        # without a run around it the file itself gives the name
        return [_stored(run.resolve().stem, evaluation, source, source)]
    if not source.exists() and source.suffix == ".json":
        raise DataError(f"there is no evaluation {source}: write it with `redefense evaluate DIR`")
    if not source.exists():
        raise DataError(
            f"there is no run at {source}: run `redefense train RECIPE --out {source}` first"
        )
    return [
        _stored(source.resolve().name, parse(document, str(path)), source, path)
        for path, document in evaluations_of(source).items()
    ]


def evaluations_of(run: Path) -> dict[Path, object]:
    """The evaluations of a run as JSON, in the order of their file names.

    Raises:
        DataError: if there is none, or a file cannot be read.
    """
    found = {path: read_json(path) for path in evaluation_files(run)}
    evaluations = {path: document for path, document in found.items() if _is_evaluation(document)}
    if not evaluations:
        raise DataError(f"{run} holds no evaluation: run `redefense evaluate {run}` first")
    return evaluations


def runs_in(source: Source) -> list[Source]:
    """The evaluated runs of a folder of runs, sorted by path; any other source unchanged.

    A folder that is a run itself, or contains no evaluated run, is returned unchanged.
    """
    if not isinstance(source, Path) or not source.is_dir():
        return [source]
    if (source / EVALUATION).is_dir() or (source / RUN).is_file():
        return [source]
    found = sorted({path.parent.parent for path in source.rglob("evaluation/[!.]*.json")})
    return list(found) or [source]


def load_all(sources: Iterable[Source]) -> list[Sequence[Stored]]:
    """The suites of every run; runs of the same name are distinguished by their position.

    A folder of runs is replaced by its evaluated runs.
    """
    each = [run for source in sources for run in runs_in(source)]
    runs = [load(source, position) for position, source in enumerate(each, 1)]
    names = [run[0].name for run in runs]
    # tables and charts name results by their run
    return [
        [replace(s, name=f"{s.name} #{i}") for s in run] if names.count(run[0].name) > 1 else run
        for i, run in enumerate(runs, 1)
    ]
