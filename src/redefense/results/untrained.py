"""Degenerate members: members with accuracy near chance level."""

from collections.abc import Sequence


def degenerate_members(
    accuracies: Sequence[float], mixture: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Members with positive probability and less than half the accuracy of the best member.

    Penalties on input gradients can cause constant members: their gradient is zero, which minimises
    the penalty. Queries answered by such a member are mostly wrong.

    Args:
        accuracies: of every member, on the same clean images.
        mixture: (M,) sampling probabilities; None counts all members.
    """
    weak = [m for m, value in enumerate(accuracies) if 2 * value < max(accuracies)]
    return tuple(m for m in weak if not mixture or mixture[m] > 0)
