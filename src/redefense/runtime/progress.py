"""Progress on stderr: a bar on a terminal, else a line at intervals."""

import sys
import time
from collections.abc import Callable
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Log = Callable[[str], None]

PLAIN_INTERVAL: Final = 15.0
"""Seconds between lines in a file, where no bar can be redrawn."""
BAR_INTERVAL: Final = 0.2
"""Seconds between changes of a bar."""


def note(message: str) -> None:
    """One line on stderr: stdout belongs to machine output."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - the one place that prints


def clock_time(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def times(elapsed: float, remaining: float) -> str:
    """Both times of a progress bar, from seconds."""
    return f"{clock_time(elapsed)} elapsed, {clock_time(remaining)} remaining"


class Bar:
    """A bar on a terminal; elsewhere `log` gets each line. Nothing without a `log`.

    Attributes:
        every: seconds between two calls of `show`, and before the first, that users should keep.
    """

    def __init__(self, log: Log | None) -> None:
        console = Console(stderr=True)
        self._log, self._bar = log, None
        self.every = BAR_INTERVAL if console.is_terminal else PLAIN_INTERVAL
        if log is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=1.0, text="")

    def show(self, label: str, share: float, text: str) -> None:
        """Show a label, a finished share in [0, 1] and a text."""
        if self._bar is not None:
            self._bar.start()  # only now, since a bar without a label would be shown before
            self._bar.update(self._task, description=label, completed=share, text=text)
        elif self._log is not None:
            self._log(f"{label}: {text}")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()


class Counter:
    """Progress of equal units of work, at the mean speed so far.

    Args:
        label: of the work.
        total: number of units, of which `done` were finished before.
        unit: their name.
        log: gets the lines where there is no terminal; None shows nothing.
    """

    def __init__(
        self, label: str, total: int, *, unit: str, log: Log | None, done: int = 0
    ) -> None:
        self._bar = Bar(log)
        self._label, self._total, self._unit = label, total, unit
        self._first = self._done = done
        self._start = self._shown = time.monotonic()

    def advance(self, units: int, text: str = "") -> None:
        """Count finished units; `text` is shown with them."""
        self._done += units
        now = time.monotonic()
        if now - self._shown < self._bar.every or self._done <= self._first:
            return
        self._shown, elapsed = now, now - self._start
        remaining = elapsed / (self._done - self._first) * (self._total - self._done)
        counted = f"{self._done}/{self._total} {self._unit}"
        parts = [counted, *([text] if text else []), times(elapsed, remaining)]
        self._bar.show(self._label, self._done / self._total, ", ".join(parts))

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
