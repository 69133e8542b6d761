"""The process mesh of a training, (data, member), and its collectives.

Processes in one row of the mesh share the members: each trains a contiguous range of them and sends
the others its members' input gradients and logits, never weights. Processes in one column have the
same members and share each batch: they average weight gradients and batch norm's statistics. Rank r
of D x K processes is in row r // K and column r % K. Weights are communicated only for checkpoints
and at the end. `exchange` has the communication within a step.

An existing process group (Accelerate, Fabric, Ray, Slurm) is used; else that of `torchrun`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from redefense.errors import ConfigError, RedefenseError, TrainingError, first_line
from redefense.runtime.device import check_device
from redefense.runtime.workers import joined, own_device
from redefense.types import Batch

T = TypeVar("T")
BUCKET: Final = 2**24
"""Elements averaged in one collective: large enough to be fast, small in memory."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mesh:
    """Position of this process in the mesh; a single process by default.

    Attributes:
        shape: rows (that share each batch) and columns (that share the members).
        rank: rank of this process.
        device: device of this process.
        batch_group: the processes of this column, None if there is one row.
        member_group: the processes of this row, None if there is one column.
        traffic: bytes of the tensors sent by this process, by kind; small control messages are not
            counted.
    """

    shape: tuple[int, int] = (1, 1)
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_group: Any = None
    member_group: Any = None
    traffic: Counter[str] = field(default_factory=Counter)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mesh":
        return self  # process groups cannot be copied, but networks that refer to them are

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.shape[0] * self.shape[1]

    @property
    def row(self) -> int:
        """Index of this process's part of each batch."""
        return self.rank // self.shape[1]

    @property
    def column(self) -> int:
        """Index of this process's part of the members."""
        return self.rank % self.shape[1]

    def own(self, num_members: int, column: int | None = None) -> range:
        """The members of this column, or of another."""
        k, columns = self.column if column is None else column, self.shape[1]
        return range(num_members * k // columns, num_members * (k + 1) // columns)

    # used by the training loop

    def average(self, params: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over the processes that share the batch."""
        if self.shape[0] == 1:
            return
        for bucket in _buckets([p.grad for p in params if p.grad is not None]):
            flat = self.sum(torch.cat([g.flatten() for g in bucket]), "gradients", self.batch_group)
            # each process took the mean over its own, equally large part of the batch
            flat /= self.shape[0]
            for grad, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(mean.view_as(grad))

    def clip(self, params: Sequence[nn.Parameter], limit: float) -> None:
        """Scale gradients so that their norm over all members' parameters is at most `limit`."""
        if self.shape[1] == 1:
            nn.utils.clip_grad_norm_(params, limit)
            return
        own = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        # each column has other parameters, so that squares of norms add up
        total = self.sum(own.square(), "log", self.member_group).sqrt()
        nn.utils.clip_grads_with_norm_(params, limit, total)

    def agree(self, stop: int, due: bool) -> tuple[int, bool]:
        """A signal of any process, 0 for none; and whether the first process has a save due."""
        if self.size == 1:
            return stop, due
        # clocks differ: the first process alone decides when a save is due
        flags = torch.tensor([stop, int(due and self.first)], device=self.device)
        with _together(self):
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        found, save = flags.tolist()
        return int(found), bool(save)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Context that raises an exception of any process in all; the first one reports it.

        The block must not wait for other processes.
        """
        if self.size == 1:
            yield
            return
        # not the exception itself: with more arguments than a message it could not be unpickled
        mine: tuple[type[RedefenseError], str, int] | None = None
        try:
            yield
        except RedefenseError as error:
            mine = type(error), str(error), error.code
        found = next((error for error in self.gathered(mine) if error is not None), None)
        if found is not None:
            kind, message, code = found
            raised = self.mark_reported(kind(message))
            raised.code = code  # that of a full disk is not that of the class
            raise raised

    def mark_reported(self, error: RedefenseError) -> RedefenseError:
        """An error that all processes raise; only the first one prints it."""
        error.reported = not self.first
        return error

    def first_does(self, work: Callable[[], T]) -> T:
        """The result of `work`, which only the first process runs."""
        box: list[Any] = [None]
        # an error in the first process would leave the others waiting for its broadcast
        with self.agreed():
            if self.first:
                box[0] = work()
        if self.size > 1:
            with _together(self):
                dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def gathered(self, value: T) -> list[T]:
        """A small value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _together(self):
            dist.all_gather_object(values, value)
        return values

    def joined(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Whole batches, in the order of a single process, from the parts of each."""
        if self.shape[0] == 1:
            yield from batches
            return
        for batch in batches:
            # row r has every D-th image of the batch from the r-th on, see `Loader`
            x, y, index = (
                torch.stack(self.gather(t, self.batch_group, "images"), 1).flatten(0, 1)
                for t in (batch.x, batch.y, batch.index)
            )
            yield replace(batch, x=x, y=y, index=index)

    def refresh(self, state: Mapping[str, Tensor], num_members: int) -> None:
        """Gather all members' weights and statistics from the processes that train them.

        Args:
            state: tensors of the ensemble's `state_dict`, changed in place.
            num_members: M.
        """
        if self.shape[1] == 1:
            return
        for name, value in state.items():
            member = _member_of(name)
            if member is not None:
                self.broadcast(value, self._owner(member, num_members), self.member_group)

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the first row, gather the tensors of all its columns, whose names differ."""
        found = dict(tensors)
        if self.row > 0:
            return found
        for column in range(self.shape[1] if self.shape[1] > 1 else 0):
            source = self.row * self.shape[1] + column
            box: list[Any] = [[(k, v.shape, v.dtype) for k, v in tensors.items()]]
            with _together(self):
                dist.broadcast_object_list(box, source, group=self.member_group)
            for name, shape, dtype in box[0]:
                value = torch.empty(shape, dtype=dtype, device=self.device)
                if column == self.column:
                    value.copy_(tensors[name])
                self.broadcast(value, source, self.member_group)
                found[name] = value
        return found

    def _owner(self, member: int, num_members: int) -> int:
        columns = range(self.shape[1])
        column = next(k for k in columns if member in self.own(num_members, k))
        return self.row * self.shape[1] + column

    # collectives; each counts the bytes sent by this process

    def sum(self, values: Tensor, what: str, group: Any) -> Tensor:
        """Sum over a group, in place; None is all processes."""
        self.traffic[what] += values.nbytes
        with _together(self):
            dist.all_reduce(values, group=group)
        return values

    def gather(self, values: Tensor, group: Any, what: str) -> list[Tensor]:
        """The equally shaped values of a group's processes, in their order."""
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        self.traffic[what] += values.nbytes
        with _together(self):
            dist.all_gather(parts, values, group=group)
        return parts

    def broadcast(self, values: Tensor, source: int, group: Any = None) -> None:
        """Broadcast values of the process of rank `source` to a group, in place."""
        if self.size == 1:
            return
        # collectives need contiguous memory, which weights in channels_last do not have
        plain = values.detach().clone(memory_format=torch.contiguous_format)
        self.traffic["weights"] += plain.nbytes if self.rank == source else 0
        with _together(self):
            dist.broadcast(plain, source, group=group)
        values.copy_(plain)


@contextmanager
def _together(mesh: Mesh) -> Iterator[None]:
    """Context that turns the loss of another process into a one-line error."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error) or "?"
        raise mesh.mark_reported(
            TrainingError(f"another process ended; continue with --resume ({reason})")
        ) from error


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of gradients of one dtype of at most `BUCKET` elements, or a single larger one."""
    run: list[Tensor] = []
    for grad in grads:
        full = sum(g.numel() for g in run) + grad.numel() > BUCKET
        if run and (full or grad.dtype != run[0].dtype):
            yield run
            run = []
        run.append(grad)
    if run:
        yield run


def _member_of(name: str) -> int | None:
    """The member of a tensor of an ensemble's state, by its prefix `members.3.` or `writers.3.`."""
    found = re.match(r"\w+\.(\d+)(\.|$)", name)
    return int(found[1]) if found else None


def parse_mesh(text: str | None, size: int) -> tuple[int, int]:
    """Rows and columns from `DATAxMEMBER`; all processes share the batch by default.

    Raises:
        ConfigError: if the format is wrong, or the product is not `size`.
    """
    if text is None:
        return size, 1
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ConfigError(f"a mesh is written DATAxMEMBER, e.g. 2x4, got {text!r}")
    rows, columns = int(found[1]), int(found[2])
    if rows * columns != size:
        raise ConfigError(f"mesh {text} needs {rows * columns} processes, torchrun started {size}")
    return rows, columns


@contextmanager
def processes(mesh: str | None, device: str) -> Iterator[Mesh]:
    """The mesh of all processes, initialised within the block if needed.

    Args:
        mesh: `DATAxMEMBER`, or None for all processes sharing the batch.
        device: "cuda" becomes this process's local device.

    Raises:
        ConfigError: if the mesh does not fit, or the device is not available.
    """
    own = own_device(device)
    place = check_device(own)
    if own != device:
        # NCCL's collectives and `torch.cuda` calls without a device use the current one
        torch.cuda.set_device(place)
    with joined("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo") as several:
        if not several:
            parse_mesh(mesh, 1)
        yield arranged(mesh, place) if several else Mesh(device=place)


def arranged(mesh: str | None, device: torch.device) -> Mesh:
    """The mesh of the initialised processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        rows, columns = parse_mesh(mesh, size)
    except ConfigError as error:
        error.reported = rank != 0
        raise
    batch_group = member_group = None
    # every process must create every group
    for column in range(columns if rows > 1 else 0):
        group = dist.new_group([row * columns + column for row in range(rows)])
        batch_group = group if rank % columns == column else batch_group
    for row in range(rows if columns > 1 else 0):
        group = dist.new_group([row * columns + column for column in range(columns)])
        member_group = group if rank // columns == row else member_group
    return Mesh(
        shape=(rows, columns),
        rank=rank,
        device=device,
        batch_group=batch_group,
        member_group=member_group,
    )


class Tally:
    """Sums the terms of a loss over members and averages them over parts of the batch.

    One per stage: the names of the terms are exchanged once. They are read from the device
    together, the only synchronisation of a step.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.names: list[str] | None = None

    def __call__(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """The terms of the whole step, equal in all processes."""
        if self.mesh.size == 1:
            alone = torch.stack([*terms.values()]).tolist() if terms else []
            return dict(zip(terms, alone, strict=True))
        if self.names is None:
            # terms of the whole ensemble are logged with one member, and so in one column
            every = self.mesh.gathered([*terms])
            self.names = sorted({name for names in every for name in names})
        zero = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        values = torch.stack([terms.get(name, zero).to(zero) for name in self.names])
        values = self.mesh.sum(values, "log", None) / self.mesh.shape[0]
        return dict(zip(self.names, values.tolist(), strict=True))
