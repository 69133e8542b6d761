"""Groups claims that may be ranked together, and averages over seeds.

One row is a method: all claims whose runs differ only by the seed. A group has rows with matched
attacks: the same attacks on the same images at the same threat, with the same versions of their
suites. Figures of different groups are never ranked together.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from redefense.audit.finding import Finding
from redefense.claims.check import check, current
from redefense.claims.format import Claim, Evaluated, Figure, Plan, read, unpacked
from redefense.config import parse_run
from redefense.data import published
from redefense.errors import DataError
from redefense.evaluation.suite import fixes_threat
from redefense.radius import eps_text
from redefense.results.intervals import Estimate, over_seeds
from redefense.results.schema import digest
from redefense.train.loading import resolve

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A claim, its file, and the findings of its check."""

    path: Path
    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def page(self) -> str:
        """The claim's page in the site."""
        return f"claims/{self.path.stem}.html"

    @property
    def holds(self) -> bool:
        return all(finding.severity != "error" for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method in one group: one claim per seed, with its results on the group's images."""

    entries: tuple[Entry, ...]
    found: tuple[Evaluated, ...]

    @property
    def claim(self) -> Claim:
        return self.entries[0].claim

    @property
    def name(self) -> str:
        """The claim's name without its seed."""
        return self.claim.name.removesuffix(f"-{self.claim.run.get('seed')}")

    @property
    def kind(self) -> str:
        return self.claim.kind

    @property
    def seeds(self) -> int:
        return len(self.entries)

    # cached, since resampling is slow and pages show each figure several times
    @cached_property
    def clean(self) -> Estimate | None:
        return self._over([e.clean for e in self.found], lambda e: _unpacked(e.untouched))

    @cached_property
    def unaware(self) -> Estimate | None:
        return self._over([e.unaware for e in self.found], Evaluated.strongest_unaware)

    @cached_property
    def aware(self) -> Estimate | None:
        return self._over([e.aware for e in self.found], Evaluated.per_image)

    def _over(
        self, figures: Sequence[Figure | None], each: Callable[[Evaluated], Values | None]
    ) -> Estimate | None:
        """The figure of one claim, or the mean over the images and seeds of several."""
        known = [figure for figure in figures if figure is not None]
        # no mean over only some of the seeds
        if len(known) < len(figures):
            return None
        if len(known) == 1:
            return known[0].estimate
        records = [q for found in self.found if (q := each(found)) is not None]
        if len(records) == len(known):
            return over_seeds(np.stack(records))
        lows, highs = ([getattr(f, end) for f in known] for end in ("low", "high"))
        mean = float(np.mean([figure.value for figure in known]))
        wide = None not in (*lows, *highs)
        # without records the seeds cannot be resampled: the union of the intervals is safe
        return Estimate(mean, min(lows), max(highs)) if wide else Estimate(mean)

    @property
    def gap(self) -> float | None:
        """Unaware minus aware accuracy."""
        if self.unaware is None or self.aware is None:
            return None
        return self.unaware.value - self.aware.value

    @property
    def over_best(self) -> Estimate | None:
        """Gain of the draw over the best member; the mean without interval for several seeds."""
        return self._mean([e.over_alone or e.over_single for e in self.found])

    @property
    def over_average(self) -> Estimate | None:
        """Gain of the draw over the averaged ensemble; the mean for several seeds."""
        return self._mean([e.over_averaged for e in self.found])

    def _mean(self, figures: Sequence[Figure | None]) -> Estimate | None:
        known = [figure for figure in figures if figure is not None]
        if len(known) < len(figures) or self.kind == "single":
            return None
        if len(known) == 1:
            return known[0].estimate
        return Estimate(float(np.mean([figure.value for figure in known])))

    @property
    def parameters(self) -> int | None:
        return parameters_of(self.claim)

    @property
    def passes(self) -> float | None:
        return self.claim.passes


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows with matched attacks on the same images, ordered by the aware figure."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Evaluated:
        return self.rows[0].found[0]

    @property
    def data(self) -> str:
        return str(self.first.data["name"])

    @property
    def images(self) -> int:
        return int(self.first.data["num_images"])

    @property
    def threat(self) -> str:
        return f"{'L2' if self.first.norm == '2' else 'L-inf'} {eps_text(self.first.eps)}"

    @property
    def suites(self) -> tuple[str, ...]:
        return tuple(sorted({plan.name for plan in self.first.suites}))

    @property
    def earlier(self) -> bool:
        """Whether the version of a suite is not the present one."""
        return any(plan.version is None or not current(plan) for plan in self.first.suites)

    @property
    def whole(self) -> bool:
        """Whether all attacks of the suite `aware` were run."""
        # a definition in the claim is a user's suite, whatever its name; in a group attacks match
        plans = (plan for row in self.rows for found in row.found for plan in found.suites)
        return any(plan.suite in ("aware", "full") for plan in plans)

    @property
    def ranked(self) -> bool:
        """Whether there is a headline, i.e. an aware attack was run."""
        return self.first.aware is not None

    @property
    def attacks(self) -> tuple[str, ...]:
        return tuple(sorted({f"{c.attack} ({c.view})" for c in self.first.cells if c.bounded}))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({row.kind for row in self.rows}))

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands for a result in this group, or in a new one if its suites are outdated."""
        return tuple(evaluate_command(plan) for plan in self.first.suites)


def evaluate_command(plan: Plan) -> str:
    """The command that evaluates a run with these settings of a suite."""
    suite = plan.suite if isinstance(plan.suite, str) else f"{plan.name}.json"
    words = ["redefense", "evaluate", "DIR", "--suite", suite]
    words += [] if plan.images is None else ["--images", str(plan.images)]
    if not fixes_threat(plan.suite):
        words += ["--norm", f"l{plan.norm}", "--eps", eps_text(plan.eps)]
    # options with their default values are omitted
    words += ["--seeds", str(plan.seeds)] if plan.seeds > 1 else []
    words += ["--checks", plan.checks] if plan.checks != "quick" else []
    words += ["--no-cascade"] if plan.cascade is False else []
    words += [] if plan.precision is None else ["--precision", plan.precision]
    return shlex.join(words)


def read_all(folder: Path) -> list[Entry]:
    """The claims of a folder, in the order of their names.

    Raises:
        DataError: if there is none, or a file is not a claim.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder} has no claims: make one with `redefense claim make`")
    return [Entry(path=path, claim=read(path), findings=tuple(check(path))) for path in paths]


def groups_of(entries: Iterable[Entry]) -> list[Group]:
    """The groups of valid claims: present suites first, among them `aware`, then the largest.

    A claim is in one group for each of its evaluations.
    """
    places: dict[str, dict[str, list[tuple[Entry, Evaluated]]]] = {}
    for entry in entries:
        for found in entry.claim.evaluations:
            rows = places.setdefault(_met(found), {})
            rows.setdefault(_method(entry.claim), []).append((entry, found))
    groups = [Group(rows=_ordered(rows)) for rows in places.values()]
    return sorted(
        groups,
        key=lambda g: (not g.ranked, g.earlier, not g.whole, -len(g.rows), g.data, -g.images),
    )


def _met(found: Evaluated) -> str:
    """Key of images, threat, suites and attacks: rows with equal keys may be ranked together."""
    # older evaluations have no hash of their data; then all that is known of them must agree
    data = found.data.get("sha256") or found.data
    attacks = sorted(map(str, found.attacks()))
    return digest([data, found.data["num_images"], found.norm, found.eps, found.protocol, attacks])


def _method(it: Claim) -> str:
    """Key that is equal for claims whose runs differ only by the seed."""
    # weights from elsewhere have no seed: other weights are another method
    settings = {key: value for key, value in it.run.items() if key != "seed"}
    return digest([settings, it.authors, None if it.trained else it.training.weights])


def _ordered(rows: Mapping[str, Sequence[tuple[Entry, Evaluated]]]) -> tuple[Row, ...]:
    made = [
        Row(entries=tuple(e for e, _ in pairs), found=tuple(f for _, f in pairs))
        for pairs in map(_distinct, rows.values())
    ]
    return tuple(
        sorted(made, key=lambda row: (row.aware is None, -row.aware.value if row.aware else 0))
    )


def _distinct(pairs: Sequence[tuple[Entry, Evaluated]]) -> list[tuple[Entry, Evaluated]]:
    """One pair for each training, that of the lowest aware figure."""
    kept: dict[str, tuple[Entry, Evaluated]] = {}
    # as two seeds the same weights would hide the spread between trainings
    for pair in sorted(pairs, key=lambda it: it[1].aware.value if it[1].aware else 1.0):
        kept.setdefault(pair[0].claim.training.weights, pair)
    return [pair for pair in pairs if kept[pair[0].claim.training.weights] is pair]


def _unpacked(text: str | None) -> Values | None:
    return None if text is None else unpacked(text)


_SIZES: dict[str, int | None] = {}


def parameters_of(it: Claim) -> int | None:
    """The stated number of parameters; for older claims that of the run's networks."""
    if it.training.parameters is not None or not it.trained:
        return it.training.parameters
    # building an ensemble takes seconds, and a page shows each claim several times
    key = json.dumps([it.run["ensemble"], it.run["data"]["spec"]], sort_keys=True)
    if key not in _SIZES:
        run, kind, _ = resolve(parse_run(it.run, it.name))
        known = published(run.data.spec)
        _SIZES[key] = None
        if known is not None:
            ensemble = kind.build(num_classes=known.num_classes, shape=known.shape, seed=0)
            _SIZES[key] = sum(parameter.numel() for parameter in ensemble.parameters())
    return _SIZES[key]
