"""Dynamic batching: what waits while a batch runs becomes the next one. Bounded, with deadlines."""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from redefense.serve.draws import Floats
from redefense.serve.engine import Answers, Engine
from redefense.serve.settings import Settings


class Overloaded(Exception):  # noqa: N818 - a state of the server, answered with 429
    """The queue is full; `retry_after` whole seconds are a fair guess of when it is not."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many images are waiting; retry after {retry_after} s")
        self.retry_after = retry_after


class Late(Exception):  # noqa: N818 - a state of the request, answered with 504
    """A request was not answered before its deadline."""


@dataclass(slots=True, eq=False)
class _Job:
    images: Floats
    client: str
    arrived: float
    future: "asyncio.Future[Answers]" = field(repr=False)


class Batcher:
    """Queues requests and classifies them in batches on one worker thread.

    A request's images stay together, in one batch. `work` is the loop; nothing is answered unless
    it runs.

    Args:
        on_batch: called with the number of images of every batch.
    """

    def __init__(
        self, engine: Engine, settings: Settings, on_batch: Callable[[int], None] = lambda n: None
    ) -> None:
        self._engine, self._settings, self._on_batch = engine, settings, on_batch
        self._jobs: deque[_Job] = deque()
        self._arrival = asyncio.Event()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="members")
        self._seconds_per_image = 0.0

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return sum(len(job.images) for job in self._jobs)

    async def submit(self, images: Floats, client: str) -> Answers:
        """Answers to images (N, C, H, W) of one request.

        Raises:
            Overloaded: at once, if the queue cannot take them.
            Late: at the deadline.
        """
        waiting = self.waiting
        if waiting + len(images) > self._settings.max_queue:
            raise Overloaded(max(1, math.ceil(waiting * self._seconds_per_image)))
        loop = asyncio.get_running_loop()
        job = _Job(images, client, loop.time(), loop.create_future())
        self._jobs.append(job)
        self._arrival.set()
        try:
            async with asyncio.timeout(self._settings.deadline):
                return await job.future
        except TimeoutError:
            raise Late(f"no answer within {self._settings.deadline:g} s") from None
        finally:
            with contextlib.suppress(ValueError):  # it ran
                self._jobs.remove(job)

    async def work(self) -> None:
        """Answer what is submitted, for ever."""
        while True:
            await self._arrival.wait()
            await self._wait_for_mates()
            jobs = self._take()
            if jobs:
                await self._answer(jobs)
            else:
                self._arrival.clear()

    def close(self) -> None:
        self._executor.shutdown()

    async def _wait_for_mates(self) -> None:
        loop = asyncio.get_running_loop()
        while self._jobs and self.waiting < self._settings.max_batch:
            left = self._jobs[0].arrived + self._settings.max_delay - loop.time()
            if left <= 0:
                return
            self._arrival.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._arrival.wait()
        self._arrival.set()

    def _take(self) -> list[_Job]:
        jobs: list[_Job] = []
        room = self._settings.max_batch
        while self._jobs and len(self._jobs[0].images) <= room:
            job = self._jobs.popleft()
            room -= len(job.images)
            jobs.append(job)
        return jobs

    async def _answer(self, jobs: list[_Job]) -> None:
        images = jobs[0].images if len(jobs) == 1 else np.concatenate([j.images for j in jobs])
        clients = [job.client for job in jobs for _ in job.images]
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            answers = await loop.run_in_executor(self._executor, self._engine, images, clients)
        except Exception as error:  # noqa: BLE001 - goes to every request of the batch
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)
            return
        spent = (loop.time() - started) / len(images)
        self._seconds_per_image += 0.1 * (spent - self._seconds_per_image)
        self._on_batch(len(images))
        start = 0
        for job in jobs:
            if not job.future.done():
                job.future.set_result(answers.part(start, start + len(job.images)))
            start += len(job.images)
