"""Makes a claim from an evaluated run, or from evaluations of other weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redefense.claims.format import (
    Attacked,
    Claim,
    Evaluated,
    Figure,
    Plan,
    Training,
    figure,
    file_name,
    packed,
)
from redefense.errors import ConfigError, DataError
from redefense.evaluation.suite import SUITES
from redefense.hub.pretrained import without_paths
from redefense.results.intervals import Estimate
from redefense.results.join import Result, results_of
from redefense.results.records import Scored, Stored, load, valid
from redefense.results.schema import suite_version
from redefense.runtime.folders import FINAL
from redefense.train.checkpoint import Checkpoint
from redefense.train.cost import count
from redefense.train.loading import Signature, find_final


def claim(
    sources: Sequence[Path],
    name: str | None = None,
    *,
    log: Callable[[str], None] | None = None,
    **about: str | None,
) -> Claim:
    """The claim of an evaluated run, or of evaluations of one set of weights.

    Evaluations of validation images are left out, since settings may have been chosen on them.

    Args:
        sources: one run directory; or files of evaluations, next to the folders of their records.
        name: of the claim; default: that of the run.
        log: called with a line for each evaluation that is left out.
        about: authors, link and licence; required, with the name, for weights that are not of a
            run.

    Raises:
        ConfigError: if a required statement is missing, or the name cannot be that of a file.
        DataError: if a source is not trained, not evaluated on test images, damaged or of other
            weights.
    """
    found = [it for source in sources for it in load(source)]
    stored = [it for it in found if it.evaluation.data.split != "validation"]
    if not stored:
        raise DataError(
            f"{found[0].file} is of validation images, and a claim is of test images: evaluate "
            "without --split validation"
        )
    for it in found:
        if log is not None and it not in stored:
            log(f"{it.file} is of validation images and left out: a claim is of test images")
    homes = {_home(source) for source in sources}
    # evaluations from several places have no common run whose settings could be stated
    home = homes.pop() if len(homes) == 1 else None
    if home is None or not (home / FINAL).is_dir():
        return of_weights(stored, name and file_name(name), about)
    return of_run(find_final(home), stored, file_name(name or home.name), about)


def _home(source: Path) -> Path:
    """The run of a source, if it has one."""
    source = source.resolve()
    return source if source.is_dir() else source.parent.parent  # DIR/evaluation/SUITE.json


def of_run(
    checkpoint: Checkpoint, stored: Sequence[Stored], name: str, about: Mapping[str, str | None]
) -> Claim:
    """The claim of a trained run; arguments and errors as in `claim`."""
    data = Signature.stored(checkpoint.state)
    # a claim is public: paths of this machine are omitted
    run = without_paths(checkpoint.run)
    cost = count(run, num_classes=len(data.classes), shape=data.shape, images=data.images)
    weights = checkpoint.weights_sha256()
    _same_weights(stored, weights)
    return Claim(
        schema=1,
        name=name,
        authors=about.get("authors"),
        link=about.get("link"),
        licence=about.get("licence"),
        run=run.model_dump(mode="json"),
        training=Training(
            epochs=run.epochs,
            images=cost.steps * cost.batch,
            passes=round(cost.passes(), 2),
            minutes=None,
            parameters=cost.parameters,
            weights=weights,
        ),
        evaluations=_evaluations(stored),
    )


def of_weights(
    stored: Sequence[Stored], name: str | None, about: Mapping[str, str | None]
) -> Claim:
    """The claim of weights not trained by redefense; arguments and errors as in `claim`."""
    stated = {"name": name, **about}
    if missing := [
        f"--{key}" for key in ("name", "link", "authors", "licence") if not stated.get(key)
    ]:
        raise ConfigError(
            f"a claim of weights that `redefense train` did not make needs {', '.join(missing)}"
        )
    assert name is not None
    plan = _plan_of(stored[0])
    if plan.weights is None or plan.parameters is None:
        raise DataError(
            f"{stored[0].file} has no hash of its weights: evaluate them again with "
            "redefense.evaluate of this version"
        )
    _same_weights(stored, plan.weights)
    first = stored[0].evaluation
    members = len(first.clean.per_member) or 1
    kind = "stochastic" if first.stochastic else "independent" if members > 1 else "network"
    run: dict[str, Any] = {
        "data": {"spec": first.data.name},
        "ensemble": {"name": kind, "num_members": members, "mixture": first.mixture},
        "defence": {"name": name},
        "threat": plan.threat.model_dump(),
    }
    return Claim(
        schema=1,
        name=name,
        authors=about["authors"],
        link=about["link"],
        licence=about["licence"],
        run=run,
        training=Training(
            epochs=None, images=None, passes=None, minutes=None,
            parameters=plan.parameters, weights=plan.weights,
        ),
        evaluations=_evaluations(stored),
    )  # fmt: skip


def _plan_of(stored: Stored) -> Any:
    """The stored plan of a suite.

    Raises:
        DataError: if it is missing.
    """
    if stored.plan is None or stored.file is None or stored.plan.threat.eps is None:
        raise DataError(
            f"{stored.name}: {stored.file} has no plan, so it cannot be recomputed: evaluate again"
        )
    return stored.plan


def _same_weights(stored: Iterable[Stored], weights: str) -> None:
    for it in stored:
        found = _plan_of(it).weights
        # older evaluations did not record their weights
        if found not in (None, weights):
            raise DataError(f"{it.file} is an evaluation of other weights ({found}, not {weights})")


def _evaluations(stored: Sequence[Stored]) -> tuple[Evaluated, ...]:
    for it in stored:
        if it.missing:
            raise DataError(
                f"{it.file}: its per-image records are missing ({', '.join(it.missing)}), so its "
                "figures cannot be checked: copy the folder of the records next to the file"
            )
    return tuple(sorted(map(evaluated, results_of(stored)), key=lambda e: e.subject))


def evaluated(result: Result) -> Evaluated:
    """One joined result as data."""
    data, drawn = result.evaluations[0].data, result.stochastic
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
        exact=drawn is None,
        draws=None if drawn is None else drawn.draws,
        aware_draws=None if drawn is None else _with(drawn.aware, drawn.aware_interval_draws),
        cells=tuple(
            _attacked(scored)
            for scored in result.cells
            if scored.expected is not None or scored.q is not None
        ),
        further=tuple(map(_attacked, result.further)),
        red_checks=tuple(c.id for c in result.checks if c.passed is False),
        checks=result.checks,
        untouched=packed(result.suites[0].clean.q),
        lowest=packed(result.q_aware, deflate=False),
    )  # fmt: skip


def _with(value: float | None, interval: tuple[float, float] | None) -> Figure | None:
    return None if value is None or interval is None else figure(Estimate(value, *interval))


def _attacked(scored: Scored) -> Attacked:
    cell = scored.cell
    return Attacked(
        id=cell.id, attack=cell.attack, view=cell.view, aware=cell.aware, bounded=cell.bounded,
        repr=cell.repr, expected=figure(scored.expected),
        each=packed(scored.q) if cell.bounded else None,
        met=None if scored.whole or scored.met is None else packed(scored.met),
    )  # fmt: skip


def planned(stored: Stored) -> Plan:
    """The settings with which a stored suite was run.

    Raises:
        DataError: if they are missing, or contain attacks that others cannot run.
    """
    plan, file = _plan_of(stored), stored.file
    assert file is not None
    if plan.objects:
        raise DataError(
            f"{file} has attacks that were given as objects ({', '.join(plan.objects)}), which "
            "others cannot run: register them under names in a plug-in, and evaluate again"
        )
    name = plan.suite["name"]
    known = SUITES[name].model_dump(mode="json") if name in SUITES else {}
    # these two may be chosen by an option and make no other suite
    options = {key: plan.suite.get(key) for key in ("cascade", "precision")}
    ours = bool(known) and {**known, **options} == plan.suite
    chosen = {key: value for key, value in options.items() if ours and value != known[key]}
    settings = {
        "file": file.stem, "suite": name if ours else plan.suite,
        "norm": "2" if plan.threat.norm == "2" else "inf", "eps": plan.threat.eps,
        "images": plan.images, "seed": plan.seed, "seeds": plan.seeds, "checks": plan.checks,
        **chosen, "stochastic": plan.stochastic, "batch_size": plan.batch_size,
        "version": suite_version(plan.suite), "provenance": stored.evaluation.provenance,
    }  # fmt: skip
    return valid(Plan, settings, f"{file} cannot be part of a claim")
