"""Schema 1 of a stored evaluation, `DIR/evaluation/SUITE.json`. Needs no torch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class _Record(BaseModel):
    # later versions may add keys to schema 1; JSON has neither NaN nor infinity
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Budget(_Record):
    """The stored threat of a cell; eps is None for unbounded attacks."""

    norm: str = "inf"
    eps: float | None = None

    @field_validator("norm", mode="before")
    @classmethod
    def _text(cls, value: object) -> str:
        # files from elsewhere may have 2 for "2"
        return f"{value:g}" if isinstance(value, int | float) else str(value)


class Accuracy(_Record):
    """Accuracies of one cell, fractions in [0, 1]; None is unknown."""

    protocol: float | None = None
    protocol_sd: float | None = None
    expected: float | None = None
    averaged: float | None = None
    worst_member: float | None = None
    best_member: float | None = None
    any: float | None = None
    all: float | None = None


class Cell(_Record):
    """One attack at one threat on one view; `met` counts attacked images, None is all."""

    id: str
    attack: str
    repr: str = ""
    view: str = ""
    label: str | None = None
    aware: bool = False
    bounded: bool = True
    distortion: dict[str, float | None] | None = None
    threat: Budget | None = None
    accuracy: Accuracy = Accuracy()
    interval: tuple[float, float] | None = None
    met: int | None = None
    unchanged: float | None = None
    forwards: float | None = None
    backwards: float | None = None
    seconds: float | None = None
    per_image: str | None = None


class Data(_Record):
    name: str
    split: str = "test"
    num_images: int = Field(ge=1)
    sha256: str | None = None


class Clean(_Record):
    expected: float | None = None
    averaged: float | None = None
    per_member: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    per_image: str | None = None


class Headline(_Record):
    unaware: float | None = None
    aware: float | None = None
    aware_interval: tuple[float, float] | None = None
    exact: bool = True  # all were, before stochastic networks could be evaluated
    draws: int | None = None
    unaware_interval: tuple[float, float] | None = None
    unaware_interval_draws: tuple[float, float] | None = None
    aware_interval_draws: tuple[float, float] | None = None
    success_within: tuple[float, ...] | None = None
    best_single_member: float | None = None
    best_single_member_interval: tuple[float, float] | None = None
    best_single_member_index: int | None = None
    chosen_on: str | None = None
    single_members: tuple[float, ...] | None = None
    averaged: float | None = None
    averaged_interval: tuple[float, float] | None = None
    averaged_draws: int | None = None
    vote: float | None = None
    vote_interval: tuple[float, float] | None = None


class Plan(_Record):
    """The settings of an evaluation, in it or `plan.json` beside its records.

    Attributes:
        images: number of images; None for all.
        batch_size: images per call, where random numbers depend on it; else None.
        weights: SHA-256 of the evaluated weights.
        objects: attacks given as objects, without a name.
    """

    suite: dict[str, Any]
    threat: Budget
    images: int | None = None
    seed: int = 0
    seeds: int = 1
    checks: str = "quick"
    stochastic: str = "auto"
    batch_size: int | None = None
    weights: str | None = None
    parameters: int | None = None
    objects: dict[str, str] = {}


def digest(value: object) -> str:
    """SHA-256 of data as JSON, independent of the order of its keys."""
    # one way of writing equal data, or equal claims would have different hashes
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def suite_version(suite: Mapping[str, Any]) -> str:
    """Version of a suite: 12 hexadecimal digits of the hash of its attacks and their settings."""
    # name, summary and precision do not change which attacks are run
    parts = {key: suite[key] for key in ("cells", "baseline_attacks", "measures") if key in suite}
    return digest(parts)[:12]


class CurveCost(_Record):
    """Settings of `curve`, and its passes per image."""

    attack: str
    images: int
    radii: int
    forwards: float
    backwards: float


class AtRadius(_Record):
    """The headline at one of several radii."""

    eps: float
    unaware: float | None = None
    unaware_interval: tuple[float, float] | None = None
    aware: float | None = None
    aware_interval: tuple[float, float] | None = None


class BestMixture(_Record):
    """Better sampling probabilities, and the worst-case accuracy with them and at present."""

    mixture: tuple[float, ...]
    accuracy: float
    present: float
    caveat: str


OF_DEFENCE: Final = ("S36", "S38")
"""Checks about the defence, not about the quality of the measurement."""


class Check(_Record):
    id: str
    passed: bool | None = None
    detail: str = ""


class Evaluation(_Record):
    """`DIR/evaluation/SUITE.json`, schema 1. Unknown keys are ignored."""

    # `schema` is a method of pydantic's models
    version: Literal[1] = Field(alias="schema")
    suite: str
    run: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    data: Data
    clean: Clean = Clean()
    cells: tuple[Cell, ...] = ()
    further_cells: tuple[Cell, ...] = ()
    headline: Headline | None = None
    checks: tuple[Check, ...] = ()
    plan: Plan | None = None
    mixture: tuple[float, ...] | None = None
    randomized: bool | None = None
    stochastic: bool = False
    transfer: tuple[tuple[float | None, ...], ...] | None = None
    curve: tuple[tuple[float, ...], ...] | None = None
    curve_cost: CurveCost | None = None
    eps_curve: tuple[AtRadius, ...] = ()
    examples: str | None = None
    diversity: dict[str, Any] | None = None
    best_mixture: BestMixture | None = None
