"""Which members and images of a training step are local to this process.

Methods, penalties and views are written for all members and all images of a step, and use the
ensemble's `Spread` where some of them are on other processes. `train.exchange` implements it for
many processes.
"""

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

from torch import Tensor

from redefense.types import Float


@runtime_checkable
class Spread(Protocol):
    """The members and images of a training step on this process.

    O of M members and b of the B images of a batch are local. The loop averages gradients over the
    processes that share a batch. It does not sum over those that share the members: each trains its
    local ones.
    """

    def own(self, num_members: int) -> range:
        """The members on this process."""
        ...

    def most(self, num_members: int) -> int:
        """Maximum number of local members over all processes."""
        ...

    def copies(self, x: Tensor, num_members: int) -> Sequence[Tensor]:
        """`x` once for each local member; its gradient is the sum over all members."""
        ...

    def members(self, values: Float[Tensor, "O ..."]) -> Float[Tensor, "M ..."]:
        """Values of all members from those of the local ones; differentiable once."""
        ...

    def whole(self, values: Float[Tensor, "O b ..."]) -> Float[Tensor, "M B ..."]:
        """Detached values of all members at all images, from the local ones."""
        ...

    def local_cotangents(self, values: Float[Tensor, "M B ..."]) -> Float[Tensor, "O b ..."]:
        """The part of a gradient of `whole`'s result that belongs to local members and images.

        It is multiplied by the number of processes that share the batch, over which the loop
        averages.
        """
        ...

    def rows(self, size: int) -> tuple[int, slice]:
        """B, and the indices of the `size` = b local images."""
        ...


class SingleProcess:
    """A single process with all members and all images."""

    def own(self, num_members: int) -> range:
        return range(num_members)

    def most(self, num_members: int) -> int:
        return num_members

    def copies(self, x: Tensor, num_members: int) -> Sequence[Tensor]:
        # no copies are needed: autograd sums the gradients of all uses of a tensor
        return [x] * num_members

    def members(self, values: Tensor) -> Tensor:
        return values

    def whole(self, values: Tensor) -> Tensor:
        return values

    def local_cotangents(self, values: Tensor) -> Tensor:
        return values

    def rows(self, size: int) -> tuple[int, slice]:
        return size, slice(None)


SINGLE_PROCESS: Final = SingleProcess()
