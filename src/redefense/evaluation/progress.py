"""Progress of an evaluation, and an estimate of the time left.

Within a chunk of images, progress is the number of passes relative to the mean of earlier chunks,
or for the first chunk relative to an estimate from the attack's settings. Remaining work is
estimated in passes, at the speed so far.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Final

from redefense.attacks import Attack
from redefense.runtime.progress import PLAIN_INTERVAL, Bar, times

Show = Callable[[str, float, str], None]
"""Shows a label, a fraction in [0, 1], and a description."""

_FACTORS: Final = frozenset(
    {"steps", "restarts", "draws", "num_targets", "competitors", "popsize", "iterations"}
)
# score-based searches stop at success and have no backward passes
_QUERIES: Final = 0.1


def rough_passes(attack: Attack) -> float:
    """Estimated forward passes of an attack per image and member, from its settings."""
    total, queries = 1.0, 0.0
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        if field.name in _FACTORS:
            total *= value
        elif field.name == "queries":
            queries = _QUERIES * value
        elif isinstance(value, Attack):  # an inner attack, run on each member
            total *= rough_passes(value)
    return total + queries


class Progress:
    """Counts finished work and shows it at intervals.

    Args:
        show: called with a label, the finished fraction and a description; None shows nothing.
        every: seconds between two calls of `show`, and before the first.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        show: Show | None = None,
        *,
        every: float = PLAIN_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show, self._every, self._clock = show, every, clock
        self._begun = self._shown = clock()
        self._plan: list[tuple[str, float]] = []
        self._spent = self._guessed = 0.0  # seconds and estimated passes of finished work
        self._piece: _Piece | None = None

    def plan(self, pieces: Iterable[tuple[str, float]]) -> None:
        """Set the planned work: labels, and estimated passes (per image, times images)."""
        self._plan = list(pieces)

    def begin(self, label: str, total: int, *, share: int, unit: str = "images") -> None:
        """Begin a task of `total` units, of which this process does `share`."""
        if self._show is None:
            return
        self._finish()
        names = [name for name, _ in self._plan]
        at = names.index(label) if label in names else -1
        guess = self._plan[at][1] if at >= 0 else float(total)
        several = at >= 0 and len(names) > 1
        later = math.fsum(passes for _, passes in self._plan[at + 1 :]) if several else None
        self._piece = _Piece(
            label=label, total=total, share=max(share, 1), unit=unit,
            begun=self._clock(), guess=guess, later=later,
        )  # fmt: skip

    def passed(self, passes: int) -> None:
        """Count passes through members in the current chunk."""
        if self._piece is not None:
            self._piece.current += passes
            self._log()

    def advance(self, units: int, passes: float, *, found: bool = False) -> None:
        """Count a chunk as finished; `found` chunks were read from the store and took no time."""
        piece = self._piece
        if piece is None:
            return
        piece.found += units if found else 0
        piece.done, piece.passes, piece.current = piece.done + units, piece.passes + passes, 0
        self._log()

    def _finish(self) -> None:
        piece, self._piece = self._piece, None
        if piece is not None and piece.done > piece.found:
            self._spent += self._clock() - piece.begun
            # only what was computed now: chunks from the store took no time
            self._guessed += piece.guess * (piece.done - piece.found) / piece.share

    def _log(self) -> None:
        now = self._clock()
        piece = self._piece
        if self._show is None or piece is None or now - self._shown < self._every:
            return
        self._shown = now
        share, spent = piece.fraction(), now - piece.begun
        words = f"{int(share * piece.total)}/{piece.total} {piece.unit}"
        fresh = share - piece.found / piece.share
        if fresh > 0:
            left = spent / fresh * (1 - share)
            if piece.later is None:
                words += f", {times(spent, left)}"
            else:
                speed = (self._spent + spent) / (self._guessed + piece.guess * fresh)
                words += f"; in total {times(now - self._begun, left + piece.later * speed)}"
        self._show(piece.label, share, words)


@dataclasses.dataclass(kw_only=True)
class _Piece:
    """The current task.

    Attributes:
        share: units of this process; `done` are finished, of them `found` in the store.
        guess: estimated passes of the whole task; `later`, of all later tasks, None unless the
            task is one of several that are planned.
        passes: of the finished chunks; `current`, of the current chunk.
    """

    label: str
    total: int
    share: int
    unit: str
    begun: float
    guess: float
    later: float | None
    done: int = 0
    found: int = 0
    passes: float = 0.0
    current: int = 0

    def fraction(self) -> float:
        """Finished fraction, in [0, 1]."""
        each = self.passes / self.done if self.done else self.guess / max(self.total, 1)
        # more passes than estimated: the fraction stays below 1 until the chunk ends
        chunk = min(self.current / each, 0.95 * (self.share - self.done)) if each else 0.0
        return min((self.done + chunk) / self.share, 1.0)


SILENT: Final = Progress()


@contextmanager
def shown(log: Callable[[str], None]) -> Iterator[Progress]:
    """Show progress as a bar on a terminal, else as a line by `log` every 15 seconds."""
    with closing(Bar(log)) as bar:
        yield Progress(bar.show, every=bar.every)
