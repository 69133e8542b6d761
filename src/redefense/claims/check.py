"""Checks a claim without training: its schema, hashes, figures, attacks, and the audit's rules.

The figures of a claim are compared with its per-image correctness. Consistently invented records
pass; only `recompute` detects them.
"""

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from redefense.attacks import ATTACKS
from redefense.audit.audit import findings_about
from redefense.audit.finding import Finding
from redefense.claims.format import (
    Attacked,
    Claim,
    Evaluated,
    Figure,
    Plan,
    parse,
    unpacked,
)
from redefense.config import construct, parse_run
from redefense.defences import draws_member
from redefense.errors import ConfigError, DataError, RedefenseError
from redefense.evaluation.suite import SUITES
from redefense.results.intervals import accuracy_interval
from redefense.results.records import read_json
from redefense.results.schema import (
    Accuracy,
    Budget,
    Cell,
    Check,
    Clean,
    Data,
    Evaluation,
    Headline,
    digest,
)
from redefense.results.schema import suite_version as version_of
from redefense.train.loading import resolve

TOLERANCE: Final = 3e-5
"""Tolerance between a figure and the mean of its records, which are rounded."""
INTERVAL_TOLERANCE: Final = 3e-3
"""Tolerance between an interval and that of the records, which are rounded and resampled."""
SAME_EPS: Final = 1e-8
"""Tolerance between the radius of a suite and that of a claim, which has 9 decimals."""
ADDED: Final = frozenset({"subset"})
"""Attacks that earlier versions of the built-in suites lack; they have all the others."""


def check(path: Path) -> list[Finding]:
    """All findings about the file of a claim, errors first.

    Raises:
        DataError: if the file is missing or is not JSON.
    """
    document = read_json(path)
    try:
        it = parse(document, path)
    except DataError as error:
        # JSON of another form is a finding; only a file that is no JSON is an error
        return [_finding(path.name, "schema", f"{error}.")]
    found = [*_identity(it, document)]
    for each in it.evaluations:
        try:
            # a tuple, since a generator would raise outside of this block
            sums = (*_sums(each), *_members(it, each))
            found += [_finding(_subject(it, each), *message) for message in sums]
        except ValueError as error:  # records that cannot be unpacked
            found.append(_finding(_subject(it, each), "records-damaged", f"{error}."))
            continue
        found += _attacks(it, each)
        found += _audited(it, each)
    return sorted(found, key=lambda finding: finding.severity)


def _audited(it: Claim, found: Evaluated) -> Iterator[Finding]:
    """The audit's findings; errors become notes if another evaluation has the headline."""
    # a claim may hold a quick evaluation beside the complete one
    has_aware = found.aware is None and it.headline.aware is not None
    for finding in findings_about(as_evaluation(it, found)):
        yield replace(finding, severity="note") if has_aware else finding


def _subject(it: Claim, found: Evaluated) -> str:
    return f"{it.name}, {found.data['num_images']} images"


def _finding(
    subject: str, rule: str, why: str, *, severity: Literal["error", "note"] = "error"
) -> Finding:
    return Finding(id=rule, severity=severity, subject=subject, rows=(), figures={}, why=why)


def _identity(it: Claim, document: Any) -> Iterator[Finding]:
    """Check hashes, settings, commits and authors."""
    stated = document.get("sha256")
    if stated is None:
        # claims had no hash before their suites had versions
        earlier = all(plan.version is None for e in it.evaluations for plan in e.suites)
        made = "it was made by an earlier version" if earlier else "it was removed"
        why = f"The claim has no hash of its content: {made}."
        yield _finding(it.name, "no-hash", why, severity="note" if earlier else "error")
    elif stated != digest({key: value for key, value in document.items() if key != "sha256"}):
        why = "The hash does not match the content: the file was changed after it was made."
        yield _finding(it.name, "hash", why)
    if not re.fullmatch(r"[0-9a-f]{64}", it.training.weights):
        yield _finding(it.name, "weights", "The hash of the weights is not a SHA-256.")
    if it.trained:
        try:
            resolve(parse_run(it.run, it.name))
        except RedefenseError as error:
            yield _finding(it.name, "run", f"The run cannot be trained: {error}.")
    elif missing := [key for key in ("authors", "link", "licence") if not getattr(it, key)]:
        why = f"The weights were not trained by redefense, and {', '.join(missing)} is not stated."
        yield _finding(it.name, "unattributed", why)
    for plan in (plan for each in it.evaluations for plan in each.suites):
        commit = str(plan.provenance.get("commit", ""))
        # the figures may hold, but nobody else can obtain this code
        if commit.endswith("-dirty"):
            why = f"{plan.file} was made by code with uncommitted changes ({commit})."
            yield _finding(it.name, "changed-code", why, severity="note")


def _sums(found: Evaluated) -> Iterator[tuple[str, str]]:
    """Compare every figure with its records, as (rule, why)."""
    n = found.data["num_images"]
    clean = _images(found.untouched, n, "clean")
    yield from _mean("clean", found.clean, clean, found.exact)
    left = []
    # attacks that are no cells of a suite count in the headline, too
    every = (*found.cells, *(found.further or ()))
    for cell in every:
        _images(cell.met, n, f"{cell.id}, met")
        if (q := _images(cell.each, n, cell.id)) is not None:
            yield from _mean(cell.id, cell.expected, q, found.exact)
            left.append(q)
        # unbounded attacks do not count in a headline, so their records are not stored
        elif cell.bounded:
            yield "records-missing", f"The claim has no per-image correctness of {cell.id}."
    lowest = found.per_image()
    if lowest is not None and lowest.shape != (n,):
        raise ValueError(f"lowest has {len(lowest)} images, expected {n}")
    yield from _mean("aware", found.aware, lowest, found.exact)
    if found.aware is not None and lowest is None and found.exact:
        yield "records-missing", "The claim has no per-image correctness of the worst case."
    if clean is not None and lowest is not None:
        worst = np.min([clean, *left], axis=0)
        # older claims do not list all attacks that counted
        above = lowest > worst + TOLERANCE
        below = (lowest < worst - TOLERANCE) & (found.further is not None)
        if wrong := int((above | below).sum()):
            yield "aware-records", f"The aware figure is not the worst attack's on {wrong} images."
    yield from _unaware(found)
    yield from _differences(found)
    yield from _around(found)


def _members(it: Claim, found: Evaluated) -> Iterator[tuple[str, str]]:
    """Check that the clean accuracy can be a weighted mean of the members' accuracies."""
    each = found.clean_members
    if not found.exact or found.clean is None or len(each) != it.num_members:
        return
    if not min(each) - TOLERANCE <= found.clean.value <= max(each) + TOLERANCE:
        range_ = f"{_percent(min(each))} to {_percent(max(each))}"
        why = f"clean is stated as {_percent(found.clean.value)}, its members have {range_}."
        yield "clean-members", why


def _images(text: str | None, n: int, what: str) -> NDArray[np.float64] | None:
    if text is None:
        return None
    try:
        found = unpacked(text)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"records of {what} cannot be read: {error}") from None
    if found.shape != (n,):
        raise ValueError(f"records of {what} are of {len(found)} images, expected {n}")
    return found


def _mean(
    what: str, stated: Figure | None, q: NDArray[np.float64] | None, exact: bool
) -> Iterator[tuple[str, str]]:
    """Compare a figure and its interval with the mean and the interval of its records."""
    if stated is None or q is None:
        return
    if abs(stated.value - q.mean()) > TOLERANCE:
        message = (
            f"{what} is stated as {_percent(stated.value)}, its records give {_percent(q.mean())}"
        )
        # an interval around another mean cannot agree either, so it is not compared
        yield "records-contradict", f"{message}."
        return
    if exact:  # else the interval covers the draws, too
        yield from _ends(what, stated, q)


def _ends(what: str, stated: Figure, q: NDArray[np.float64]) -> Iterator[tuple[str, str]]:
    """Compare the interval of a figure with that of its records."""
    _, low, high = accuracy_interval(q)
    for end, mine, other in (("low", stated.low, low), ("high", stated.high, high)):
        if mine is None or other is None or abs(mine - other) > INTERVAL_TOLERANCE:
            shown = "unknown" if mine is None else _percent(mine)
            why = f"The {end} end of the interval of {what} is stated as {shown}, its records give "
            yield "interval", why + ("nothing." if other is None else f"{_percent(other)}.")


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _unaware(found: Evaluated) -> Iterator[tuple[str, str]]:
    """Check the unaware headline, unless it is estimated from draws."""
    records = found.unaware_records()
    if not records or found.unaware is None or found.aware is None or not found.exact:
        return
    stated, lowest = found.unaware, min(float(q.mean()) for q in records)
    if abs(stated.value - lowest) > TOLERANCE:
        message = f"{_percent(stated.value)}, the lowest of its attacks is {_percent(lowest)}"
        yield "unaware-records", f"unaware is stated as {message}."
        return
    # rounded records do not tell which of equally strong attacks the interval is of
    tied = [q for q in records if q.mean() <= lowest + TOLERANCE]
    yield from min((tuple(_ends("unaware", stated, q)) for q in tied), key=len)


def _differences(found: Evaluated) -> Iterator[tuple[str, str]]:
    """Check that each gain of the draw is the difference of two figures."""
    if found.aware is None or found.further is None:  # in older claims the attacks were not matched
        return
    best = max(found.alone, key=lambda figure: figure.value, default=None)
    for what, stated, other in (
        ("over_single", found.over_single, found.best_single_member),
        ("over_averaged", found.over_averaged, found.averaged),
        ("over_alone", found.over_alone, best),
    ):
        if stated is None or other is None:
            continue
        if abs(stated.value - (found.aware.value - other.value)) > TOLERANCE:
            yield "difference", f"{what} is not the aware figure minus its baseline."


def _around(found: Evaluated) -> Iterator[tuple[str, str]]:
    """Check that every interval contains its figure."""
    figures: dict[str, Any] = {
        **{key: getattr(found, key) for key in Evaluated.model_fields},
        **{f"alone, member {m}": each for m, each in enumerate(found.alone)},
        **{cell.id: cell.expected for cell in (*found.cells, *(found.further or ()))},
    }
    for what, it in figures.items():
        if not isinstance(it, Figure):
            continue
        low, high = (it.value if end is None else end for end in (it.low, it.high))
        if not low <= it.value <= high:
            range_ = f"{_percent(low)} to {_percent(high)}"
            yield "interval", f"{what} is {_percent(it.value)}, outside its interval {range_}."


def _definition(plan: Plan) -> dict[str, Any] | None:
    """The definition of the suite; None for an unknown version of a built-in suite."""
    if not isinstance(plan.suite, str):
        return plan.suite
    known = SUITES.get(plan.suite)
    now = None if known is None else known.model_dump(mode="json")
    return now if now is not None and plan.version == version_of(now) else None


def _cells(plan: Plan) -> list[dict[str, Any]]:
    """The cells that a suite has; of another version of a built-in one those of all versions."""
    if (suite := _definition(plan)) is not None:
        return list(suite["cells"])
    now = SUITES[plan.suite].cells if isinstance(plan.suite, str) and plan.suite in SUITES else ()
    # settings may differ between versions
    plain = [cell.model_dump(mode="json", exclude={"settings"}) for cell in now]
    return [cell for cell in plain if cell["attack"] not in ADDED]


def _threats(plan: Plan, cells: Sequence[Mapping[str, Any]]) -> list[Budget | None]:
    """The threat of each cell; unbounded attacks count as at the threat of the suite's headline."""
    own = Budget(norm=plan.norm, eps=plan.eps)
    each = [Budget.model_validate(spec.get("threat") or own) for spec in cells]
    kinds = [ATTACKS.own.get(spec["attack"]) for spec in cells]
    bounded = [kind is None or kind.bounded for kind in kinds]
    # as `results.join` does: aware attacks first; None without a bounded attack
    order = sorted(range(len(cells)), key=lambda i: not _knows(cells[i]))
    headline = next((each[i] for i in order if bounded[i]), None)
    return [at if inside else headline for at, inside in zip(each, bounded, strict=True)]


def _knows(spec: Mapping[str, Any]) -> bool:
    """Whether the attack of a suite is aware of the draw."""
    return bool(spec["view"] == "members" if spec.get("aware") is None else spec["aware"])


def _at(threat: Budget | None, found: Evaluated) -> bool:
    """Whether an attack at this threat is part of the evaluation."""
    if threat is None:
        return True
    same = threat.eps is not None and abs(threat.eps - found.eps) < SAME_EPS
    return same and threat.norm == found.norm


def current(plan: Plan) -> bool:
    """Whether the suite's version is the present one; always true for a user's suite."""
    return _definition(plan) is not None


def _attacks(it: Claim, found: Evaluated) -> Iterator[Finding]:
    """Check that every attack of a suite has records and the suite's settings."""
    left = list(found.cells)
    demanded: list[tuple[str, str, dict[str, Any], Plan, bool | None]] = []
    for plan in found.suites:
        if isinstance(plan.suite, str) and plan.suite not in SUITES:
            why = f"Suite {plan.name} is unknown, so that its list of attacks cannot be checked."
            yield _finding(_subject(it, found), "unknown-suite", why)
        elif not current(plan):
            message = "an earlier version" if plan.version is None else f"version {plan.version}"
            why = (
                f"Suite {plan.name} was {message}: only the attacks that all versions have are "
                "checked, without their settings."
            )
            yield _finding(_subject(it, found), "suite-version", why, severity="note")
        cells = _cells(plan)
        here = [
            spec for spec, at in zip(cells, _threats(plan, cells), strict=True) if _at(at, found)
        ]
        if cells and not here:
            norm = {"inf": "linf", "2": "l2"}[found.norm]
            why = f"Suite {plan.name} is of another budget than the claim's, {norm} {found.eps:g}."
            yield _finding(_subject(it, found), "budget", why)
        # cells at another threat are part of another evaluation of the claim
        for spec in here:
            view = spec["view"]
            if view == "protocol":
                view = "sampled" if _drawn(it, found) else "averaged"
            settings, aware = spec.get("settings", {}), spec.get("aware")
            demanded.append((spec["attack"], view, settings, plan, aware))
    # entries with the most settings first: their results would match entries without, too
    for attack, view, settings, plan, aware in sorted(demanded, key=lambda it: -len(it[2])):
        # defaults may differ between versions
        ran = partial(_ran, attack, settings, whole=plan.version is not None and current(plan))
        fits = [c for c in left if (c.attack, c.view) == (attack, view) and ran(c.repr)]
        # the first of equal ones: each result answers one entry of the suite
        if fits:
            left.remove(fits[0])
            yield from _described(it, found, fits[0], aware)
            continue
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        why = (
            f"{attack}{f'({given})' if given else ''} on view {view} belongs to suite {plan.name}, "
            "and its result is missing or of other settings."
        )
        yield _finding(_subject(it, found), "missing-attack", why)


def _described(
    it: Claim, found: Evaluated, cell: Attacked, aware: bool | None
) -> Iterator[Finding]:
    """Check what a cell states about its attack: awareness, boundedness and budget."""
    # built-in attacks only: what a plug-in declares may differ between machines
    if (kind := ATTACKS.own.get(cell.attack)) is not None:
        known = {"aware": kind.adaptive if aware is None else aware, "bounded": kind.bounded}
        for key, value in known.items():
            if getattr(cell, key) != value:
                why = f"{cell.id} is stated as {key}={not value}, but its attack is {key}={value}."
                yield _finding(_subject(it, found), "attack-kind", why)
    # the whole number, so that 0.03 does not match 0.031
    budget = re.search(r"-(linf|l2)-(\d+(?:\.\d+)?)(?![\d.])", cell.id)
    norm = {"inf": "linf", "2": "l2"}[found.norm]
    other = budget and (budget[1] != norm or abs(float(budget[2]) - found.eps) > 1e-6)
    # unbounded attacks belong to the evaluation at the headline's threat, whatever theirs is
    if cell.bounded and other:
        why = f"{cell.id} is of another budget than the claim's, {norm} {found.eps:g}."
        yield _finding(_subject(it, found), "budget", why)


def _drawn(it: Claim, found: Evaluated) -> bool:
    """Whether `evaluate` resolves the view "protocol" of a suite to a random draw."""
    if not found.exact:
        return True
    if not it.trained:
        return it.num_members > 1
    return draws_member(it.run["defence"]["name"])


def _ran(attack: str, settings: Mapping[str, Any], call: str, *, whole: bool) -> bool:
    """Whether the repr of an attack has these settings; for `whole` the defaults of others, too."""
    # built-in attacks only: a plug-in may not be there, or be another on this machine
    if whole and (kind := ATTACKS.own.get(attack)) is not None:
        try:
            return call == repr(construct(kind, settings, attack))
        except ConfigError:  # settings that the attack does not have
            return False
    return all(
        # up to the comma or bracket, so that steps=10 does not match steps=100
        re.search(rf"\b{re.escape(key)}={re.escape(repr(value))}(?=[,)])", call)
        for key, value in settings.items()
    )


def as_evaluation(it: Claim, found: Evaluated) -> Evaluation:
    """Results of a claim in the format of a stored evaluation."""

    def cell(attacked: Attacked) -> Cell:
        value = None if attacked.expected is None else attacked.expected.value
        if value is None and attacked.each is not None:
            # a cascade attacked a part of the images; the others were fooled already and count as 0
            value = float(unpacked(attacked.each).mean())
        met = None if attacked.met is None else int((unpacked(attacked.met) > 0).sum())
        return Cell(
            id=attacked.id, attack=attacked.attack, repr=attacked.repr, view=attacked.view,
            aware=attacked.aware, bounded=attacked.bounded, met=met,
            threat=Budget(norm=found.norm, eps=found.eps), accuracy=Accuracy(expected=value),
        )  # fmt: skip

    def value(figure: Figure | None) -> float | None:
        return None if figure is None else figure.value

    checks: Iterable[Check] = found.checks or (
        Check(id=name, passed=False) for name in found.red_checks
    )
    return Evaluation(
        schema=1, suite=" + ".join(dict.fromkeys(plan.name for plan in found.suites)),
        run={"name": it.name, **it.run}, data=Data(**found.data),
        clean=Clean(expected=value(found.clean), per_member=found.clean_members),
        cells=tuple(map(cell, found.cells)),
        further_cells=tuple(map(cell, found.further or ())),
        headline=Headline(
            unaware=value(found.unaware), aware=value(found.aware), exact=found.exact
        ),
        checks=tuple(checks), mixture=it.run["ensemble"].get("mixture"),
        randomized=it.kind != "single", stochastic=not found.exact,
    )  # fmt: skip
