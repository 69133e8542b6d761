"""The folder of an evaluation: used by one job at a time, with one set of settings."""

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from redefense.errors import ConfigError, DataError, InputError, Interrupted
from redefense.evaluation.cells import Subject
from redefense.evaluation.plan import Log
from redefense.evaluation.progress import SILENT, Progress, shown
from redefense.evaluation.provenance import UNKNOWN, place_of
from redefense.evaluation.report_object import Report
from redefense.evaluation.store import read_object
from redefense.evaluation.suite import Suite
from redefense.runtime.files import locked, write_json, write_text
from redefense.runtime.folders import EVALUATION, LOCK, PLAN
from redefense.runtime.signals import handled
from redefense.runtime.workers import SINGLE_PROCESS, Workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Storage and progress of an evaluation in Python."""

    target: Path | None
    started: str
    log: Log
    progress: Progress

    @property
    def store(self) -> Path | None:
        """The folder of the records, next to the report's file."""
        return None if self.target is None else self.target.with_suffix("")

    def finish(self, report: Report) -> None:
        """Write the report, if a folder was given."""
        if self.target is not None:
            report.data["provenance"]["date"] = self.started
            write_text(self.target, report.to_json())


@contextmanager
def exclusive(team: Workers, store: Path, target: Path) -> Iterator[None]:
    """Lock an evaluation against other processes.

    An evaluation that is refused before its first result leaves no file and no new folder.

    Raises:
        ConfigError: on every process of the team, if another process is working on it.
    """
    missing = [folder for folder in (store, *store.parents) if not folder.exists()]
    try:
        with locked(store / LOCK, wait=False) if team.first else nullcontext(True) as free:
            # gathered, so that no process waits for one that has raised
            if not all(team.gather([free])):
                raise ConfigError(
                    f"another process is working on {target}: wait until it ends, or choose "
                    "another out"
                )
            try:
                yield
            except (ConfigError, InputError):
                # the plan of an earlier call stays, though this one is refused
                if team.first and store in missing and _only_planned(store):
                    (store / PLAN).unlink(missing_ok=True)
                raise
    finally:
        for folder in missing if team.first else ():
            with suppress(OSError):  # not empty
                folder.rmdir()


def _only_planned(store: Path) -> bool:
    return all(file.name in (PLAN, LOCK) for file in store.glob("*"))


@contextmanager
def keeping(
    out: str | Path | None,
    plan: Suite,
    settings: Mapping[str, Any],
    subject: Subject,
    *,
    progress: bool,
) -> Iterator[Kept]:
    """Save an evaluation in a folder, if one is given, and show its progress, if requested.

    Raises:
        ConfigError: if the folder has an evaluation with other settings.
        Interrupted: on SIGINT or SIGTERM, if the evaluation is saved.
    """
    log = partial(print, file=sys.stderr, flush=True) if progress else silent
    target, started = None, ""
    # the lock is taken first and released last
    with ExitStack() as stack:
        if out is not None:
            target = Path(out) / EVALUATION / f"{plan.name}.json"
            store, here = target.with_suffix(""), [place_of(subject.x.device)]
            stack.enter_context(exclusive(SINGLE_PROCESS, store, target))
            started, _ = begin_or_resume(store, target, settings, here)
            stack.enter_context(stoppable(store))
        bar = stack.enter_context(shown(log) if progress else nullcontext(SILENT))
        yield Kept(target=target, started=started, log=log, progress=bar)


@contextmanager
def stoppable(store: Path) -> Iterator[None]:
    """Raise on SIGTERM as on SIGINT, so that context managers exit and restore the terminal."""
    message = f"stopped; results so far are saved in {store}; repeat the same call to resume"

    def stop(number: int) -> None:
        raise Interrupted(message, number)

    try:
        with handled(stop, [signal.SIGTERM]) as ours:
            yield
    except KeyboardInterrupt:
        if not ours:  # an interrupt of a process that handles signals itself
            raise
        raise Interrupted(message, signal.SIGINT) from None


def silent(line: str) -> None:
    """Log nothing."""


def begin_or_resume(
    store: Path, target: Path, settings: Mapping[str, Any], here: Sequence[dict[str, str]] = ()
) -> tuple[str, list[dict[str, str]]]:
    """Check that saved cells have the settings of this plan.

    With `here`, these machines are added to the plan of an unfinished evaluation.

    Returns:
        The start date of the evaluation, which is kept when it is resumed, and all machines that
        worked on it.
    """
    plan = store / PLAN
    if plan.is_file():
        stored = read_object(plan)
        if stored is None:
            raise DataError(f"{plan} is damaged; remove {store} to start over")
        started, known = str(stored.pop("started", "")), stored.pop("places", [UNKNOWN])
        if stored != settings:
            keys = [k for k in settings if stored.get(k) != settings[k]]
            # other code may compute other records under equal settings
            if keys == ["code"]:
                raise ConfigError(
                    f"{store} was begun by another version of the code, and their figures must not "
                    f"be mixed: resume with that version, remove {store} and {target.name}, or "
                    "choose another out"
                )
            raise ConfigError(
                f"{target if target.exists() else store} holds an evaluation with other settings "
                f"({', '.join(keys)}); choose another out, or remove {store} and "
                f"{target.name} to start over"
            )
        # a finished evaluation is read only: this machine has no part in it
        places = known if target.exists() else _distinct([*known, *here])
        if places != known:
            _write_plan(plan, settings, started, places)
        return started, places
    if target.exists():
        raise ConfigError(f"{target} exists and is not an evaluation; choose another out")
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
    write_json(plan, {**settings, "started": started, "places": places})
