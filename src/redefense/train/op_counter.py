"""Counts the operations of a computation: FLOPs, memory traffic and live memory by phase.

A `OpCounter` is a torch dispatch mode: it intercepts every operation below autograd, second
derivatives included. With `dry` large operations are not computed. Their results have the right
shape and are ones, or, if very large, zeros in memory that is never touched. A step that would take
minutes and gigabytes is thus counted in seconds at full size, since the operations of a training
step depend on shapes and not on values.

Convolutions and matrix products are counted by torch's own formulas (a multiplication and an
addition are two); for all other operations the bytes read and written are counted. Workspace inside
an operation is not counted.
"""

import mmap
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from redefense.runtime.phases import OTHER

LARGE: Final = 2048
"""Size in elements from which a dry run computes nothing; smaller tensors may control the flow."""
FILLED: Final = 64 * LARGE
"""Size up to which its results are ones, since later operations may take a logarithm."""


class Entry(NamedTuple):
    """One operation.

    Attributes:
        phase: the innermost phase it belongs to.
        half: whether it computes in half precision.
        flops: FLOPs of convolutions and matrix products; 0 for all others.
        moved: bytes read and written.
    """

    phase: str
    half: bool
    flops: int
    moved: int


class OpCounter(TorchDispatchMode):
    """Counts the operations within its context; also a `Watcher` of phases.

    Args:
        dry: compute nothing large (on the CPU).
        staying: phases whose tensors are not counted in `live`, like those of `forget_storage`.

    Attributes:
        entries: number of calls of each operation; views and the like are not counted.
        met: number of entries of each phase.
        recording: nothing is counted while this is false.
        live: bytes of existing tensors created while recording, except those of `forget_storage`.
        peak: maximum of `live`.
        worst: the phase of the maximum.
    """

    def __init__(self, *, dry: bool = False, staying: frozenset[str] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.dry, self.staying, self.recording = dry, staying, True
        self.entries: Counter[Entry] = Counter()
        self.met: Counter[str] = Counter()
        self.live = self.peak = 0
        self.worst = OTHER
        self._owned: dict[int, int] = {}
        self._open = [OTHER]
        self._shapes: dict[Any, Any] = {}

    def enter(self, name: str) -> None:
        """Enter a phase."""
        self.met[name] += 1
        self._open.append(name)

    def leave(self) -> None:
        """Leave the innermost phase."""
        self._open.pop()

    def flops(self, phase: str | None = None) -> int:
        """Sum over all phases, or of one phase."""
        return sum(e.flops * n for e, n in self.entries.items() if phase in (None, e.phase))

    def forget_storage(self, tensor: Tensor) -> None:
        """Exclude a persistent tensor, such as a gradient, from `live`."""
        size = self._owned.pop(tensor.untyped_storage()._cdata, 0)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Execute one operation, or simulate it in a dry run."""
        given = kwargs or {}
        # a view has no memory and no arithmetic of its own
        if func.is_view:
            return func(*args, **given)
        tensors = [t for t in _flat((*args, *given.values())) if isinstance(t, Tensor)]
        if self.dry and any(t.numel() >= LARGE for t in tensors):
            out = self._pretend(func, args, given)
        else:
            out = func(*args, **given)
        if self.recording:
            self._book(func, args, given, tensors, out)
        return out

    def _book(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], tensors: list[Tensor], out: Any
    ) -> None:
        made = [t for t in _flat((out,)) if isinstance(t, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
        moved = sum(t.nbytes for t in tensors) + sum(t.nbytes for t in made)
        half = any(t.dtype.itemsize == 2 for t in tensors)
        self.entries[Entry(self._open[-1], half, flops, moved)] += 1
        for tensor in made if self._open[-1] not in self.staying else ():
            self._own(tensor)

    def _own(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._owned or size == 0:
            return
        self._owned[key] = size
        self.live += size
        if self.live > self.peak:
            self.peak, self.worst = self.live, self._open[-1]
        # storages are freed by reference counts, which this follows without keeping them alive
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._owned.pop(key, 0)

    def _pretend(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Results of the right shapes; in-place arguments are not changed."""
        if not func._schema.returns:
            return None
        key = (func, *map(_shape, _flat((*args, *kwargs, *kwargs.values()))))
        # operations of the same shapes recur in every layer and pass
        if key not in self._shapes:
            self._shapes[key] = func(*tree_map(_meta, args), **tree_map(_meta, dict(kwargs)))
        found, schema = self._shapes[key], func._schema
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | dict(kwargs)
        changed = {_place(a): given[a.name] for a in schema.arguments if a.name in given}
        several = len(schema.returns) > 1
        results = [
            _meaningless(result) if place.alias_info is None else changed[_place(place)]
            for place, result in zip(schema.returns, found if several else [found], strict=False)
        ]
        return tuple(results) if several else next(iter(results), None)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _place(argument: Any) -> str | None:
    """The schema's alias annotation of an argument or result."""
    alias = argument.alias_info
    return None if alias is None else min(alias.before_set)


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype)
    return (type(value), value)  # 1, 1.0 and True are equal, but give results of other dtypes


def _meaningless(like: Any) -> Any:
    """Ones on the CPU, or zeros in memory that is not touched until it is read."""
    if isinstance(like, (list, tuple)):
        return type(like)(_meaningless(one) for one in like)
    if not isinstance(like, Tensor):
        return like
    size = like.untyped_storage().nbytes()
    if size == 0 or (like.is_floating_point() and like.numel() <= FILLED):
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).fill_(1)
    # fresh pages: reused memory would have to be cleared
    plain = torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype)
    return plain.as_strided(like.shape, like.stride())
