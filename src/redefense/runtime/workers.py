"""Distributes the chunks of an evaluation over the processes of `torchrun`.

Every chunk has its own random streams, so results do not depend on the process that attacks it. All
processes then have all results, and the first one writes them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch.distributed as dist

from redefense.errors import ConfigError, first_line

T = TypeVar("T")

# torch's default of half an hour would end an evaluation whose chunks take longer
PATIENCE: Final = timedelta(days=7)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """This process among `count`; a single one by default."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def share(self, chunks: Sequence[T]) -> Sequence[T]:
        """The chunks of this process: every `count`-th one."""
        return chunks[self.rank :: self.count]

    def gather(self, results: Sequence[T]) -> list[T]:
        """The results of all chunks in order, gathered from all processes."""
        if self.count == 1:
            return list(results)
        shares: list[Any] = [None] * self.count
        dist.all_gather_object(shares, list(results))
        # dealt round by round, so that taking one of each share in turn restores the order
        rounds = max(map(len, shares))
        return [share[i] for i in range(rounds) for share in shares if i < len(share)]

    def wait(self) -> None:
        """Barrier: return when all processes have reached this point."""
        if self.count > 1:
            dist.barrier()


SINGLE_PROCESS: Final = Workers()


def own_device(device: str) -> str:
    """The device; `cuda` becomes this process's local one under `torchrun`."""
    exists = dist.is_available() and dist.is_initialized()
    several = exists or int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and several else device


@contextmanager
def joined(backend: str = "gloo", timeout: timedelta | None = None) -> Iterator[bool]:
    """The processes of `torchrun` in one group within the block; an existing group is used.

    Yields:
        Whether there is a group; False for a single process.

    Raises:
        ConfigError: if they cannot be initialised.
    """
    exists = dist.is_available() and dist.is_initialized()
    ours = dist.is_available() and not exists and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            why = first_line(error)
            raise ConfigError(f"the processes of WORLD_SIZE cannot be joined: {why}") from None
    try:
        yield exists or ours
    finally:
        if ours:
            dist.destroy_process_group()


@contextmanager
def workers() -> Iterator[Workers]:
    """The processes of `torchrun`, joined by gloo within the block; an existing group is used."""
    # the others may wait hours for a chunk
    with joined(timeout=PATIENCE) as several:
        yield (
            Workers(rank=dist.get_rank(), count=dist.get_world_size())
            if several
            else SINGLE_PROCESS
        )
