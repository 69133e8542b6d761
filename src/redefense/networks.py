"""Networks as people have them: called, switched to evaluation, copied and unwrapped.

A network of somebody else's may raise anything, write into its input, keep computed tensors, refuse
to change its mode, or stand inside a wrapper. Every call of one goes through `ask`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from redefense.errors import ModelError, RedefenseError
from redefense.types import cannot_differentiate, cannot_take, first_line, has_no_values


def ask(network: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, C) logits of a network, as `as_logits`; whatever it raises becomes one line.

    It is given a copy: layers that work in place would change the caller's images, and torch
    refuses them where the images ask for a gradient.

    Args:
        network: is called once.
        x: images.
        dtype: in which the network takes them; their own unless given.

    Raises:
        ModelError: the network cannot take the images, or gives no logits of two classes or more.
        ResourceError: memory does not suffice.
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
"""What stands for a logit of -inf, by which networks mask classes; lower where others are."""
OFFSET: Final = 1024
"""Double logits beyond it lose their offset before they are rounded, which changes no answer."""


def as_logits(answer: object, x: Tensor) -> Tensor:
    """Logits in the type of their images, single precision at least, finite for masked classes.

    Differences and gradients of -inf are not numbers, and values of another type would spread to
    the points of an attack. Under autocast logits keep their type. Rows without any finite entry
    and integers stay as they are. Of an object with an attribute `logits`, as the networks of
    transformers return, that attribute is taken.

    Raises:
        ModelError: for what is not (B, C) logits of two classes or more.
    """
    if not isinstance(answer, Tensor):
        answer = getattr(answer, "logits", answer)
    sizes = tuple(answer.shape) if isinstance(answer, Tensor) else ()
    if not isinstance(answer, Tensor) or len(sizes) != 2 or sizes[0] != len(x) or sizes[1] < 2:
        got = sizes if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise ModelError(
            f"members must give (B, C) logits of two classes or more, got {got} for B = {len(x)}"
        )
    if not answer.is_floating_point():
        return answer
    dtype = torch.promote_types(x.dtype, torch.float32)
    if answer.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        if answer.dtype.itemsize > dtype.itemsize:
            top = answer.detach().amax(1, keepdim=True)
            large = top.isfinite() & (top.abs() > OFFSET)
            answer = answer - top.masked_fill(~large, 0.0)
        answer = answer.to(dtype)
    if answer.is_meta:
        return answer
    # whether any class is masked is not asked: that would wait for an accelerator
    known = answer.detach()
    masked = (known == -torch.inf) & (known.amax(1, keepdim=True) > -torch.inf)
    lowest = known.masked_fill(masked, torch.inf).amin(1, keepdim=True)
    floor = (2 * lowest).clamp(torch.finfo(known.dtype).min, MASKED)
    return torch.where(masked, floor, answer)


class Asked(nn.Module):
    """A network that is only called through `ask`.

    Args:
        network: from images to logits.
        dtype: in which it takes images; theirs unless given.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        return ask(self.network, x, self.dtype)


class Function(nn.Module):
    """A plain function from images to logits as a network, without weights and modes of its own.

    Args:
        function: called with images; weights that it reaches by other ways are not seen here.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)

    def extra_repr(self) -> str:
        """The function's name, which the report shows."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)


class FromProbabilities(nn.Module):
    """The logits of a network that returns probabilities: their logarithms.

    Args:
        network: from images to (B, C) probabilities.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        # log(0) would stop every gradient of the row
        found = ask(self.network, x)
        return found.clamp_min(torch.finfo(found.dtype).tiny).log()


@contextmanager
def differentiating() -> Iterator[None]:
    """What goes wrong in a network's backward pass within the block becomes one line.

    Raises:
        ModelError: the network, or an operation in it, has no such derivative.
        ResourceError: memory does not suffice.
    """
    try:
        yield
    except RedefenseError:
        raise
    except Exception as error:  # operations of a network may raise anything here too
        raise cannot_differentiate(error) from error


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Attention called within the block has second derivatives, which its fused kernels lack."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def set_evaluation(network: nn.Module) -> None:
    """Evaluation mode, for all parts that are in another and can change it.

    Exported programs cannot: they stay in the mode in which they were exported.
    """
    if not any(mode_of(part) for part in network.modules()):
        return
    try:
        network.eval()
    except Exception:  # noqa: BLE001 - whatever a part says to it
        network.training = False
        for child in network.children():
            set_evaluation(child)


def mode_of(network: nn.Module) -> bool | None:
    """Whether a network trains; None for one that has no mode, as frozen scripts."""
    return getattr(network, "training", None)


def copied(network: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps computed tensors, as after `weight_norm`.

    Raises:
        ModelError: if it keeps what cannot be copied, as an open file or a lock.
    """
    memo: dict[int, Any] = {}
    for module in network.modules():
        for value in _held(list(vars(module).values())):
            if not value.is_leaf:  # torch copies no others
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
    """A network, and all its parts, without the wrappers that spread or compile them.

    Parts are replaced in place: give a copy.
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
    """Refuse weights without values: on the meta device, or initialised by the first call.

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
