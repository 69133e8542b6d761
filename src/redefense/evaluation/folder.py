"""The folder in which an evaluation is kept: one process owns it, under one set of settings."""

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from redefense.errors import ConfigError, DataError, Interrupted
from redefense.evaluation.cells import Subject
from redefense.evaluation.plan import Say
from redefense.evaluation.progress import SILENT, Progress, shown
from redefense.evaluation.provenance import UNKNOWN, place_of
from redefense.evaluation.report_object import Report
from redefense.evaluation.store import read_object
from redefense.evaluation.suite import Suite
from redefense.runtime.files import locked, write_text
from redefense.runtime.signals import handled
from redefense.runtime.workers import ALONE, Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Where an evaluation in Python is kept, and how it is shown."""

    target: Path | None
    started: str
    say: Say
    progress: Progress

    @property
    def store(self) -> Path | None:
        """The folder of the records, beside the report."""
        return None if self.target is None else self.target.with_suffix("")

    def finish(self, report: Report) -> None:
        """Write the report where it is wanted."""
        if self.target is not None:
            report.data["provenance"]["date"] = self.started
            write_text(self.target, report.to_json())


@contextmanager
def alone(team: Workers, store: Path, target: Path) -> Iterator[None]:
    """Refuse to work on an evaluation that other processes work on at the same moment.

    Raises:
        ConfigError: on every process of the team.
    """
    with locked(store / ".lock", wait=False) if team.first else nullcontext(True) as free:
        if not all(team.gather([free])):
            raise ConfigError(
                f"another process is working on {target}: wait until it ends, or name another file "
                "with --out"
            )
        yield


@contextmanager
def keeping(
    out: str | Path | None,
    plan: Suite,
    settings: Mapping[str, Any],
    subject: Subject,
    *,
    progress: bool,
) -> Iterator[Kept]:
    """Keep an evaluation in a folder, if one is given, and show how far it is, if that is wanted.

    Raises:
        ConfigError: if an evaluation with other settings is kept there.
        Interrupted: on SIGINT or SIGTERM, if the evaluation is kept.
    """
    say = partial(print, file=sys.stderr, flush=True) if progress else silent
    target, started = None, ""
    with ExitStack() as stack:
        if out is not None:
            target = Path(out) / "evaluation" / f"{plan.name}.json"
            store, here = target.with_suffix(""), [place_of(subject.x.device)]
            stack.enter_context(alone(ALONE, store, target))
            started, _ = claim(store, target, settings, here)
            stack.enter_context(stoppable(store))
        bar = stack.enter_context(shown(say) if progress else nullcontext(SILENT))
        yield Kept(target=target, started=started, say=say, progress=bar)


@contextmanager
def stoppable(store: Path) -> Iterator[None]:
    """Ends on SIGTERM as on SIGINT: through the blocks under way, which give the terminal back."""
    told = f"stopped; what is done is kept in {store}, and the same call goes on"

    def stop(number: int) -> None:
        raise Interrupted(told, number)

    try:
        with handled(stop, [signal.SIGTERM]) as ours:
            yield
    except KeyboardInterrupt:
        if not ours:  # the interrupt of a process that handles its signals itself
            raise
        raise Interrupted(told, signal.SIGINT) from None


def silent(line: str) -> None:
    """Say nothing."""


def claim(
    store: Path, target: Path, settings: Mapping[str, Any], here: Sequence[dict[str, str]] = ()
) -> tuple[str, list[dict[str, str]]]:
    """Refuse to mix settings: cells that lie there must come from this very plan.

    With places it is written down that an unfinished evaluation is worked on there from now on.

    Returns:
        When the evaluation was first started, so that one that was killed tells the same date; and
        all the places that worked on it.
    """
    plan = store / "plan.json"
    if plan.is_file():
        stored = read_object(plan)
        if stored is None:
            raise DataError(f"{plan} is damaged; remove {store} to start over")
        started, known = str(stored.pop("started", "")), stored.pop("places", [UNKNOWN])
        if stored != settings:
            keys = [k for k in settings if stored.get(k) != settings[k]]
            if keys == ["code"]:
                raise ConfigError(
                    f"{store} was begun by other code, and figures of both must not be mixed: go "
                    f"on with that code, remove {store} and {target.name}, or name another file "
                    "with --out"
                )
            raise ConfigError(
                f"{target} holds an evaluation with other settings ({', '.join(keys)}); "
                "name another file with --out"
            )
        places = known if target.exists() else _distinct([*known, *here])
        if places != known:
            _write_plan(plan, settings, started, places)
        return started, places
    if target.exists():
        raise ConfigError(f"{target} exists and is not ours; name another file with --out")
    store.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    places = _distinct(here)
    _write_plan(plan, settings, now, places)
    return now, places


def _distinct(places: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [place for i, place in enumerate(places) if place not in places[:i]]


def _write_plan(
    plan: Path, settings: Mapping[str, Any], started: str, places: Sequence[Mapping[str, str]]
) -> None:
    known = {**settings, "started": started, "places": places}
    write_text(plan, json.dumps(known, indent=1) + "\n")
