"""Suites: lists of attacks with the view and the threat of each, as plain data."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from redefense.config import ThreatConfig, first_fault
from redefense.errors import BAD_JSON, ConfigError, suggestion
from redefense.plugins import Registry

View = Literal["sampled", "averaged", "members", "protocol"]

AttackPrecision = Literal["auto", "fp32", "bf16"]
"""Precision in which aware attacks query the ensemble; points are verified in its own."""


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # type checkers know the fields

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise ConfigError(f"{type(self).__name__}: {first_fault(error)}") from None

        # else pydantic would call it for each cell of a suite, and faults would have no place
        __init__.__pydantic_base_init__ = True


def _as_config(threat: Any) -> Any:
    """The configuration of a `redefense.Threat`, which is not imported here as it needs torch."""
    if isinstance(threat, ThreatConfig | Mapping) or not hasattr(threat, "eps"):
        return threat
    return ThreatConfig.of(threat.norm, threat.eps)


class CellSpec(_Data):
    """One attack of a suite.

    Attributes:
        attack: name in `ATTACKS`.
        settings: of the attack; default: the attack's own defaults.
        view: the victim model: "sampled" draws a new member per call, "averaged" is the mean
            probability, "members" gives access to all members (adaptive attacks), "protocol" is
            the defence's own inference: "sampled" if it is randomized, else "averaged".
        threat: the threat of this cell, also as a `redefense.Threat`; the run's own if None.
        label: its name in tables.
        aware: whether the attack counts as aware of the ensemble; default: True for the view
            "members", else False.
    """

    attack: str
    view: View
    settings: dict[str, Any] = {}
    threat: Annotated[ThreatConfig | None, BeforeValidator(_as_config)] = None
    label: str | None = None
    aware: bool | None = None
    # an attack object given in place of a name; not part of the record
    _made: Any = PrivateAttr(default=None)

    @property
    def made(self) -> Any:
        """The attack object that was given; None if the attack is given by name."""
        return self._made

    def with_attack(self, attack: Any) -> "CellSpec":
        """The same cell with an attack object in place of the named attack."""
        other = self.model_copy()
        other._made = attack
        return other

    def resolved(self, randomized: bool) -> "CellSpec":
        """The same cell with the view "protocol" resolved for this defence."""
        if self.view != "protocol":
            return self
        return self.model_copy(update={"view": "sampled" if randomized else "averaged"})

    def identity(self, threat: ThreatConfig) -> str:
        """Name of the cell, unique within a suite."""
        eps = f"{threat.eps:.6f}".rstrip("0").rstrip(".")
        extra = "".join(
            f"-{key}-{value}" for key, value in sorted(self.settings.items()) if key == "preset"
        )
        return f"{self.attack}-{self.view}-{'linf' if threat.norm == 'inf' else 'l2'}-{eps}{extra}"


class Suite(_Data):
    """A list of cells, and the attacks on the deterministic baselines.

    Attributes:
        name: of its file in `DIR/evaluation`.
        summary: one line for `redefense list suites`.
        cells: the attacks, in order.
        baseline_attacks: attacks on the baselines: each single member and the averaged ensemble.
        cascade: whether aware attacks skip images on which an earlier attack fooled every member;
            the headline needs only each image's worst case.
        precision: how aware attacks query the ensemble; the points found are always computed by
            the ensemble itself, in its own precision. "fp32": as it is. "auto": a copy with batch
            norms folded into convolutions, which is faster and equal up to rounding. "bf16": the
            same in bfloat16, but for outputs near a decision boundary.
        measures: whether to measure the members: transfer, diversity, accuracy of each single
            member, and accuracy over eps.
    """

    name: str
    summary: str = ""
    cells: tuple[CellSpec, ...] = Field(min_length=1)
    baseline_attacks: tuple[CellSpec, ...] = ()
    cascade: bool = False
    precision: AttackPrecision = "fp32"
    measures: bool = False

    def computing(self, precision: AttackPrecision | None) -> "Suite":
        """The same suite with attacks in another precision; unchanged for None."""
        return self if precision is None else self.model_copy(update={"precision": precision})

    def cascading(self, cascade: bool | None) -> "Suite":
        """The same suite with or without its cascade; unchanged for None."""
        return self if cascade is None else self.model_copy(update={"cascade": cascade})


_MEANPROB = CellSpec(
    attack="meanprob_pgd", view="members", settings={"steps": 20}, label="meanprob PGD-20"
)
_HINGE = CellSpec(attack="hinge", view="members", settings={"steps": 20}, label="hinge-20")
# unaware attacks return the last iterate: losses of different members cannot be compared
_PGD = CellSpec(
    attack="pgd", view="sampled", settings={"steps": 10, "keep_best": False}, label="PGD-10"
)

QUICK: Final = Suite(
    name="quick",
    summary="FGSM and PGD-10 unaware of the draw, meanprob PGD-20 and hinge-20 aware of it",
    cells=(CellSpec(attack="fgsm", view="sampled", label="FGSM"), _PGD, _MEANPROB, _HINGE),
    baseline_attacks=(_MEANPROB, _HINGE),
)

_LABELS: Final = {
    "fgsm": "FGSM", "mim": "MIM", "bim": "BIM", "pgd": "PGD", "cw": "CW", "deepfool": "DeepFool",
    "autoattack": "AutoAttack", "onepixel": "OnePixel", "square": "Square", "pixle": "Pixle",
    "di2fgsm": "DI2-FGSM", "eotpgd": "EoT-PGD", "apgd": "APGD", "sparsefool": "SparseFool",
}  # fmt: skip
"""The 14 attacks of the paper, in its order."""

# the released evaluation has no settings for these: it used the library's defaults
_LIBRARY_ONLY = frozenset({"onepixel", "pixle", "sparsefool"})


def _published(preset: str, threat: ThreatConfig | None) -> tuple[CellSpec, ...]:
    return tuple(
        CellSpec(
            attack=name,
            view="protocol",
            settings={"preset": "torchattacks-3.5.1" if name in _LIBRARY_ONLY else preset},
            threat=threat,
            label=label,
        )
        for name, label in _LABELS.items()
    )


PAPER: Final = Suite(
    name="paper",
    summary="the paper's 14 attacks in the settings of its released evaluation; no headline",
    cells=_published("red-released", None),
)

LIBRARY: Final = Suite(
    name="torchattacks",
    summary="the same 14 with the defaults of TorchAttacks 3.5.1, eps 8/255; no headline",
    cells=_published("torchattacks-3.5.1", ThreatConfig(eps=8 / 255)),
)

_AWARE_BUDGET = (
    CellSpec(attack="hinge", view="members", settings={"steps": 50, "restarts": 2}, label="hinge"),
    CellSpec(
        attack="meanprob_apgd",
        view="members",
        settings={"steps": 100, "restarts": 2},
        label="meanprob APGD",
    ),
)

# an attacker of the average knows all members, though the attack is not adaptive
_AUTOATTACK = CellSpec(
    attack="autoattack",
    view="averaged",
    settings={"early_stop": True},
    label="AutoAttack on the average",
    aware=True,
)

AWARE: Final = Suite(
    name="aware",
    summary="attacks on all members: ARC, hinge, meanprob APGD, transfer, subset, AutoAttack",
    cells=(
        _PGD,
        # fast attacks first: later ones run on the remaining images only
        *_AWARE_BUDGET,
        CellSpec(attack="arc", view="members", settings={"restarts": 2}, label="ARC"),
        CellSpec(attack="transfer", view="members", label="transfer"),
        # starts from the best points of earlier attacks
        CellSpec(attack="subset", view="members", label="subset"),
        _AUTOATTACK,
    ),
    # includes APGD-T, FAB and Square: the standard attack on deterministic networks
    baseline_attacks=(*_AWARE_BUDGET, _AUTOATTACK.model_copy(update={"label": "AutoAttack"})),
    cascade=True,
    precision="auto",
    measures=True,
)

FULL: Final = Suite(
    name="full",
    summary="all of quick, paper, torchattacks and aware",
    # PGD-10 is in two of them
    cells=(*QUICK.cells, *PAPER.cells, *LIBRARY.cells, *(c for c in AWARE.cells if c != _PGD)),
    baseline_attacks=AWARE.baseline_attacks,
    cascade=True,
    precision="auto",
    measures=True,
)


def _suite(name: str, value: Any) -> Suite:
    """A user's suite: a `Suite`, or a list of attacks."""
    from redefense.evaluation.inputs.objects import suite_of  # needs torch

    return suite_of(value, name)


SUITES: Final[Registry[Suite]] = Registry(
    "suites", {suite.name: suite for suite in (QUICK, PAPER, LIBRARY, AWARE, FULL)}, _suite
)


def fixes_threat(suite: object) -> bool:
    """Whether a suite has a threat for each cell, which the run's or another cannot replace.

    Args:
        suite: its name, or its definition as JSON data.
    """
    if isinstance(suite, str):
        return suite in SUITES and fixes_threat(SUITES[suite].model_dump())
    cells = suite.get("cells") if isinstance(suite, Mapping) else None
    # stored definitions may be damaged
    return bool(cells) and all(isinstance(c, Mapping) and c.get("threat") for c in cells or ())


def suite_named(name: str | PathLike[str]) -> Suite:
    """A suite by name, or from a user's `.json` file.

    Raises:
        ConfigError: if the name is unknown, or the file is not a suite.
    """
    if not isinstance(name, str | PathLike):
        raise ConfigError(f"a suite must be a name or a .json file, got {name!r}")
    if name in SUITES:
        return SUITES[str(name)]
    path = Path(name)
    if path.suffix != ".json":
        raise ConfigError(
            f"unknown suite {name!r}{suggestion(str(name), list(SUITES))}; "
            f"choose one of {', '.join(SUITES)}, or give a .json file"
        )
    try:
        suite = Suite.model_validate({"name": path.stem, **json.loads(path.read_text())})
    except ValidationError as error:
        raise ConfigError(f"{path} is not a suite: {first_fault(error)}") from None
    except (*BAD_JSON, TypeError) as error:
        raise ConfigError(f"cannot read the suite {path}: {error}") from None
    if suite.name in SUITES or not suite.name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(
            f'the name of the suite {path} ("name" in it, else that of the file) must have '
            f"letters, digits, - and _ only, and not be one of {', '.join(SUITES)}; "
            f"got {suite.name!r}"
        )
    return suite
