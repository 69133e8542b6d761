"""The commands that reproduce stored figures, relative to the report's directory.

Relative paths are those that the user gave. An absolute one would tell about his machine: below the
present directory it is shortened, elsewhere the run is called by its name alone.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import Any, Final

from redefense.evaluation.suite import SUITES
from redefense.results.join import Result
from redefense.results.records import Stored

PAGE: Final = Path("report.html")
"""Where `redefense report` writes unless told otherwise."""

HOW: Final = (
    "Typed in the directory where this was made. Runs, data and suites of your own whose place is "
    "elsewhere are called by their name alone; what was evaluated in Python is evaluated there."
)


def shown(path: Path) -> str:
    """A path as it may be printed."""
    if path.is_absolute():
        here = Path.cwd()
        path = path.relative_to(here) if path.is_relative_to(here) else Path(path.name)
    return str(path)


def command(stored: Stored) -> str | None:
    """The command that makes this suite's figures again; None where no run is known."""
    evaluation, plan = stored.evaluation, stored.plan
    run = _run(stored)
    if run is None or not evaluation.run:  # one made in Python is of no run
        return None
    brought = {**_plugins(evaluation.run), **_plugins(evaluation.provenance)}
    named = evaluation.suite in SUITES or f"suites.{evaluation.suite}" in brought
    suite = evaluation.suite if named else f"{evaluation.suite}.json"
    words = ["redefense", "evaluate", run, "--suite", suite]
    if isinstance(spec := evaluation.provenance.get("data"), str):
        kind, _, place = spec.partition(":")
        words += ["--data", f"{kind}:{shown(Path(place))}" if place else kind]
    images = evaluation.data.num_images if plan is None else plan.images
    words += [] if images is None else ["--images", str(images)]
    norm, eps = stored.budget if plan is None else (plan.threat.norm, plan.threat.eps)
    # every digit: with another threat, however close, the stored evaluation is refused
    words += [] if eps is None else ["--eps", repr(eps), "--norm", norm]
    seed = evaluation.provenance.get("seed") if plan is None else plan.seed
    words += [] if seed is None else ["--seed", str(seed)]
    if plan is not None:
        words += ["--seeds", str(plan.seeds)] * (plan.seeds != 1)
        words += ["--checks", plan.checks] * (plan.checks != "quick")
        words += ["--stochastic", plan.stochastic] * (plan.stochastic != "auto")
        ours = SUITES.get(evaluation.suite)
        # a suite of one's own may say otherwise in its file
        whole = plan.suite.get("cascade") is False and (ours is None or ours.cascade)
        words += ["--no-cascade"] * whole
        precision = plan.suite.get("precision")
        if precision not in (None, "fp32" if ours is None else ours.precision):
            words += ["--precision", str(precision)]
    files = dict.fromkeys(origin["file"] for origin in brought.values() if "file" in origin)
    words += [word for file in files for word in ("--plugin", str(file))]
    return shlex.join([*words, *_out(stored, run)])


def _plugins(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What brought the names in a record that are not redefense's own; records may be damaged."""
    found = record.get("plugins")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {str(key): origin for key, origin in pairs if isinstance(origin, Mapping)}


def _run(stored: Stored) -> str | None:
    """The run that was evaluated, as far as it is known."""
    source, file = stored.source, stored.file
    if source is not None and source != file:
        return shown(source)
    if file is not None and _in_run(file):
        return shown(Path(normpath(file.parent / "..")))
    name = stored.evaluation.run.get("name")
    return str(name) if name else None


def _in_run(file: Path) -> bool:
    return file.parent.resolve().name == "evaluation"


def _out(stored: Stored, run: str) -> list[str]:
    """`--out`, where the evaluation does not lie where it would by itself."""
    file = stored.file
    if file is None:
        return []
    folder = Path(run, "evaluation")
    place = folder / file.name if _in_run(file) else Path(shown(file))
    usual = folder / f"{stored.evaluation.suite}.json"
    return [] if place == usual else ["--out", str(place)]


def commands(results: Sequence[Result], out: Path = PAGE) -> list[str]:
    """Every command needed to make the report at `out` again, in order."""
    stored = [s for result in results for s in result.suites]
    evaluate = dict.fromkeys(line for s in stored if (line := command(s)) is not None)
    return [*evaluate, *_report([s.source for s in stored], out)]


def _report(sources: Iterable[Path | None], out: Path) -> list[str]:
    named = dict.fromkeys(None if source is None else shown(source) for source in sources)
    words = ["redefense", "report", *(name for name in named if name is not None)]
    words += [] if out == PAGE else ["--out", shown(out)]
    # what was handed over as JSON has no name on disk
    return [] if None in named else [shlex.join(words)]
