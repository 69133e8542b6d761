"""Types shared by all modules, and the names of tensor axes.

Axes: M members, B batch, C classes, D flattened pixels, S random samples; images are `B ch H W`.
Images are floats in [0, 1], outputs are logits, normalisation is the first layer of each member.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from redefense.errors import (
    ConfigError,
    InputError,
    ModelError,
    RedefenseError,
    ResourceError,
    first_line,
    lacks_memory,
    text_of,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:  # shapes are checked only in tests; the checker is optional

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

        Bool = Float = Int = UInt8 = _Unchecked

__all__ = [
    "Batch", "Bool", "Float", "Images", "Int", "Labels", "Logits", "Loss", "Per",
    "Progress", "UInt8", "Victim", "cannot_differentiate", "cannot_take", "check_images",
    "check_labels", "correct", "has_no_values", "whole",
]  # fmt: skip

Per = Literal["call", "image"]
"""Whether a member is drawn per call or per image."""

Images = Float[Tensor, "B ch H W"]
Labels = Int[Tensor, " B"]
Logits = Float[Tensor, "B C"]

Victim = nn.Module
"""What an attack may query: any module from images in [0, 1] to logits (B, C)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Position of a training step in its stage, for losses that change during training.

    Attributes:
        epoch: epoch of the stage, from 0.
        epochs: number of epochs of the stage, at least 1.
        seed: the same in all steps of one epoch, another in the next.
    """

    epoch: int = 0
    epochs: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Images (B, ch, H, W) in [0, 1], integer labels (B,) and their indices in the data set.

    `progress` is filled in by the training loop.
    """

    x: Images
    y: Labels
    index: Int[Tensor, " B"]
    progress: Progress = Progress()


@dataclass(frozen=True, slots=True)
class Loss:
    """One addend of a training loss.

    A defence yields its loss as parts whose gradients add up; the loop backpropagates each before
    it requests the next, so that only one member's graph is in memory. `terms` are detached scalars
    for the log, which are summed over the parts, too.
    """

    total: Float[Tensor, ""]
    terms: Mapping[str, Tensor] = field(default_factory=dict)


def correct(logits: Float[Tensor, "*M B C"], y: Labels) -> Bool[Tensor, "*M B"]:
    """Whether each row of logits has its highest entry at the label.

    A row without a highest entry is wrong for every label: one with NaN, one that masks every class
    with -inf, or one with several entries of +inf. `argmax` would return a class for them.
    """
    top = logits.amax(-1, keepdim=True)
    answers = top.isfinite().squeeze(-1) | ((logits == top) & (top > -torch.inf)).sum(-1).eq(1)
    return answers & (logits.argmax(-1) == y)


def has_no_values(x: Tensor) -> bool:
    """Whether a tensor is on the meta device; subclasses may have values elsewhere."""
    return x.is_meta and type(x) in (Tensor, nn.Parameter, nn.Buffer)


def _channels_come_last(height: int, width: int, channels: int) -> bool:
    """Whether the shape of an image looks like (H, W, channels).

    A network that flattens its images would take them in either order without an error.
    """
    # signals are (channels, length, 1): with a single channel only square images are refused
    grey = channels == 1 and height == width
    return (grey or channels == 3) and min(height, width) > 4


def check_images(x: object, what: str = "images") -> None:
    """Check for a non-empty float batch (B, ch, H, W) with finite values in [0, 1].

    Batches that look like (B, H, W, ch), with 1 or 3 channels, are refused.

    Raises:
        InputError: naming the rule and the offending shape, type or value.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{what} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise InputError(f"{what} must be of one size, got a nested tensor")
    if x.ndim != 4 or x.numel() == 0:
        raise InputError(f"{what} must have shape (B, channels, H, W), got {tuple(x.shape)}")
    if _channels_come_last(*x.shape[1:]):
        raise InputError(
            f"{what} must have shape (B, channels, H, W), got {tuple(x.shape)}, which looks "
            "like (B, H, W, channels): pass x.permute(0, 3, 1, 2), or if the channels do come "
            "first, x.mT to a network that transposes it back"
        )
    if has_no_values(x) or x.layout is not torch.strided:
        raise InputError(f"{what} must be dense and hold values, got {x.layout} on {x.device}")
    # floats of 8 bits are storage formats: torch does not compute with them
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        hint = " (bytes: divide them by 255)" if x.dtype == torch.uint8 else ""
        raise InputError(f"{what} must be floating point in [0, 1], got dtype {x.dtype}{hint}")
    low, high = (float(v) for v in x.detach().aminmax())
    # NaN compares false with everything, so this also catches it
    if not (low >= 0.0 and high <= 1.0):
        bad = low if not low >= 0.0 else high
        raise InputError(f"{what} must be finite and lie in [0, 1], found the value {bad:g}")


def cannot_take(x: Tensor, error: Exception) -> RedefenseError:
    """The error to raise when a network fails on valid images, usually due to their shape."""
    shape = tuple(x.shape[1:])
    turned = len(shape) == 3 and shape[0] > 4 and shape[2] in (1, 3, 4)
    hint = " (images are (channels, H, W): permute them)" if turned else ""
    batch = f" in a batch of {len(x)}" if x.ndim == 4 else ""
    return _refusal(error, f"the model cannot take images of {shape}{batch}{hint}")


def cannot_differentiate(error: Exception) -> RedefenseError:
    """The error to raise when the backward pass of a network fails."""
    twice = any(part in text_of(error) for part in _NO_SECOND_DERIVATIVE)
    hint = (
        " twice, which the penalties of red, gal and trs need: train red or gal with "
        "differentiate=finite, or another method, such as at; attention by torch's "
        "scaled_dot_product_attention can be differentiated twice here"
    )
    return _refusal(error, f"the model cannot be differentiated{hint if twice else ''}")


# parts of torch's messages where a second derivative does not exist
_NO_SECOND_DERIVATIVE: Final = (
    "is not implemented", "once_differentiable", "double backward", "appears to not have been used",
)  # fmt: skip


def _refusal(error: Exception, what: str) -> RedefenseError:
    """One line on a network's exception: the first line of its text, and its type."""
    if isinstance(error, RedefenseError):
        return error
    first = first_line(error)
    if lacks_memory(error):
        return ResourceError(
            f"memory does not suffice for the model and these images: {first or 'no text'}; give "
            "it fewer or smaller images at once, or another device"
        )
    kind = type(error).__name__
    plain = first and isinstance(error, RuntimeError | ValueError | AssertionError)
    return ModelError(f"{what}: {first}" if plain else f"{what}: {kind}: {first}".rstrip(": "))


def _integers(y: Tensor) -> bool:
    return not (y.is_floating_point() or y.is_complex() or y.is_quantized or y.dtype == torch.bool)


def check_labels(y: object, num_images: int, num_classes: int | None = None) -> None:
    """Check for integer labels (B,), one per image, in [0, num_classes).

    Raises:
        InputError: naming the rule and the offending shape, type or value.
    """
    if not isinstance(y, Tensor) or y.ndim != 1 or not _integers(y):
        got = f"shape {tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise InputError(f"labels must be a vector of integers, got {got}")
    if len(y) != num_images:
        raise InputError(f"need one label per image, got {len(y)} labels for {num_images} images")
    if has_no_values(y) or y.layout is not torch.strided:
        raise InputError(f"labels must be dense and hold values, got {y.layout} on {y.device}")
    low, high = (int(v) for v in y.long().aminmax())  # some dtypes have no minimum
    if low < 0 or (num_classes is not None and high >= num_classes):
        bound = f"[0, {num_classes})" if num_classes is not None else "[0, ...)"
        raise InputError(f"labels must lie in {bound}, found {low if low < 0 else high}")


def whole(value: Any, name: str, least: int) -> int:
    """An integer, also of numpy; fractions and booleans are refused.

    Raises:
        ConfigError: for anything else, or a number below `least`.
    """
    try:
        # for `operator.index` True is 1
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return found
