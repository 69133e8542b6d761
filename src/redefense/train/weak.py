"""Members that have learnt next to nothing. Reports ask too, so nothing here needs torch."""

from collections.abc import Sequence


def weak_members(accuracies: Sequence[float]) -> tuple[int, ...]:
    """Members that are right less than half as often as the best of them.

    Penalties on input gradients can silence members: one that answers alike whatever it sees has no
    gradient, and so resembles none. A query that meets it is lost.

    Args:
        accuracies: of every member, on the same clean images.
    """
    return tuple(m for m, value in enumerate(accuracies) if 2 * value < max(accuracies))
