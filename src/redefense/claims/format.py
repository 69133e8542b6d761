"""The format of a claim: schema, reading and writing. Needs no torch.

A claim has the settings of a run without paths, the hash of its weights, the cost of its training,
and for each threat and set of images the suites with their machine and commit, both headlines with
intervals, every attack, and the self-checks. It also has the per-image correctness under each
bounded attack, so that every figure can be checked and claims on the same images can be compared by
paired differences under matched attacks.
"""

import base64
import zlib
from collections.abc import Collection
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from redefense.config import first_fault
from redefense.errors import ConfigError, DataError
from redefense.results import paired
from redefense.results.intervals import Estimate
from redefense.results.paired import Attack
from redefense.results.records import read_json, valid
from redefense.results.schema import Budget, Check, Data, digest
from redefense.runtime.files import write_json

STEPS: Final = 65535
"""Number of quantisation levels of an image's correctness."""


def file_name(value: str) -> str:
    """The unchanged name, if it is one part of a path, on any system.

    Raises:
        ConfigError: otherwise.
    """
    # Windows knows all separators, and drives
    one = value.isprintable() and PureWindowsPath(value).parts == (value,)
    if not one or value.startswith("."):
        raise ConfigError(
            "a name in a claim must be printable text without / and \\, and not begin with '.', "
            f"got {value!r}; choose another name"
        )
    return value


# a claim may come from anybody, and recomputing it writes files of these names
_FileName = Annotated[str, AfterValidator(file_name)]


class _Data(BaseModel):
    # NaN would pass every comparison with a tolerance
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Figure(_Data):
    """A fraction, or a difference of two, with its 95 % interval if known."""

    value: float = Field(ge=-1, le=1)
    low: float | None = Field(default=None, ge=-1, le=1)
    high: float | None = Field(default=None, ge=-1, le=1)

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.value, self.low, self.high)


# further keys are allowed here, since they depend on the version and on plug-ins
class _Named(BaseModel):
    """The required keys of a claim's run."""

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
    """The required keys of the definition of a suite."""

    class Cell(BaseModel):
        attack: str
        view: str
        settings: dict[str, Any] = {}
        threat: Budget | None = None

    name: _FileName
    cells: tuple[Cell, ...]


def _holding(kind: type[BaseModel], value: Any) -> Any:
    """The unchanged value, after validating its required keys."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
    # not the model: further keys are kept, and are part of the hash
    return value


class Attacked(_Data):
    """One cell: the repr of the attack, and the exact expected accuracy under it.

    Attributes:
        expected: None if the attack did not run on all images.
        on_baselines: in older claims, whether the attack was also run on the baselines.
        each: packed per-image correctness, of bounded attacks.
        met: the attacked images, packed in the same way; None for all. The others were fooled
            before.
    """

    id: str
    attack: str
    view: str
    aware: bool
    bounded: bool
    repr: str
    expected: Figure | None
    on_baselines: bool = False
    each: str | None = None
    met: str | None = None

    @property
    def key(self) -> Attack:
        """Key that is equal for equal attacks on different models."""
        return self.attack, self.view, self.repr


class Plan(_Data):
    """Settings with which a suite was run.

    Attributes:
        file: name of the evaluation in the run's folder.
        suite: its name, or its whole definition if it is not a built-in suite.
        cascade: whether fooled images were skipped, if that differs from the suite's setting.
        precision: of aware attacks' queries, if that differs from the suite's setting.
        batch_size: images per call, where random numbers depend on it; else None.
        version: hash of the suite's definition; None in claims made before suites had one.
    """

    file: _FileName
    suite: str | dict[str, Any]
    norm: Literal["inf", "2"]
    eps: float
    images: int | None
    seed: int
    seeds: int
    checks: str
    cascade: bool | None = None
    precision: Literal["fp32", "auto", "bf16"] | None = None
    stochastic: Literal["auto", "on", "off"] = "auto"
    batch_size: int | None = None
    version: str | None = None
    provenance: dict[str, Any]

    @field_validator("suite")
    @classmethod
    def _defined(cls, value: Any) -> Any:
        return value if isinstance(value, str) else _holding(_Suite, value)

    @property
    def name(self) -> str:
        """The suite's name."""
        return self.suite if isinstance(self.suite, str) else str(self.suite["name"])


class Evaluated(_Data):
    """All suites of the run at one threat on one set of images, joined.

    Attributes:
        exact: whether expectations are over all members; False for a stochastic network, whose
            figures are estimates from `draws` fresh draws.
        aware_draws: the aware figure with its interval over the draws, for fixed images.
        further: attacks that count for the headline but are no cells of a suite; None if they were
            not stored.
        checks: the self-checks; older claims have the failed ones only.
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
        """Number and hash of the images, and the threat; equal for comparable evaluations."""
        return self.data["num_images"], str(self.data), self.norm, self.eps

    @property
    def best_alone(self) -> Figure | None:
        """Accuracy of the best single member, or of the chosen one if only that is known."""
        return max(self.alone, key=lambda it: it.value, default=self.best_single_member)

    @property
    def protocol(self) -> list[list[Any]]:
        """Name, version, seeds and checks of each suite, which decide what attacked besides cells.

        Repeats of an attack and the full checks attack, too, and lower the worst case.
        """
        return sorted(
            [p.name, p.version or digest(p.suite), p.seeds, p.checks] for p in self.suites
        )

    def per_image(self) -> NDArray[np.float64] | None:
        """(n,) lowest expected correctness under any bounded attack."""
        return None if self.lowest is None else unpacked(self.lowest, deflated=False)

    def unaware_records(self) -> list[NDArray[np.float64]]:
        """(n,) expected correctness under each bounded unaware attack of which it is known."""
        return [unpacked(c.each) for c in self.cells if c.bounded and not c.aware and c.each]

    def strongest_unaware(self) -> NDArray[np.float64] | None:
        """(n,) expected correctness under the strongest unaware attack; None if unknown."""
        return min(self.unaware_records(), key=lambda q: float(q.mean()), default=None)

    def attacks(self) -> dict[Attack, Attacked]:
        """The bounded attacks by key, to find the common ones of two runs."""
        return {c.key: c for c in self.cells if c.bounded}


class Training(_Data):
    """Cost of the training.

    Attributes:
        images: number of training images, over all epochs.
        passes: forward-pass equivalents per member and image, counted.
        minutes: on the machine of the study; None if they were not logged.
        parameters: number of stored parameters of all members.
        weights: SHA-256 of the weights file, or of weights not trained by redefense.
    """

    epochs: int | None
    images: int | None
    passes: float | None
    minutes: float | None
    parameters: int | None = None
    weights: str


class Claim(_Data):
    """One run, or weights from elsewhere, with all its evaluations.

    Attributes:
        run: its settings; for weights not trained by redefense the name of the defence, the number
            of members, the data and the threat.
        authors, link, licence: of the weights; the link points to their description.
        sha256: of all other entries; None in older claims.
    """

    # an attribute `schema` would hide a method of pydantic
    version: Literal[1] = Field(default=1, alias="schema")
    name: _FileName
    authors: str | None = None
    # the site links to it: no other scheme, such as javascript
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
        """Whether it can be trained again from `run`."""
        return self.training.epochs is not None

    @property
    def passes(self) -> float | None:
        """Forward-pass equivalents of one member, of the whole training."""
        took = self.training
        if took.images is None or took.passes is None:
            return None
        return took.images * took.passes * self.num_members

    @property
    def headline(self) -> Evaluated:
        """The evaluation with an aware figure and the most attacks, then the most images."""
        known = [e for e in self.evaluations if e.aware is not None] or list(self.evaluations)
        return max(known, key=lambda e: (len(e.cells), e.data["num_images"]))

    def on(self, images: int | None) -> "Claim | None":
        """The claim with only its results on this number of images; None if there are none."""
        if images is None:
            return self
        found = tuple(e for e in self.evaluations if e.data["num_images"] == images)
        return self.model_copy(update={"evaluations": found}) if found else None

    def keeping(self, older: "Claim") -> "Claim":
        """The claim with an older claim's results on other images or at other threats added."""
        # results of other weights are those of another claim
        if older.training.weights != self.training.weights:
            return self
        mine = {e.subject for e in self.evaluations}
        others = [e for e in older.evaluations if e.subject not in mine]
        both = sorted([*self.evaluations, *others], key=lambda e: e.subject)
        return self.model_copy(update={"evaluations": tuple(both)})


def estimate_of(found: Figure | None) -> Estimate | None:
    return None if found is None else found.estimate


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
    # 16 bits: half a level is 8e-6, below every stated digit
    # little-endian on every machine, since equal records must have equal hashes
    raw = np.rint(STEPS * q).astype("<u2").tobytes()
    return base64.urlsafe_b64encode(zlib.compress(raw, 9) if deflate else raw).decode()


def unpacked(text: str, *, deflated: bool = True) -> NDArray[np.float64]:
    """Inverse of `packed`, up to half a level."""
    raw = base64.urlsafe_b64decode(text)
    if deflated:
        raw = zlib.decompressobj().decompress(raw, _MOST_BYTES)
    levels: NDArray[np.uint16] = np.frombuffer(raw, dtype="<u2")
    return levels / STEPS


_MOST_BYTES: Final = 2**26
"""Limit of the unpacked records of one attack, since claims may come from untrusted sources."""


def dumped(it: Claim) -> dict[str, Any]:
    """The claim as JSON, with the hash of its content."""
    found = it.model_dump(mode="json", by_alias=True, exclude={"sha256"})
    return {**found, "sha256": digest(found)}


def read(path: Path) -> Claim:
    """A stored claim.

    Raises:
        DataError: for invalid files; it names the file and the first wrong key.
    """
    return parse(read_json(path), path)


def parse(document: object, path: Path) -> Claim:
    """A claim from decoded JSON; raises as `read`."""
    return valid(Claim, document, f"{path} is not a claim")


def write(it: Claim, path: Path) -> Path:
    write_json(path, dumped(it))
    return path


def least(found: Evaluated, attacks: Collection[Attack]) -> NDArray[np.float64]:
    """Per image, the lowest correctness over the clean image and these attacks.

    NaN if it is unknown: one of the attacks skipped the image, since an attack that is not among
    them had fooled it.

    Raises:
        DataError: if there is no attack, or the claim has no per-image correctness of them.
    """
    it = records_of(found)
    lowest = paired.least(it.clean, [it.attacks[attack] for attack in attacks])
    if lowest is None:
        raise DataError("a claim has no per-image correctness of its attacks: make it again")
    return lowest


def records_of(found: Evaluated) -> paired.Records:
    """The per-image records of an evaluation."""
    attacks = found.attacks()

    def q(text: str | None) -> NDArray[np.float64] | None:
        return None if text is None else unpacked(text)

    return paired.Records(
        clean=q(found.untouched),
        attacks={
            key: paired.Met(q(c.each), None if c.met is None else unpacked(c.met) > 0)
            for key, c in attacks.items()
        },
        aware={key for key, c in attacks.items() if c.aware},
        lowest=found.per_image(),
        protocol=found.protocol,
    )
