"""The commands that reproduce stored figures, relative to the report's directory.

Relative paths are those that the user gave. Absolute paths would reveal details of the machine:
below the working directory they are made relative, elsewhere only the run's name is printed.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import Any, Final

from redefense.evaluation.suite import SUITES, fixes_threat
from redefense.results.join import Result
from redefense.results.records import Stored
from redefense.runtime.folders import EVALUATION

PAGE: Final = Path("report.html")
"""Default output file of `redefense report`."""

HOW: Final = (
    "Run these in the directory where the report was made. Runs, data and suites in other "
    "directories are given by name only; evaluations made in Python are repeated in Python."
)


def shown(path: Path) -> str:
    """A path without details of the machine, for printing."""
    if path.is_absolute():
        here = Path.cwd()
        path = path.relative_to(here) if path.is_relative_to(here) else Path(path.name)
    return str(path)


def command(stored: Stored) -> str | None:
    """The command that reproduces this suite's figures; None if no run is known."""
    evaluation, plan = stored.evaluation, stored.plan
    run = _run(stored)
    if run is None or not evaluation.run:  # evaluations made in Python have no run
        return None
    brought = {**_plugins(evaluation.run), **_plugins(evaluation.provenance)}
    named = evaluation.suite in SUITES or f"suites.{evaluation.suite}" in brought
    suite = evaluation.suite if named else f"{evaluation.suite}.json"
    words = ["redefense", "evaluate", run, "--suite", suite]
    if isinstance(spec := evaluation.provenance.get("data"), str):
        kind, _, place = spec.partition(":")
        words += ["--data", f"{kind}:{shown(Path(place))}" if place else kind]
    if evaluation.data.split == "validation":
        words += ["--split", "validation"]
    images = evaluation.data.num_images if plan is None else plan.images
    words += [] if images is None else ["--images", str(images)]
    norm, eps = stored.budget if plan is None else (plan.threat.norm, plan.threat.eps)
    # all digits: a stored evaluation with any other threat is refused
    if eps is not None and not fixes_threat(evaluation.suite if plan is None else plan.suite):
        # an evaluation at several radii is stored with the largest one
        radii = [point.eps for point in evaluation.eps_curve] or [eps]
        words += ["--eps", ",".join(map(repr, radii)), "--norm", norm]
    seed = evaluation.provenance.get("seed") if plan is None else plan.seed
    words += [] if seed is None else ["--seed", str(seed)]
    if plan is not None:
        words += ["--seeds", str(plan.seeds)] * (plan.seeds != 1)
        words += ["--checks", plan.checks] * (plan.checks != "quick")
        words += ["--stochastic", plan.stochastic] * (plan.stochastic != "auto")
        words += [] if plan.batch_size is None else ["--batch-size", str(plan.batch_size)]
        ours = SUITES.get(evaluation.suite)
        # a user's suite may set this in its file
        whole = plan.suite.get("cascade") is False and (ours is None or ours.cascade)
        words += ["--no-cascade"] * whole
        precision = plan.suite.get("precision")
        if precision not in (None, "fp32" if ours is None else ours.precision):
            words += ["--precision", str(precision)]
    files = dict.fromkeys(origin["file"] for origin in brought.values() if "file" in origin)
    words += [word for file in files for word in ("--plugin", str(file))]
    return shlex.join([*words, *_out(stored, run)])


def _plugins(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Origins of names in a record that come from plug-ins; records may be damaged."""
    found = record.get("plugins")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {str(key): origin for key, origin in pairs if isinstance(origin, Mapping)}


def _run(stored: Stored) -> str | None:
    """The evaluated run, if it is known."""
    source, file = stored.source, stored.file
    if source is not None and source != file:
        return shown(source)
    if file is not None and _in_run(file):
        # not `resolve`, which makes a relative path absolute
        return shown(Path(normpath(file.parent / "..")))
    name = stored.evaluation.run.get("name")
    return str(name) if name else None


def _in_run(file: Path) -> bool:
    return file.parent.resolve().name == EVALUATION


def _out(stored: Stored, run: str) -> list[str]:
    """The option `--out`, if the evaluation is not in its default place."""
    file = stored.file
    if file is None:
        return []
    folder = Path(run, EVALUATION)
    place = folder / file.name if _in_run(file) else Path(shown(file))
    usual = folder / f"{stored.evaluation.suite}.json"
    return [] if place == usual else ["--out", str(place)]


def commands(results: Sequence[Result], out: Path = PAGE) -> list[str]:
    """All commands that reproduce the report at `out`, in order."""
    stored = [s for result in results for s in result.suites]
    evaluate = dict.fromkeys(line for s in stored if (line := command(s)) is not None)
    return [*evaluate, *_report([s.source for s in stored], out)]


def _report(sources: Iterable[Path | None], out: Path) -> list[str]:
    named = dict.fromkeys(None if source is None else shown(source) for source in sources)
    words = ["redefense", "report", *(name for name in named if name is not None)]
    words += [] if out == PAGE else ["--out", shown(out)]
    # evaluations given as JSON have no file
    return [] if None in named else [shlex.join(words)]
