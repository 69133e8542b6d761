"""Logging of a training: `metrics.jsonl`, a progress line, TensorBoard."""

import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from redefense.runtime.files import append_line, write_text

PLAIN_INTERVAL = 15.0  # seconds between lines in a file, where no bar can be redrawn


def note(message: str) -> None:
    """One line on stderr: stdout belongs to machine output."""
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - the one place that prints


class Metrics:
    """Appends to `metrics.jsonl`, and to TensorBoard if it is installed."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept: list[str] = []
        if resume_step and self.path.exists():
            # lines after the resumed checkpoint will be written again
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line)
                except ValueError:  # truncated by a killed process
                    break
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._board = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # its records after the resumed checkpoint will be written again, too
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one record."""
        append_line(self.path, json.dumps({"step": step, **values}))
        if self._board is not None:
            for key, value in values.items():
                # names, and lists with a value for each member, are in the file alone
                if isinstance(value, float):
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class ProgressLine:
    """Progress: a bar with the time left on a terminal, occasional lines elsewhere, or nothing."""

    def __init__(self, label: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._quiet = quiet
        self._label, self._total, self._first = label, total, done
        self._start = self._logged_at = time.monotonic()
        if console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(label, total=total, completed=done, text="")
            self._bar.start()

    def update(self, done: int, text: str = "") -> None:
        """Report `done` of the total; `text` is shown with it."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif not self._quiet and now - self._logged_at > PLAIN_INTERVAL and done > self._first:
            self._logged_at = now
            # of the steps of this process: a resumed run has taken others before
            left = (now - self._start) / (done - self._first) * (self._total - done)
            note(f"{self._label}: {done}/{self._total}  {text}  about {left:.0f} s left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
