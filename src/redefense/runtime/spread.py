"""Which members and images of a training step are local to this process.

Methods, penalties and views are written for all members and all images of a step, and ask the
ensemble's `Spread` where it matters that some of them are elsewhere. `train.distributed` has the
one for many processes.
"""

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

from torch import Tensor

from redefense.types import Float


@runtime_checkable
class Spread(Protocol):
    """Which members and images of a training step are at home in this process.

    Of M members O are its own; of a batch of B images it sees b. The loop averages gradients over
    the processes that share a batch, and adds nothing up over those that share the members: each
    trains its own.
    """

    def own(self, num_members: int) -> range:
        """The members that are trained here."""
        ...

    def most(self, num_members: int) -> int:
        """As many members as the process trains that trains most: the same in all."""
        ...

    def copies(self, x: Tensor, num_members: int) -> Sequence[Tensor]:
        """`x` once for each own member; its gradient is the sum over all members."""
        ...

    def members(self, values: Float[Tensor, "O ..."]) -> Float[Tensor, "M ..."]:
        """What every member has, from what the own ones have; differentiable once."""
        ...

    def whole(self, values: Float[Tensor, "O b ..."]) -> Float[Tensor, "M B ..."]:
        """Detached values of all members at all images, from the own ones at the images here."""
        ...

    def pull(self, values: Float[Tensor, "M B ..."]) -> Float[Tensor, "O b ..."]:
        """The share of a gradient by `whole`'s result that falls on the own members and images.

        Times the number of processes that share the batch: the loop averages over these.
        """
        ...

    def rows(self, size: int) -> tuple[int, slice]:
        """B, and which of these the `size` = b images here are."""
        ...


class Alone:
    """One process that has all members and all images."""

    def own(self, num_members: int) -> range:
        return range(num_members)

    def most(self, num_members: int) -> int:
        return num_members

    def copies(self, x: Tensor, num_members: int) -> Sequence[Tensor]:
        return [x] * num_members

    def members(self, values: Tensor) -> Tensor:
        return values

    def whole(self, values: Tensor) -> Tensor:
        return values

    def pull(self, values: Tensor) -> Tensor:
        return values

    def rows(self, size: int) -> tuple[int, slice]:
        return size, slice(None)


ALONE: Final = Alone()
