"""Kernels written by a hypernetwork: the compact members of PS-RED.

Two linear layers (Ha, Dai & Le, "HyperNetworks", 2017) turn an embedding z in R^e into a *unit*, a
kernel of n x n x 3 x 3. Slice s of it, the weights of output channel s, is

    a_s = W_s z + b_s in R^d,    K_s = W_out a_s + b_out in R^(9 n),

with W_out and b_out common to all slices: n d (e + 1) + 9 n (d + 1) parameters. A larger kernel is
a grid of units: channel blocks within a row, rows stacked along the output channels. A 1x1 kernel
is a grid whose nine taps are reduced to one. Stem, batch norm and classifier stay as they are.
"""

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redefense.errors import ConfigError
from redefense.types import Float

UNITS: Final = (16, 32, 64)
"""Widths of a unit on offer."""


@dataclass(frozen=True, slots=True)
class Taps:
    """How nine taps become one.

    Attributes:
        reduce: from (..., 3, 3) to (..., 1, 1).
        mean_square: of the result, where the taps are independent standard normal numbers.
    """

    reduce: Callable[[Tensor], Tensor]
    mean_square: float


TAPS: Final[Mapping[str, Taps]] = MappingProxyType(
    {
        "mean": Taps(lambda t: t.mean((-2, -1), keepdim=True), 1 / 9),
        # the largest of nine standard normal numbers has mean 1.485013 and variance 0.357353
        "max": Taps(lambda t: t.amax((-2, -1), keepdim=True), 1.485013**2 + 0.357353),
        "sum": Taps(lambda t: t.sum((-2, -1), keepdim=True), 9.0),
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """One kernel as a grid of units.

    Attributes:
        name: of the convolution in its network.
        rows: blocks of output channels.
        columns: blocks of input channels.
        size: 3, or 1 for a kernel whose taps are reduced.
    """

    name: str
    rows: int
    columns: int
    size: int

    @property
    def num_units(self) -> int:
        return self.rows * self.columns

    def num_weights(self, unit: int) -> int:
        """Weights of the kernel."""
        return self.num_units * unit**2 * self.size**2


def grids_of(net: nn.Module, unit: int) -> tuple[Grid, ...]:
    """The kernels of `net` that are written: all convolutions but the first, in their order.

    Raises:
        ConfigError: if there is none, or one that units of this width cannot tile.
    """
    if unit not in UNITS:
        raise ConfigError(f"unit must be one of {', '.join(map(str, UNITS))}, got {unit}")
    convs = [(name, c) for name, c in net.named_modules() if isinstance(c, nn.Conv2d)][1:]
    if not convs:
        raise ConfigError("a hypernetwork needs a convolution beyond the first to write")
    for name, conv in convs:
        shape = tuple(conv.weight.shape)
        if conv.groups != 1 or conv.kernel_size not in ((1, 1), (3, 3)):
            raise ConfigError(f"a hypernetwork writes 3x3 and 1x1 kernels, {name} has {shape}")
        if shape[0] % unit or shape[1] % unit:
            raise ConfigError(
                f"{name} has {shape[1]} to {shape[0]} channels, which units of {unit} do not tile; "
                f"choose another unit ({', '.join(map(str, UNITS))}) or width"
            )
    return tuple(
        Grid(
            name=name,
            rows=conv.out_channels // unit,
            columns=conv.in_channels // unit,
            size=conv.kernel_size[0],
        )
        for name, conv in convs
    )


class Hypernetwork(nn.Module):
    """The two linear layers. At first, embeddings of length sqrt(e) give units of variance 1.

    Args:
        unit: n, channels of a unit.
        embedding: e, numbers in an embedding.
        hidden: d, width of a slice between the two layers.
        rng: all weights are drawn from it.
    """

    def __init__(self, unit: int, embedding: int, hidden: int, rng: torch.Generator) -> None:
        super().__init__()
        with torch.device("meta"):  # torch would draw from its global generator
            self.first = nn.Linear(embedding, unit * hidden)
            self.second = nn.Linear(hidden, 9 * unit)
        self.to_empty(device="cpu")
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.normal_(0, 1 / math.sqrt(layer.in_features), generator=rng)
                layer.bias.zero_()

    def sources(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Its parameters, in the order of `write`."""
        return self.first.weight, self.first.bias, self.second.weight, self.second.bias


def embeddings(num_units: int, size: int, rng: torch.Generator) -> Float[Tensor, "U e"]:
    """Random directions of length sqrt(size): the second moment of standard normal vectors."""
    z = torch.randn(num_units, size, generator=rng)
    scale: Tensor = math.sqrt(size) / z.norm(dim=1, keepdim=True)
    return z * scale


def write_units(
    z: Float[Tensor, "U e"],
    first: Float[Tensor, "nd e"],
    first_bias: Float[Tensor, " nd"],
    second: Float[Tensor, "t d"],
    second_bias: Float[Tensor, " t"],
) -> Float[Tensor, "U n n 3 3"]:
    """Units of all embeddings; axis 1 is the output channel."""
    inner = F.linear(z, first, first_bias).unflatten(1, (-1, second.shape[1]))
    units: Tensor = F.linear(inner, second, second_bias).unflatten(2, (-1, 3, 3))
    return units


def tile(
    units: Float[Tensor, "U n n 3 3"], rows: int, columns: int
) -> Float[Tensor, "out inp 3 3"]:
    """A kernel from rows x columns units, in the order of reading; laid out channels last."""
    n = units.shape[1]
    blocks = units.view(rows, columns, n, n, 3, 3).permute(0, 2, 4, 5, 1, 3)
    return blocks.reshape(rows * n, 3, 3, columns * n).permute(0, 3, 1, 2)


def kernels_from(
    units: Float[Tensor, "U n n 3 3"], grids: Sequence[Grid], taps: str
) -> tuple[Tensor, ...]:
    """The kernels of all grids from their units in order, each scaled to He's variance.

    The scale is fixed by the layer: units of variance 1 give kernels of 2 / (size^2 inputs).
    """
    kernels = []
    for grid, own in zip(grids, units.split([g.num_units for g in grids]), strict=True):
        raw = tile(own, grid.rows, grid.columns)
        if grid.size == 1:
            raw = TAPS[taps].reduce(raw)
        kernels.append(raw * gain(grid, units.shape[1], taps))
    return tuple(kernels)


def gain(grid: Grid, unit: int, taps: str) -> float:
    """What units of variance 1 are multiplied by, so that their kernel has He's variance."""
    mean_square = TAPS[taps].mean_square if grid.size == 1 else 1.0
    return math.sqrt(2 / (grid.size**2 * grid.columns * unit * mean_square))


def untile(
    kernel: Float[Tensor, "out inp k k"], rows: int, columns: int
) -> Float[Tensor, "U n n k k"]:
    """The units of a kernel: the inverse of `tile`, for 1x1 kernels too."""
    n = kernel.shape[0] // rows
    blocks: Tensor = kernel.unflatten(0, (rows, n)).unflatten(2, (columns, n)).transpose(1, 2)
    return blocks.flatten(0, 1)


def write(grids: Sequence[Grid], taps: str, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All kernels of a member from its sources: embeddings, then the hypernetwork's parameters."""
    # single precision also under autocast: the cost is small beside the passes that use them
    with torch.autocast(sources[0].device.type, enabled=False):
        return kernels_from(write_units(*sources), grids, taps)


@dataclass(slots=True, weakref_slot=True)
class Written:
    """Kernels of one member.

    Attributes:
        kernels: without a graph; for inference and attacks.
        linked: the same numbers, from which gradients flow to the sources; dropped once they have.
    """

    kernels: tuple[Tensor, ...]
    linked: tuple[Tensor, ...] | None = None


class _Link(torch.autograd.Function):
    """Hands out kernels that are written already; its backward pass goes through the writing.

    All passes of a member between two backward passes share one link, so that the writing is
    differentiated once, whatever the number of passes. The writing is repeated in the backward
    pass, so nothing but the sources is kept in between.
    """

    @staticmethod
    def forward(ctx: Any, grids: Any, taps: str, written: Written, *sources: Tensor) -> Any:
        # weakly: the kernels must go with their owner, also if no backward pass ever comes
        ctx.grids, ctx.taps, ctx.written = grids, taps, weakref.ref(written)
        ctx.save_for_backward(*sources)
        return tuple(kernel.detach() for kernel in written.kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if (written := ctx.written()) is not None:
            written.linked = None  # this graph is spent
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[3:]
        sources = ctx.saved_tensors
        wanted = [s for s, need in zip(sources, needed, strict=True) if need]
        with torch.enable_grad():
            kernels = write(ctx.grids, ctx.taps, sources)
        found = iter(torch.autograd.grad(kernels, wanted, grads, create_graph=again))
        return None, None, None, *(next(found) if need else None for need in needed)


def linked(
    written: Written, grids: Sequence[Grid], taps: str, sources: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The kernels with a graph to the sources; the same ones until a backward pass used them."""
    if written.linked is None:
        written.linked = _Link.apply(grids, taps, written, *sources)  # type: ignore[no-untyped-call]  # untyped in torch
    assert written.linked is not None
    return written.linked


def strip(net: nn.Module, grids: Sequence[Grid]) -> None:
    """Take the kernels that will be written out of the parameters of `net`."""
    for grid in grids:
        conv = net.get_submodule(grid.name)
        del conv.weight


_worn = threading.RLock()


@contextmanager
def with_kernels(
    net: nn.Module, grids: Sequence[Grid], kernels: Sequence[Tensor]
) -> Iterator[nn.Module]:
    """Within, a stripped network computes with these kernels: no parameters, nothing to save.

    One thread at a time, since the network is the same object for all of them.
    """
    convs = [net.get_submodule(grid.name) for grid in grids]
    with _worn:
        for conv, kernel in zip(convs, kernels, strict=True):
            conv.__dict__["weight"] = kernel
        try:
            yield net
        finally:
            for conv in convs:
                del conv.__dict__["weight"]


def own(net: nn.Module, grids: Sequence[Grid], kernels: Sequence[Tensor]) -> None:
    """Make copies of these kernels parameters of a stripped network."""
    for grid, kernel in zip(grids, kernels, strict=True):
        net.get_submodule(grid.name).register_parameter("weight", nn.Parameter(kernel.clone()))
