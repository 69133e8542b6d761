"""Dynamic batching with a bounded queue and deadlines."""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from redefense.serve.draws import Floats
from redefense.serve.engine import Answers, Engine
from redefense.serve.settings import Settings


class Overloaded(Exception):  # noqa: N818 - a state of the server, answered with 429
    """The queue is full; `retry_after` is the estimated time in whole seconds until it is not."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many images are waiting; retry after {retry_after} s")
        self.retry_after = retry_after


class Late(Exception):  # noqa: N818 - a state of the request, answered with 504
    """A request was not answered before its deadline, `seconds` after its arrival."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer within {seconds:g} s")


@dataclass(slots=True, eq=False)
class _Job:
    images: Floats = field(repr=False)  # `deque.remove` formats the job that it does not find
    client: str
    arrived: float
    future: "asyncio.Future[Answers]" = field(repr=False)


class Batcher:
    """Queues requests and classifies them in batches.

    A separate thread runs batches: under overload the event loop is busy refusing requests, and
    inference must not wait for it. A request's images are processed in one batch.

    Args:
        on_batch: called on the event loop with the number of images of every batch.
    """

    def __init__(
        self, engine: Engine, settings: Settings, on_batch: Callable[[int], None] = lambda n: None
    ) -> None:
        self._engine, self._settings, self._on_batch = engine, settings, on_batch
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._seconds_per_image = 0.0
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return sum(len(job.images) for job in list(self._jobs))

    def start(self) -> None:
        """Start answering requests submitted on the running event loop."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, args=(loop,), name="members")
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; waiting requests are not answered."""
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread is not None:
            self._thread.join()

    async def submit(self, images: Floats, client: str) -> Answers:
        """Answers to images (N, C, H, W) of one request.

        Raises:
            Overloaded: at once, if the queue cannot take them.
            Late: at the deadline.
        """
        loop = asyncio.get_running_loop()
        job = _Job(images, client, time.monotonic(), loop.create_future())
        with self._change:
            waiting = self.waiting
            if waiting + len(images) > self._settings.max_queue:
                raise Overloaded(max(1, math.ceil(waiting * self._seconds_per_image)))
            self._jobs.append(job)
            self._change.notify()
        try:
            async with asyncio.timeout(self._settings.deadline):
                return await job.future
        except TimeoutError:
            raise Late(self._settings.deadline) from None
        finally:
            with self._change, contextlib.suppress(ValueError):  # it ran
                self._jobs.remove(job)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while jobs := self._next_batch():
            images = jobs[0].images if len(jobs) == 1 else np.concatenate([j.images for j in jobs])
            clients = [job.client for job in jobs for _ in job.images]
            started = time.monotonic()
            try:
                outcome: Answers | Exception = self._engine(images, clients)
            except Exception as error:  # noqa: BLE001 - goes to every request of the batch
                outcome = error
            spent = (time.monotonic() - started) / len(images)
            # a moving average, so that Retry-After follows the load and no single slow batch
            # decides it
            self._seconds_per_image += 0.1 * (spent - self._seconds_per_image)
            with contextlib.suppress(RuntimeError):  # the loop has ended: no request is waiting
                loop.call_soon_threadsafe(self._deliver, jobs, outcome)

    def _next_batch(self) -> list[_Job]:
        """As many whole requests as fit, in order; none once closed."""
        with self._change:
            while not self._closed:
                if self._jobs:
                    due = self._jobs[0].arrived + self._settings.max_delay - time.monotonic()
                    # waits a little for others: one run of a member costs less than several
                    if due <= 0 or self.waiting >= self._settings.max_batch:
                        return self._take()
                    self._change.wait(due)
                else:
                    self._change.wait()
        return []

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        room = self._settings.max_batch
        # strictly in order: a large request must not wait for ever behind small ones
        while self._jobs and len(self._jobs[0].images) <= room:
            jobs.append(self._jobs.popleft())
            room -= len(jobs[-1].images)
        return jobs

    def _deliver(self, jobs: list[_Job], outcome: Answers | Exception) -> None:
        start = 0
        for job in jobs:
            end = start + len(job.images)
            if job.future.done():  # its deadline has passed
                pass
            elif isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome.part(start, end))
            start = end
        self._on_batch(start)
