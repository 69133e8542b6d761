"""The file of a claim: what it holds, and how it is read and written. Needs no torch.

A claim holds the settings of a run without paths, the hash of its weights, what its training cost,
and for each threat and set of images the suites that were run, where and by which commit, both
headlines with intervals, every attack, and the self-checks. The correctness of each image under
each bounded attack is kept too, so that claims on the same images can be compared by paired
differences, over the attacks that both have met, and that every figure can be checked.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from redefense.config import one_line
from redefense.errors import DataError
from redefense.results.intervals import Estimate
from redefense.results.records import read_json
from redefense.results.schema import Budget, Check, Data
from redefense.runtime.files import write_text

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


class _Named(BaseModel):
    """What a claim's run must say, whatever else it holds."""

    class Data(BaseModel):
        spec: str

    class Defence(BaseModel):
        name: str

    class Ensemble(BaseModel):
        name: str
        num_members: int = Field(ge=1)
        mixture: tuple[float, ...] | None = None

    data: Data
    defence: Defence
    ensemble: Ensemble


class _Suite(BaseModel):
    """What the definition of a suite must say."""

    class Cell(BaseModel):
        attack: str
        view: str
        settings: dict[str, Any] = {}
        threat: Budget | None = None

    name: str
    cells: tuple[Cell, ...]


def _holding(kind: type[BaseModel], value: Any) -> Any:
    """The value as it is, if it holds what such data must hold."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(one_line(error)) from None
    return value


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
        version: hash of the suite's definition; None in claims made before suites had one.
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
    stochastic: Literal["auto", "on", "off"] = "auto"
    version: str | None = None
    provenance: dict[str, Any]

    @field_validator("suite")
    @classmethod
    def _defined(cls, value: Any) -> Any:
        return value if isinstance(value, str) else _holding(_Suite, value)

    @property
    def name(self) -> str:
        """Of the suite."""
        return self.suite if isinstance(self.suite, str) else str(self.suite["name"])


class Evaluated(_Data):
    """All suites of the run at one threat on one set of images, joined.

    Attributes:
        exact: whether expectations are over all members; False for a network that draws by itself,
            whose figures are estimates from `draws` fresh draws.
        aware_draws: the aware figure with the interval that other draws on these images would give.
        further: attacks that are no cell of a suite, but count for the headline; None where that
            was not stored, or no other attacks counted yet.
        checks: the self-checks; older claims name the red ones only.
    """

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
    exact: bool = True
    draws: int | None = None
    aware_draws: Figure | None = None
    cells: tuple[Attacked, ...]
    further: tuple[Attacked, ...] | None = None
    red_checks: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    untouched: str | None = Field(default=None, description="packed correctness of clean images")
    lowest: str | None = Field(description="per image, URL-safe base64 of 16-bit levels")

    @field_validator("data")
    @classmethod
    def _described(cls, value: Any) -> Any:
        return _holding(Data, value)

    @property
    def subject(self) -> tuple[int, str, str, float]:
        """Number of images, which ones, and the threat: what makes two of them comparable."""
        return self.data["num_images"], str(self.data), self.norm, self.eps

    @property
    def best_alone(self) -> Figure | None:
        """The member that keeps most of these images; the chosen one where only that is known."""
        return max(self.alone, key=lambda it: it.value, default=self.best_single_member)

    def per_image(self) -> NDArray[np.float64] | None:
        """(n,) the lowest expected correctness that any bounded attack left."""
        return None if self.lowest is None else _of_levels(base64.urlsafe_b64decode(self.lowest))

    def attacks(self) -> dict[Attack, Attacked]:
        """The bounded attacks, to find those that two runs met."""
        return {c.key: c for c in self.cells if c.bounded}


class Training(_Data):
    """What the training took.

    Attributes:
        images: seen, over all epochs.
        passes: forward-pass equivalents per member and image seen, counted.
        minutes: on the machine of the study, None where they were not logged.
        parameters: of all members together, as they are stored.
        weights: SHA-256 of the weights file, or of the weights where they were not trained by us.
    """

    epochs: int | None
    images: int | None
    passes: float | None
    minutes: float | None
    parameters: int | None = None
    weights: str


class Claim(_Data):
    """One run, or weights of anybody's training, and everything that was measured of it.

    Attributes:
        run: its settings; of weights that were not trained by us the name of the defence, the
            number of members, the data and the threat.
        authors, link, licence: who made the weights, where they are described, and on what terms.
        sha256: of all the rest; None in older claims.
    """

    version: Literal[1] = Field(default=1, alias="schema")
    name: str
    authors: str | None = None
    link: str | None = Field(default=None, pattern=r"^https?://\S+$")
    licence: str | None = None
    run: dict[str, Any]
    training: Training
    evaluations: tuple[Evaluated, ...] = Field(min_length=1)
    sha256: str | None = None

    @field_validator("run")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return _holding(_Named, value)

    @property
    def num_members(self) -> int:
        return int(self.run["ensemble"]["num_members"])

    @property
    def kind(self) -> Literal["single", "ensemble", "stochastic"]:
        """Of defence."""
        if not all(e.exact for e in self.evaluations):
            return "stochastic"
        return "ensemble" if self.num_members > 1 else "single"

    @property
    def trained(self) -> bool:
        """Whether `run` is all that it takes to train it again."""
        return self.training.epochs is not None

    @property
    def passes(self) -> float | None:
        """Forward-pass equivalents of one member that the whole training took."""
        took = self.training
        if took.images is None or took.passes is None:
            return None
        return took.images * took.passes * self.num_members

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


def figure(estimate: Estimate | None) -> Figure | None:
    if estimate is None:
        return None
    value, low, high = (None if v is None else round(float(v), 6) for v in estimate)
    assert value is not None
    return Figure(value=value, low=low, high=high)


def packed(
    q: NDArray[np.float64] | NDArray[np.bool_] | None, *, deflate: bool = True
) -> str | None:
    """Correctness (n,) in [0, 1] as text: 16-bit levels, deflated, in URL-safe base64."""
    if q is None:
        return None
    raw = np.rint(STEPS * q).astype("<u2").tobytes()
    return base64.urlsafe_b64encode(zlib.compress(raw, 9) if deflate else raw).decode()


def unpacked(text: str) -> NDArray[np.float64]:
    """What `packed` was given, to half a level."""
    raw = base64.urlsafe_b64decode(text)
    return _of_levels(zlib.decompressobj().decompress(raw, _MOST_BYTES))


_MOST_BYTES: Final = 2**26
"""Of the records of one attack: what others wrote must not fill the memory."""


def _of_levels(raw: bytes) -> NDArray[np.float64]:
    levels: NDArray[np.uint16] = np.frombuffer(raw, dtype="<u2")
    return levels / STEPS


def digest(value: object) -> str:
    """SHA-256 of data as JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def suite_version(suite: Mapping[str, Any]) -> str:
    """Names the attacks of a suite with their settings: 12 hexadecimal digits."""
    parts = {key: suite[key] for key in ("cells", "beside", "measures") if key in suite}
    return digest(parts)[:12]


def dumped(it: Claim) -> dict[str, Any]:
    """The claim as JSON, with the hash of all the rest."""
    found = it.model_dump(mode="json", by_alias=True, exclude={"sha256"})
    return {**found, "sha256": digest(found)}


def read(path: Path) -> Claim:
    """A stored claim.

    Raises:
        DataError: naming the file and the first key that is wrong.
    """
    return parse(read_json(path), path)


def parse(document: object, path: Path) -> Claim:
    """The same from decoded JSON."""
    try:
        return Claim.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is not a claim: {place}: {first['msg']}") from None


def write(it: Claim, path: Path) -> Path:
    write_text(path, json.dumps(dumped(it), indent=1) + "\n")
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
