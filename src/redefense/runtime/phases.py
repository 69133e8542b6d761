"""Named phases of a training step, for the profiler and the cost model.

Code of any layer encloses a piece of work in `with phase("penalty"):`. Phases nest; an inner phase
is excluded from the outer one. Without a watcher the cost is negligible.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")

DATA: Final = "data"
EXAMPLES: Final = "adversarial examples"
INPUT_GRADIENTS: Final = "input gradients"
PENALTY: Final = "penalty"
MEMBER_STEPS: Final = "member steps"
OPTIMIZER: Final = "optimizer"
OTHER: Final = "other"
PHASES: Final = (DATA, EXAMPLES, INPUT_GRADIENTS, PENALTY, MEMBER_STEPS, OPTIMIZER, OTHER)
"""In the order of tables, without `REPLAYED`. Member steps are forward and backward passes that
reach the weights, second derivatives included; work outside all phases is `other`.
"""
RECORDED: Final = (EXAMPLES, INPUT_GRADIENTS, PENALTY, MEMBER_STEPS)
"""The phases of a training step up to its gradients, which can be recorded."""
REPLAYED: Final = "replayed"
"""Stands for all of them in a replayed step; in no table, since profiled steps are not replayed."""


@runtime_checkable
class Watcher(Protocol):
    """Notified when a phase begins, and when the innermost one ends."""

    def enter(self, name: str) -> None: ...

    def leave(self) -> None: ...


_watcher: Watcher | None = None
# one for all phases, so that an unwatched step allocates nothing
_UNWATCHED: Final = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Context that assigns its work to this phase."""
    return _UNWATCHED if _watcher is None else _phase(_watcher, name)


def each(name: str, items: Iterator[T]) -> Iterator[T]:
    """The same items; their computation is assigned to this phase."""
    end = object()
    while True:
        with phase(name):
            item = next(items, end)
        if item is end:
            return
        # outside the phase, or the work of the consumer would be assigned to it
        yield item  # type: ignore[misc]  # never `end`


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Context in which `by` is the only watcher of phases."""
    global _watcher
    before, _watcher = _watcher, by
    try:
        yield
    finally:
        _watcher = before


@contextmanager
def _phase(watcher: Watcher, name: str) -> Iterator[None]:
    watcher.enter(name)
    try:
        yield
    finally:
        watcher.leave()
