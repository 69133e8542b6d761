"""Functions for arbitrary networks: calling, evaluation mode, copying and unwrapping.

A user's network may raise any exception, modify its input, store computed tensors, refuse to change
its mode, or be wrapped. Every call goes through `query`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from redefense.errors import ModelError, RedefenseError, first_line
from redefense.types import cannot_differentiate, cannot_take, has_no_values


def query(network: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, C) logits of a network, as `as_logits`; its exceptions become one-line errors.

    It is called with a copy: in-place layers would change the caller's images, and torch refuses
    them where the images require a gradient.

    Args:
        network: called once.
        x: images.
        dtype: dtype of the network's input; that of `x` by default.

    Raises:
        ModelError: the network does not accept the images, or its output is not logits of two
            classes or more.
        ResourceError: not enough memory.
    """
    given = x.clone() if dtype in (None, x.dtype) else x.to(dtype)
    try:
        answer = network(given)
    except RedefenseError:
        raise
    except Exception as error:  # a network may raise anything
        raise cannot_take(given, error) from error
    return as_logits(answer, x)


MASKED: Final = -1e4
"""Replacement of logits of -inf, by which networks mask classes; lower where others are lower."""
OFFSET: Final = 1024
"""Double logits beyond it are shifted before they are rounded, which does not change predictions.
"""


def as_logits(answer: object, x: Tensor) -> Tensor:
    """Logits in the dtype of their images, single precision at least, finite for masked classes.

    Differences and gradients of -inf are NaN, and another dtype would propagate to the points of an
    attack. Under autocast logits keep their dtype. Integers are converted too. Rows without any
    finite entry are not changed. If the output has an attribute `logits`, as in transformers, that
    is used.

    Raises:
        ModelError: if the output is not (B, C) real logits of two classes or more.
    """
    if not isinstance(answer, Tensor):
        answer = getattr(answer, "logits", answer)
    sizes = tuple(answer.shape) if isinstance(answer, Tensor) else ()
    if not isinstance(answer, Tensor) or len(sizes) != 2 or sizes[0] != len(x) or sizes[1] < 2:
        got = sizes if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise ModelError(
            f"members must give (B, C) logits of two classes or more, got {got} for B = {len(x)}"
            + (": pass a function that returns the logits alone" if not sizes else "")
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    if answer.is_complex() or answer.dtype == torch.bool:
        raise ModelError(f"members must give real logits, got {answer.dtype}")
    if not answer.is_floating_point():
        answer = answer.to(dtype)
    if answer.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        if answer.dtype.itemsize > dtype.itemsize:
            top = answer.detach().amax(1, keepdim=True)
            large = top.isfinite() & (top.abs() > OFFSET)
            answer = answer - top.masked_fill(~large, 0.0)
        answer = answer.to(dtype)
    if answer.is_meta:
        return answer
    # no test whether any class is masked: that would synchronise with the device
    known = answer.detach()
    masked = (known == -torch.inf) & (known.amax(1, keepdim=True) > -torch.inf)
    lowest = known.masked_fill(masked, torch.inf).amin(1, keepdim=True)
    floor = (2 * lowest).clamp(torch.finfo(known.dtype).min, MASKED)
    return torch.where(masked, floor, answer)


class Queried(nn.Module):
    """A network that is only called through `query`.

    Args:
        network: maps images to logits.
        dtype: dtype of its input; that of the images by default.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype
        self.training = mode_of(network) or False

    def forward(self, x: Tensor) -> Tensor:
        return query(self.network, x, self.dtype)


class Function(nn.Module):
    """A plain function from images to logits as a network, without weights and modes.

    Args:
        function: called with images; weights that it uses are not registered.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)

    def extra_repr(self) -> str:
        """The function's name, for the report."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)


class FromProbabilities(nn.Module):
    """The logits of a network that returns probabilities: their logarithms.

    Args:
        network: maps images to (B, C) probabilities.

    Raises:
        ModelError: in the first call, if it returns values outside [0, 1].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.checked = False

    def forward(self, x: Tensor) -> Tensor:
        found = query(self.network, x)
        if not self.checked:  # once, since it waits for the device
            low, high = float(found.detach().amin()), float(found.detach().amax())
            if low < 0 or high > 1.01:  # half precision rounds, NaN is counted as wrong
                raise ModelError(
                    f"probabilities must lie in [0, 1], got values from {low:.3g} to {high:.3g}: "
                    "use outputs='logits' for a network without a softmax"
                )
            self.checked = True
        # log(0) would stop every gradient of the row
        return found.clamp_min(torch.finfo(found.dtype).tiny).log()


@contextmanager
def differentiating() -> Iterator[None]:
    """Context that turns exceptions of a network's backward pass into one-line errors.

    Raises:
        ModelError: the network, or an operation in it, has no such derivative.
        ResourceError: not enough memory.
    """
    try:
        yield
    except RedefenseError:
        raise
    except Exception as error:  # operations of a network may raise anything here too
        raise cannot_differentiate(error) from error


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Use attention kernels with second derivatives, which fused kernels lack."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def set_evaluation(network: nn.Module) -> None:
    """Set evaluation mode, where submodules can change their mode.

    Exported programs cannot: they stay in the mode in which they were exported.
    """
    if not any(mode_of(part) for part in network.modules()):
        return
    try:
        network.eval()
    except Exception:  # noqa: BLE001 - whatever the parts raise
        network.training = False
        for child in network.children():
            set_evaluation(child)


def mode_of(network: nn.Module) -> bool | None:
    """Whether a network is in training mode; None if it has no mode, as frozen scripts."""
    return getattr(network, "training", None)


def copied(network: nn.Module) -> nn.Module:
    """A deep copy, also of a network that stores computed tensors, as after `weight_norm`.

    Raises:
        ModelError: if it stores an object that cannot be copied, such as an open file.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for value in _held(list(vars(module).values())):
            if not value.is_leaf:  # torch cannot copy non-leaf tensors
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(network, memo)
    except Exception as error:  # a part may refuse in any way
        name, why = type(network).__name__, first_line(error)
        raise ModelError(f"{name} cannot be copied, which is needed here: {why}") from error


def _held(values: list[Any]) -> Iterator[Tensor]:
    """The tensors among some values and within their lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _held(list(value.values()))
        elif isinstance(value, list | tuple):
            yield from _held(list(value))


def unwrapped(network: nn.Module) -> nn.Module:
    """A network and its submodules without wrappers for distribution or compilation.

    Submodules are replaced in place: pass a copy.
    """
    while (inner := _inner(network)) is not None:
        network = inner
    for name, child in list(network.named_children()):
        if (plain := unwrapped(child)) is not child:
            setattr(network, name, plain)
    return network


def _inner(network: nn.Module) -> nn.Module | None:
    if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return cast(nn.Module, network.module)
    # of `torch.compile`, whose class is private
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def check_values(network: nn.Module) -> None:
    """Check that all weights have values: not on the meta device, not uninitialised.

    Raises:
        ModelError: naming the first.
    """
    for name, value in chain(network.named_parameters(), network.named_buffers()):
        empty = isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer)
        if empty or has_no_values(value):
            raise ModelError(
                f"the weight {name} has no values (it lies on the meta device, or is initialised "
                "by the first call): load or initialise the network first"
            )
