"""Degenerate members: those that classify hardly better than chance."""

from collections.abc import Sequence


def degenerate_members(
    accuracies: Sequence[float], mixture: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Members that are ever drawn, and right less than half as often as the best of all.

    Penalties on input gradients can silence members: one that answers alike whatever it sees has no
    gradient, and so resembles none. A query that meets it is lost.

    Args:
        accuracies: of every member, on the same clean images.
        mixture: with what probability each is drawn; None draws all.
    """
    weak = [m for m, value in enumerate(accuracies) if 2 * value < max(accuracies)]
    return tuple(m for m in weak if not mixture or mixture[m] > 0)
