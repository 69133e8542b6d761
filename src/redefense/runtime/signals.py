"""Handling of SIGINT and SIGTERM during interruptible work.

Outside the main thread nothing is changed: the owner of the process handles its signals.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

ECHO: Final = 1.0
"""Seconds in which a repeated signal is ignored: torchrun repeats the terminal's."""

STOPPING: Final = (int(signal.SIGINT), int(signal.SIGTERM))


@contextmanager
def handled(
    handle: Callable[[int], None], numbers: Sequence[int] = STOPPING
) -> Iterator[dict[int, Any]]:
    """Call `handle` with the number of each signal that arrives within the block.

    Yields:
        The handlers that were in place before, and will be again.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        handle(number)

    previous: dict[int, Any] = {}
    try:
        for number in numbers:
            try:
                previous[number] = signal.signal(number, on_signal)
            except ValueError:  # not in the main thread
                break
        yield previous
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect signals instead of exiting; a second one, later, acts at once."""
    received: list[int] = []
    first = 0.0

    def handle(number: int) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        # a second request: the user does not want to wait for the save
        elif time.monotonic() - first > ECHO:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        received.append(number)

    with handled(handle) as previous:
        yield received
