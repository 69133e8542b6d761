"""Communication between the processes of a mesh within a training step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.modules.batchnorm import _BatchNorm

from redefense.ensembles import Ensemble
from redefense.errors import ConfigError
from redefense.runtime.mesh import Mesh


@contextmanager
def spread_over(mesh: Mesh, ensemble: Ensemble) -> Iterator[None]:
    """Context that distributes the training steps of the ensemble over the mesh.

    Raises:
        ConfigError: if FSDP2 has sharded weights, or members that share weights would be trained
            in different processes.
    """
    check_weights(mesh, ensemble)
    if mesh.size == 1:
        yield
        return
    before = ensemble.spread
    ensemble.spread = Shared(mesh, ensemble.num_members)
    try:
        with _synced_batch_norm(ensemble, mesh):
            yield
    finally:
        ensemble.spread = before


def check_weights(mesh: Mesh, ensemble: Ensemble) -> None:
    """Check that the weights can be distributed over the mesh.

    Raises:
        ConfigError: if FSDP2 has sharded them, or members in different columns share them.
    """
    _refuse_sharded(ensemble)
    seen: set[nn.Parameter] = set()
    for m in range(ensemble.num_members if mesh.shape[1] > 1 else 0):
        params = set(ensemble.parameters_of(m))
        if seen & params:
            raise mesh.mark_reported(
                ConfigError("members that share weights cannot be trained in different columns")
            )
        seen |= params


def _refuse_sharded(ensemble: nn.Module) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return  # FSDP2 needs a process group
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if any(isinstance(m, FSDPModule) for m in ensemble.modules()) or any(
        isinstance(p, DTensor) for p in ensemble.parameters()
    ):
        raise ConfigError(
            "FSDP2 (fully_shard) frees weights that the second derivative of these losses needs "
            "and then trains nothing: pass plain networks, redefense distributes them itself"
        )


@dataclass(frozen=True, slots=True)
class Shared:
    """The members and images of this process of a mesh (`redefense.runtime.spread.Spread`)."""

    mesh: Mesh
    num_members: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self

    def own(self, num_members: int) -> range:
        return self.mesh.own(num_members)

    def most(self, num_members: int) -> int:
        return -(-num_members // self.mesh.shape[1])

    def copies(self, x: Tensor, num_members: int) -> Sequence[Tensor]:
        count = len(self.own(num_members))
        if self.mesh.shape[1] == 1:
            return [x] * count
        return cast(Sequence[Tensor], _apply(_Copies, x, count, self))

    def members(self, values: Tensor) -> Tensor:
        return values if self.mesh.shape[1] == 1 else cast(Tensor, _apply(_Gather, values, self))

    def whole(self, values: Tensor) -> Tensor:
        values = self.of_all(values.detach())
        if self.mesh.shape[0] == 1:
            return values
        # row r has every D-th image from the r-th on, so that halves of a batch stay halves
        parts = self.mesh.gather(values, self.mesh.batch_group, "members")
        return torch.stack(parts, 2).flatten(1, 2)

    def local_cotangents(self, values: Tensor) -> Tensor:
        rows = self.mesh.shape[0]
        own = self.own(self.num_members)
        return values[own.start : own.stop, self.mesh.row :: rows] * float(rows)

    def rows(self, size: int) -> tuple[int, slice]:
        return size * self.mesh.shape[0], slice(self.mesh.row, None, self.mesh.shape[0])

    def of_all(self, values: Tensor) -> Tensor:
        """(M, ...) of all members from (O, ...) of the local ones."""
        if self.mesh.shape[1] == 1:
            return values
        counts = [len(self.mesh.own(self.num_members, k)) for k in range(self.mesh.shape[1])]
        # all-gather needs equal shapes, and columns may differ by a member
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values
        parts = self.mesh.gather(padded, self.mesh.member_group, "members")
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _apply(function: type[Function], *args: object) -> Any:
    return function.apply(*args)


class _Gather(Function):
    """All-gather over members; backward returns the local part, since all compute the same loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shared: Shared) -> Tensor:
        ctx.own = shared.own(shared.num_members)
        return shared.of_all(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[ctx.own.start : ctx.own.stop], None


class _Copies(Function):
    """One input for each local member; its gradient is the sum over all members."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, shared: Shared) -> tuple[Tensor, ...]:
        ctx.shared = shared
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # in the order of a single process's backward pass, for bit-identical results
        last, *rest = reversed(ctx.shared.of_all(torch.stack(grads)).unbind())
        total = last
        for grad in rest:
            total = total + grad
        return total, None, None


class _Sum(Function):
    """Sum over the processes that share the batch; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return mesh.sum(values.clone(), "moments", mesh.batch_group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # the sum is its own adjoint; as a Function it can be differentiated again
        return _apply(_Sum, grad, ctx.mesh), None


class SyncedBatchNorm(_BatchNorm):
    """Batch norm with the statistics of the whole batch, differentiable any number of times.

    Shares parameters, statistics and settings of `norm`, which is not changed.
    """

    def __init__(self, norm: _BatchNorm, mesh: Mesh) -> None:
        # without memory: parameters and statistics are those of `norm`, assigned below
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training, self.mesh = norm.training, mesh
        self.plain = (norm,)  # in a tuple, so that it is not registered as a submodule

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the replaced norm has the same network before it

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return cast(Tensor, self.plain[0].eval()(input))
        x = input.float() if input.dtype.itemsize < 4 else input
        axes, shape = [0, *range(2, x.ndim)], [-1, *[1] * (x.ndim - 2)]
        count = x.numel() // x.shape[1] * self.mesh.shape[0]
        mean = cast(Tensor, _apply(_Sum, x.sum(axes), self.mesh)) / count
        centred = x - mean.view(shape)
        # from the centred values: a difference of squares would lose precision
        variance = cast(Tensor, _apply(_Sum, centred.square().sum(axes), self.mesh)) / count
        if self.track_running_stats:
            # as torch, which normalises by the biased variance and tracks the unbiased one
            self._follow(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            y = centred * (scale * self.weight).view(shape) + self.bias.view(shape)
        else:
            y = centred * scale.view(shape)
        return y.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        running_mean, running_var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        number = cast(Tensor, self.num_batches_tracked).add_(1)
        share = 1 / float(number) if self.momentum is None else self.momentum
        running_mean.mul_(1 - share).add_(mean, alpha=share)
        running_var.mul_(1 - share).add_(variance, alpha=share)


@contextmanager
def _synced_batch_norm(ensemble: nn.Module, mesh: Mesh) -> Iterator[None]:
    """Context in which every batch norm of the ensemble uses the whole batch."""
    places = [
        (parent, name, child)
        for parent in ensemble.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    if mesh.shape[0] == 1:
        places = []
    for parent, name, child in places:
        setattr(parent, name, SyncedBatchNorm(child, mesh))
    try:
        yield
    finally:
        for parent, name, child in places:
            child.training = getattr(parent, name).training
            setattr(parent, name, child)
