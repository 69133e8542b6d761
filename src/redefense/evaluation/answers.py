"""Questions that every member must answer before the first attack, or be refused."""

from typing import Final

import torch
from torch import Tensor

from redefense.errors import InputError
from redefense.types import Ensemble, Images, Labels, cannot_take, check_labels

ASKED: Final = 8
"""How often a member is asked the same: a secret draw among two escapes once in 128."""
ALIKE: Final = 8
"""By how many units of rounding, of the logits' spread, equal answers may differ; at least 1e-3."""


def check_outputs(ensemble: Ensemble, x: Images, y: Labels) -> int:
    """Ask one image of every member, so that a misfit is one line and not a wrong figure later.

    Returns:
        The number of classes.

    Raises:
        InputError: if a member cannot take the images, does not give (B, C) logits of as many
            classes as the others, draws something in its forward pass, or if a label lies outside
            [0, C).
    """
    counts = [_classes_of(ensemble, m, x[:1]) for m in range(ensemble.num_members)]
    if len(set(counts)) > 1:
        raise InputError(f"members must know the same classes, got {counts} of them")
    check_labels(y, len(x), counts[0])
    return counts[0]


def _classes_of(ensemble: Ensemble, m: int, x: Images) -> int:
    try:
        with torch.no_grad():
            first, *again = (ensemble.logits_of(m, x) for _ in range(ASKED))
    except (RuntimeError, ValueError) as error:
        raise cannot_take(x, error) from None
    if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != 1 or first.shape[1] < 2:
        got = tuple(first.shape) if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise InputError(
            f"members must give (B, C) logits of two classes or more, got {got} for B = 1"
        )
    # logits that are not finite are no draw: a masked class, or a fault that S07 names
    every = torch.stack([first, *again]).float()
    every = every[:, every.isfinite().all(0)]
    spread = every.amax() - every.amin() if every.numel() else every.sum()
    rounding = max(1e-3, ALIKE * torch.finfo(first.dtype).eps)
    if bool(((every - every[0]).abs() > rounding * spread).any()):
        raise InputError(
            f"member {m} answers the same image in different ways: what is drawn inside a forward "
            "pass cannot be enumerated; give the networks it draws from as a list"
        )
    return first.shape[1]


def laid_out(ensemble: Ensemble, x: Images) -> Images:
    """The same images with channels last, as convolutions are quickest, if the networks take them.

    One that calls `view` on its features may not: it gets them with channels first.
    """
    last = x.contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            ensemble.member_logits(last[:2])
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # what `check_outputs` tells in one line if it is a misfit
        # a clone, since images of one channel count as both layouts and keep their strides
        return x.clone(memory_format=torch.contiguous_format)
    return last
