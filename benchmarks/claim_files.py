"""The file of a claim: what it holds, how it is made of a run, and how it is read.

`claims.py` is the command. A claim holds the resolved run without paths, the hash of its weights,
what its training cost, and for each threat and set of images the suites that were run, where and by
which commit, both headlines with intervals, every attack, and the red self-checks. The correctness
of each image under each bounded attack is kept too, so that claims on the same images can be
compared by paired differences, over the attacks that both have met.
"""

import base64
import json
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redefense.errors import DataError
from redefense.evaluation.suite import SUITES
from redefense.hub.pretrained import without_paths
from redefense.results.intervals import Estimate
from redefense.results.join import Result, join
from redefense.results.records import Stored
from redefense.train.cost import count
from redefense.train.loading import find_final

STEPS: Final = 65535
"""Levels in which the correctness of an image is kept."""

Attack = tuple[str, str, str]
"""Name, view and the call that rebuilds it."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(_Data):
    """A fraction, or a difference of two, with its 95 % interval where one is known."""

    value: float = Field(ge=-1, le=1)
    low: float | None = Field(default=None, ge=-1, le=1)
    high: float | None = Field(default=None, ge=-1, le=1)

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.value, self.low, self.high)


class Attacked(_Data):
    """One cell: the call that rebuilds the attack, and the exact expected accuracy it left.

    Attributes:
        expected: None where it did not meet all images.
        faced: in older claims, whether it was also run on the single members and on the average.
        each: packed correctness per image, of bounded attacks.
        met: which images it met, packed as correctness is; None for all. Where an attack did not
            meet an image, that was lost before it.
    """

    id: str
    attack: str
    view: str
    aware: bool
    bounded: bool
    repr: str
    expected: Figure | None
    faced: bool = False
    each: str | None = None
    met: str | None = None

    @property
    def key(self) -> Attack:
        """What makes two cells the same attack, whoever met it."""
        return self.attack, self.view, self.repr


class Plan(_Data):
    """How a suite was run.

    Attributes:
        file: name of the evaluation in the run's folder.
        suite: its name, or its whole definition if it is not one of ours.
        cascade: whether images that are lost were left out, where that is not the suite's choice.
    """

    file: str
    suite: str | dict[str, Any]
    norm: Literal["inf", "2"]
    eps: float
    images: int | None
    seed: int
    seeds: int
    checks: str
    cascade: bool | None = None
    provenance: dict[str, Any]


class Evaluated(_Data):
    """All suites of the run at one threat on one set of images, joined."""

    data: dict[str, Any]
    norm: Literal["inf", "2"]
    eps: float
    suites: tuple[Plan, ...]
    clean: Figure | None
    clean_members: tuple[float, ...] = ()
    unaware: Figure | None
    aware: Figure | None
    best_single_member: Figure | None
    averaged: Figure | None
    over_single: Figure | None
    over_averaged: Figure | None
    alone: tuple[Figure, ...] = ()
    over_alone: Figure | None = None
    cells: tuple[Attacked, ...]
    red_checks: tuple[str, ...]
    untouched: str | None = Field(default=None, description="packed correctness of clean images")
    lowest: str | None = Field(description="per image, URL-safe base64 of 16-bit levels")

    @property
    def subject(self) -> tuple[int, str, str, float]:
        """Number of images, which ones, and the threat: what makes two of them comparable."""
        return self.data["num_images"], str(self.data), self.norm, self.eps

    def per_image(self) -> NDArray[np.float64] | None:
        """(n,) the lowest expected correctness that any bounded attack left."""
        if self.lowest is None:
            return None
        raw = base64.urlsafe_b64decode(self.lowest)
        levels: NDArray[np.uint16] = np.frombuffer(raw, dtype="<u2")
        return levels / STEPS

    def attacks(self) -> dict[Attack, Attacked]:
        """The bounded attacks, to find those that two runs met."""
        return {c.key: c for c in self.cells if c.bounded}


class Training(_Data):
    """What the training took.

    Attributes:
        images: seen, over all epochs.
        passes: forward-pass equivalents per member and image seen, counted.
        minutes: on the machine of the study, None where they were not logged.
        weights: SHA-256 of the weights file.
    """

    epochs: int
    images: int
    passes: float
    minutes: float | None
    weights: str


class Claim(_Data):
    """One run and everything that was measured of it."""

    version: Literal[1] = Field(default=1, alias="schema")
    name: str
    run: dict[str, Any]
    training: Training
    evaluations: tuple[Evaluated, ...] = Field(min_length=1)

    @property
    def passes(self) -> float:
        """Forward-pass equivalents of one member that the whole training took."""
        members: int = self.run["ensemble"]["num_members"]
        return self.training.images * self.training.passes * members

    @property
    def headline(self) -> Evaluated:
        """The evaluation with an aware figure under most attacks, that on most images first."""
        known = [e for e in self.evaluations if e.aware is not None] or list(self.evaluations)
        return max(known, key=lambda e: (len(e.cells), e.data["num_images"]))

    def on(self, images: int) -> "Claim | None":
        """The claim with nothing but what was measured on so many images; None if nothing was."""
        found = tuple(e for e in self.evaluations if e.data["num_images"] == images)
        return self.model_copy(update={"evaluations": found}) if found else None

    def keeping(self, older: "Claim") -> "Claim":
        """With what an older claim says of the same weights on other images or at other threats."""
        if older.training.weights != self.training.weights:
            return self
        mine = {e.subject for e in self.evaluations}
        others = [e for e in older.evaluations if e.subject not in mine]
        both = sorted([*self.evaluations, *others], key=lambda e: e.subject)
        return self.model_copy(update={"evaluations": tuple(both)})


def claim(run: Path) -> Claim:
    """The claim of an evaluated run.

    Raises:
        DataError: if the run is not trained, not evaluated or damaged.
    """
    checkpoint = find_final(run)
    data = checkpoint.state["data"]
    clean_run = without_paths(checkpoint.run)
    cost = count(clean_run, num_classes=len(data["classes"]), shape=tuple(data["shape"]))
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    return Claim(
        name=run.resolve().name,
        run=clean_run.model_dump(mode="json"),
        training=Training(
            epochs=clean_run.epochs,
            images=cost.steps * cost.batch,
            passes=round(cost.passes(), 2),
            minutes=None,
            weights=manifest["sha256"]["weights.safetensors"],
        ),
        evaluations=tuple(sorted(map(evaluated, join([run])), key=lambda e: e.subject)),
    )


def evaluated(result: Result) -> Evaluated:
    """One joined result as data."""
    data = result.evaluations[0].data
    assert result.norm in ("inf", "2")
    return Evaluated(
        data={**data.model_dump(), "num_images": data.num_images},
        norm="2" if result.norm == "2" else "inf",
        eps=0.0 if result.eps is None else result.eps,
        suites=tuple(planned(stored) for stored in result.suites),
        clean=figure(result.clean),
        clean_members=tuple(round(value, 6) for value in result.clean_members),
        unaware=figure(result.unaware),
        aware=figure(result.aware),
        best_single_member=figure(result.single),
        averaged=figure(result.averaged),
        over_single=figure(result.over_single),
        over_averaged=figure(result.over_averaged),
        alone=tuple(f for e in result.alone if (f := figure(e)) is not None),
        over_alone=figure(result.over_alone),
        cells=tuple(
            Attacked(
                id=scored.cell.id, attack=scored.cell.attack, view=scored.cell.view,
                aware=scored.cell.aware, bounded=scored.cell.bounded, repr=scored.cell.repr,
                expected=figure(scored.expected),
                each=packed(scored.q) if scored.cell.bounded else None,
                met=None if scored.whole or scored.met is None else packed(scored.met),
            )
            for scored in result.cells
            if scored.expected is not None or scored.q is not None
        ),
        red_checks=tuple(c.id for c in result.checks if c.passed is False),
        untouched=packed(result.suites[0].clean.q),
        lowest=lowest(result),
    )  # fmt: skip


def figure(estimate: Estimate | None) -> Figure | None:
    if estimate is None:
        return None
    value, low, high = (None if v is None else round(float(v), 6) for v in estimate)
    assert value is not None
    return Figure(value=value, low=low, high=high)


def lowest(result: Result) -> str | None:
    """Per image, the lowest expected correctness over clean image and everything that was run."""
    if result.q_aware is None:
        return None
    levels = np.rint(STEPS * result.q_aware).astype("<u2")
    return base64.urlsafe_b64encode(levels.tobytes()).decode()


def packed(q: NDArray[np.float64] | NDArray[np.bool_] | None) -> str | None:
    """Correctness (n,) in [0, 1] as text: deflated 16-bit levels in URL-safe base64."""
    if q is None:
        return None
    levels = np.rint(STEPS * q).astype("<u2")
    return base64.urlsafe_b64encode(zlib.compress(levels.tobytes(), 9)).decode()


def unpacked(text: str) -> NDArray[np.float64]:
    """What `packed` was given, to half a level."""
    raw = zlib.decompress(base64.urlsafe_b64decode(text))
    levels: NDArray[np.uint16] = np.frombuffer(raw, dtype="<u2")
    return levels / STEPS


def planned(stored: Stored) -> Plan:
    """How a stored suite was run.

    Raises:
        DataError: if the evaluation's plan is missing.
    """
    plan, file = stored.plan, stored.file
    if plan is None or file is None or plan.threat.eps is None:
        raise DataError(f"{stored.name}: {file} has no plan.json, so it cannot be recomputed")
    name = plan.suite["name"]
    whole = {**plan.suite, "cascade": name in SUITES and SUITES[name].cascade}
    ours = name in SUITES and SUITES[name].model_dump(mode="json") == whole
    chosen = None if whole == plan.suite or not ours else bool(plan.suite.get("cascade"))
    return Plan(
        file=file.stem, suite=name if ours else plan.suite,
        norm="2" if plan.threat.norm == "2" else "inf",
        eps=plan.threat.eps, images=plan.images, seed=plan.seed, seeds=plan.seeds,
        checks=plan.checks, cascade=chosen, provenance=stored.evaluation.provenance,
    )  # fmt: skip


def read(path: Path) -> Claim:
    """A stored claim.

    Raises:
        DataError: naming the file and the first key that is wrong.
    """
    try:
        return Claim.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is not a claim: {place}: {first['msg']}") from None


def write(it: Claim, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{it.name}.json"
    path.write_text(json.dumps(it.model_dump(mode="json", by_alias=True), indent=1) + "\n")
    return path


def least(found: Evaluated, attacks: Collection[Attack]) -> NDArray[np.float64]:
    """Per image, the lowest correctness over the clean image and these attacks.

    NaN where that is not known: where one of them did not meet an image that none of the others
    took, because an attack that is not among them had.

    Raises:
        DataError: if there is no attack, or the claim does not keep what they left of each image.
    """
    if not attacks or found.untouched is None:
        raise DataError(_ANEW)
    lowest, known = unpacked(found.untouched), np.ones(found.data["num_images"], dtype=bool)
    for cell in (found.attacks()[attack] for attack in attacks):
        if cell.each is None:
            raise DataError(_ANEW)
        left = unpacked(cell.each)
        met = np.ones_like(known) if cell.met is None else unpacked(cell.met) > 0
        lowest, known = np.where(met, np.minimum(lowest, left), lowest), known & met
    return np.where(known | (lowest == 0), lowest, np.nan)


_ANEW: Final = "a claim does not keep what each attack left of each image: make it anew"
