"""A stand-in for CUDA graphs on the CPU: records operations and runs them again.

What a capture would refuse or get wrong is refused:

* reading a number back, results whose shape depends on values, indices that are masks;
* drawing random numbers inside the work;
* reading a tensor that was not declared: a constant made on the host, a cache, a stale copy.

As in a capture, recording changes nothing that lives on, and what the work made holds NaN until the
first replay. After each replay all that was made inside, but for the outputs, is overwritten with
NaN again, as other users of a graph's memory pool would overwrite it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redefense.runtime.recording import Recording, RecordingError, Work

READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim",
    "aten::masked_select", "aten::unique_consecutive", "aten::equal", "aten::is_nonzero",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
SILENT = {"aten::native_batch_norm"}
"""Operations that change their arguments and do not say so."""
IGNORED = {"prims::device", "aten::promote_types"}


def storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(slots=True)
class Operation:
    """An operation with the tensors that it was called with and those that it made."""

    function: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    made: list[bool]


class Tape(TorchDispatchMode):
    """Notes operations as they are done.

    Args:
        declared: tensors that live on and that the work may read or change.
    """

    def __init__(self, declared: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # in torch
        self.known = {storage_of(t) for t in declared}
        self.inside: dict[int, Tensor] = {}
        self.undeclared: dict[int, str] = {}
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name.startswith("profiler::"):
            return func(*args, **kwargs)
        self._check(name, args, kwargs)
        given = tensors_in((args, kwargs))
        for tensor in given:
            key = storage_of(tensor)
            if key not in self.known and key not in self.inside and tensor.untyped_storage():
                self.undeclared.setdefault(key, f"{tuple(tensor.shape)} by {name}")
        found = func(*args, **kwargs)
        results, taken = tensors_in(found), {storage_of(t) for t in given}
        made = [storage_of(t) not in taken for t in results]
        for tensor, new in zip(results, made, strict=True):
            if new:
                self.inside.setdefault(storage_of(tensor), tensor)
        changes = func._schema.is_mutable or name in SILENT or any(made) or not results
        if not func.is_view and changes and name not in IGNORED:
            self.operations.append(Operation(func, args, kwargs, results, made))
        return found

    def _check(self, name: str, args: Any, kwargs: Any) -> None:
        if name in READS:
            raise RecordingError(f"{name} reads numbers back")
        masks = (torch.bool, torch.uint8)
        if name in INDEXING and any(t.dtype in masks for t in tensors_in(args[1])):
            raise RecordingError(f"{name} with a mask reads numbers back")
        if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
            raise RecordingError(f"{name} draws random numbers")

    def replay(self) -> None:
        with torch.no_grad():
            for done in self.operations:
                found = tensors_in(done.function(*done.args, **done.kwargs))
                for into, value, new in zip(done.results, found, done.made, strict=True):
                    if new:
                        into.copy_(value)

    def poison(self, spared: Sequence[Tensor] = ()) -> None:
        """Overwrite what was made inside with NaN, or -1 where that is not a number's type."""
        kept = {storage_of(t) for t in spared}
        for key, tensor in self.inside.items():
            if key not in kept:
                torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xFF)


@dataclass(slots=True)
class TapeRecorder:
    """Records on the CPU, in the place of `CudaGraphs`.

    Attributes:
        tapes: of all recordings that were made.
    """

    tapes: list[Tape] = field(default_factory=list)

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def record(
        self, work: Work, reads: Sequence[Tensor], *, after: Recording | None = None
    ) -> Recording:
        before = [(t, t.detach().clone()) for t in reads]
        earlier = [] if after is None else [*tensors_in(after.reads), *after.outputs]
        tape = Tape([*reads, *earlier])
        if after is not None:
            tape.known |= self._tape_of(after).inside.keys()
        try:
            with tape:
                outputs = list(work())
        finally:  # a capture computes nothing, whether it succeeds or not
            for tensor, value in before:
                tensor.data.copy_(value)
        if tape.undeclared:
            raise RecordingError(f"undeclared tensors are read: {[*tape.undeclared.values()]}")
        tape.poison()
        # the graph of a result keeps its memory: a backward pass is recorded after it
        kept = [*tape.inside.values()] if any(t.requires_grad for t in outputs) else outputs
        self.tapes.append(tape)
        return Recording(outputs, self._replaying(tape, kept), reads)

    def _tape_of(self, recording: Recording) -> Tape:
        keys = {storage_of(t) for t in recording.outputs}
        return next(tape for tape in self.tapes if keys <= tape.inside.keys())

    @staticmethod
    def _replaying(tape: Tape, kept: Sequence[Tensor]) -> Callable[[], None]:
        def replay() -> None:
            tape.replay()
            tape.poison(kept)

        return replay
