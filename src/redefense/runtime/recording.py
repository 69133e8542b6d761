"""Records work on a GPU once and replays it: CUDA graphs.

A GPU waits for its host where work consists of many small operations. A CUDA graph launches all of
them at once. A recording fixes the memory that it reads and writes, and every Python number. So
inputs are copied into static memory before each replay, and callers compare a replay with the
direct work, bit by bit, before using it.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from redefense.errors import first_line
from redefense.types import Int

Work = Callable[[], Sequence[Tensor]]

REPLAY: Final = ("auto", "off")
"""Values of the option `--replay`: "auto" replays where recording is supported."""

_SAME_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RecordingError(RuntimeError):
    """Raised for work that cannot be recorded."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Recording:
    """Recorded work.

    Attributes:
        outputs: results of the work, in memory that each replay fills. Empty until the first.
        replay: runs the work again.
        reads: tensors that the work reads or changes, which must not move in memory.
        seconds: time of the recording.
        nbytes: memory of the recording, as far as known.
    """

    outputs: list[Tensor]
    replay: Callable[[], None]
    reads: Sequence[Tensor] = ()
    seconds: float = 0.0
    nbytes: int = 0


@runtime_checkable
class Recorder(Protocol):
    """Makes recordings."""

    def aside(self) -> AbstractContextManager[None]:
        """Stream on which work must run once before it is recorded, to initialise libraries."""
        ...

    def record(
        self, work: Work, reads: Sequence[Tensor], *, after: Recording | None = None
    ) -> Recording:
        """Record without computing anything.

        Args:
            work: returns its outputs.
            reads: persistent tensors that it reads or changes: inputs, weights, statistics.
            after: a recording whose results it also reads.

        Raises:
            RuntimeError: if it cannot be recorded.
        """
        ...


class CudaGraphs:
    """CUDA graphs that share one pool of memory, which is released with the last of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._pool: Any = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(
        self, work: Work, reads: Sequence[Tensor], *, after: Recording | None = None
    ) -> Recording:
        if not len(self._graphs):  # torch does not accept a pool again after its last graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        begun, held = time.perf_counter(), torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            # other threads of this process may use the GPU meanwhile
            torch.cuda.graph(
                graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            outputs = list(work())
        self._graphs.add(graph)
        torch.cuda.synchronize(self.device)
        grown = torch.cuda.memory_reserved(self.device) - held
        return Recording(
            outputs, graph.replay, reads, time.perf_counter() - begun, max(0, int(grown))
        )


def recorder_for(device: torch.device) -> CudaGraphs | None:
    """The recorder of a device; None where recording is not supported."""
    return CudaGraphs(device) if device.type == "cuda" else None


def digest(tensors: Sequence[Tensor]) -> Int[Tensor, " N"]:
    """Two checksums over the bits of each tensor."""
    sums = []
    with torch.no_grad():
        for tensor in tensors:
            kind = _SAME_SIZE[tensor.element_size()]
            bits = tensor.detach().contiguous().view(-1).view(kind).to(torch.int64)
            # a plain sum would not see exchanged values; weighted by the place it does
            place = torch.arange(1, bits.numel() + 1, device=tensor.device) % 65521
            sums += [bits.sum(), (bits * place).sum()]
    return torch.stack(sums)


def reason(error: BaseException) -> str:
    """The first line of an error."""
    return first_line(error) or type(error).__name__
