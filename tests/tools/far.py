"""A device that is not there: tensors that claim to lie on it, computed on the CPU.

What a GPU would refuse is refused here, too: operations on tensors of two devices, and numbers for
one device drawn by a generator of another. So code that must run there can be tested without one.
The device calls itself "meta", the one that torch itself never asks for anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

FAR = torch.device("meta")
NEAR = torch.device("cpu")

MIXED = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_",
         "aten::_index_put_impl_"}  # fmt: skip
"""Operations that take tensors of two devices: copies, and indices from the CPU."""


class Far(Tensor):
    """A tensor that says it lies on the far device; `near` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        made: Far = Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=FAR,
        )  # fmt: skip
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub takes it for a plain method
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """From numbers in Python and back, by way of the CPU: torch keeps none for such a device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        settings = dict(kwargs or {})
        if func is Tensor.tolist:
            return _near(args[0]).tolist()
        if func not in (torch.tensor, torch.as_tensor) or settings.get("device") is None:
            return func(*args, **settings)
        place = settings.pop("device")
        return func(*args, **settings).to(place)


def _of_near(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a device's type that does not know the far one."""

    def asked(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return function(NEAR.type if device_type == FAR.type else device_type, *args, **kwargs)

    return asked


AUTOCAST = ("autocast", "is_autocast_enabled", "get_autocast_dtype")


@contextmanager
def far_device() -> Iterator[None]:
    """Within it, `tensor.to(FAR)` and `torch.zeros(..., device=FAR)` give far tensors."""
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    # else a moved network would keep its parameters and swap their content only
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            for name in AUTOCAST:
                stack.enter_context(mock.patch.object(torch, name, _of_near(getattr(torch, name))))
            stack.enter_context(_Numbers())
            stack.enter_context(_Operations())  # type: ignore[no-untyped-call]  # in torch
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name = func._schema.name  # type: ignore[attr-defined]  # of every operation
    leaves, shape = tree_flatten((args, {k: v for k, v in kwargs.items() if k != "device"}))
    far = [leaf for leaf in leaves if isinstance(leaf, Far)]
    # numbers without dimensions go along with either device
    near = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, Far) and t.dim()]
    asked = kwargs.get("device")
    target = torch.device(asked) if asked is not None else FAR if far else NEAR
    if far and near and name not in MIXED:
        raise RuntimeError(f"{name}: tensors on two devices")
    generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
    if generators and target == FAR:
        raise RuntimeError(f"{name}: a generator of the CPU cannot draw for another device")
    near_args, settings = tree_unflatten([_near(leaf) for leaf in leaves], shape)
    if "device" in kwargs:
        settings["device"] = NEAR
    found = func(*near_args, **settings)
    in_place = {id(tensor.near): tensor for tensor in far}
    if target == NEAR or (name == "aten::copy_" and not isinstance(args[0], Far)):
        return found

    def lifted(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, Far):
            return leaf
        changed = in_place.get(id(leaf))
        return Far(leaf) if changed is None else changed

    return lifted(found) if isinstance(found, Tensor) else tree_map(lifted, found)


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, Far) else leaf
