"""Images and labels given as objects: tensors, arrays, a torch `Dataset` or a `DataLoader`."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from redefense.data import test_indices
from redefense.errors import DataError, InputError, RedefenseError
from redefense.types import Images, Labels, check_images, check_labels, first_line

Index = npt.NDArray[np.int64]

_CHANNELS = (1, 3, 4)
"""Numbers of channels of an image; arrays with channels last are permuted."""


def read_data(data: Any, images: int | None = None) -> tuple[Images, Labels, Index]:
    """Images, labels (int64) and their indices, detached and usable in autograd.

    Args:
        data: a pair (images, labels) of tensors or arrays; a data set of pairs (image, label), of
            which only the requested images are read; or a loader of batches in a fixed order.
            Floating-point arrays (B, H, W, channels) are permuted, with a warning.
        images: use the first N images of a fixed permutation; default: all, in the given order.

    Raises:
        InputError: for anything else.
        ConfigError: if there are fewer images than requested.
        DataError: if the data set or the loader fails.
    """
    if isinstance(data, DataLoader):
        pair: Any = _of_loader(data)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _of_dataset(data, images)
    else:
        pair = data
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = f"{len(pair)} of them" if isinstance(pair, tuple | list) else type(pair).__name__
        raise InputError(
            "data must be a specification, a pair (images, labels) of tensors or arrays, a torch "
            f"Dataset with a length, or a DataLoader, got {got}"
        )
    x, y = _checked(_channels_first(pair[0]), _tensor(pair[1]))
    index = _chosen(len(x), images)
    return (x, y, index) if images is None else (x[index], y[index], index)


def _chosen(total: int, images: int | None) -> Index:
    if images is None:
        return np.arange(total)
    return np.asarray(test_indices(total, images).numpy())


def _of_dataset(data: Dataset[Any], images: int | None) -> tuple[Images, Labels, Index]:
    index = _chosen(_length(data), images)
    try:
        rows = [data[int(i)] for i in index]
    except RedefenseError:
        raise
    except Exception as error:  # a user's data set may raise anything
        raise DataError(f"the data set cannot be read: {first_line(error)}") from error
    x, y = _stacked(rows, "the data set must return pairs (image, label) of equal sizes")
    return *_checked(x, y), index


def _length(data: Any) -> int:
    try:
        return len(data)
    except (TypeError, NotImplementedError) as error:
        raise InputError(f"{type(data).__name__} has no length: use one with a length") from error


def _of_loader(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    if isinstance(loader.sampler, RandomSampler):
        raise InputError(
            "the loader shuffles, so that its images have no fixed order: use shuffle=False, or "
            "pass the data set itself"
        )
    try:
        batches = list(loader)
    except Exception as error:  # a user's data set may raise anything
        raise DataError(f"the loader cannot be read: {first_line(error)}") from error
    rule = "the loader must return batches (images, labels) of equal sizes"
    if not all(isinstance(b, tuple | list) and len(b) == 2 for b in batches):
        raise InputError(rule)
    return _joined(batches, rule, torch.cat)


def _stacked(rows: Sequence[Any], rule: str) -> tuple[Tensor, Tensor]:
    if not all(isinstance(row, tuple | list) and len(row) == 2 for row in rows):
        raise InputError(rule)
    return _joined(rows, rule, torch.stack)


def _joined(rows: Iterable[Any], rule: str, join: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*rows, strict=True)
    if not all(isinstance(_tensor(x), Tensor) for x in images):
        raise InputError(f"{rule}, as tensors: got {type(images[0]).__name__} as the first image")
    try:
        return (
            join([_tensor(x) for x in images]),
            join([torch.as_tensor(y) for y in labels]),
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{rule}: {first_line(error)}") from error


def _tensor(value: Any) -> Any:
    """An array as a tensor that shares its memory; anything else unchanged."""
    if not isinstance(value, np.ndarray):
        return value
    try:
        return torch.from_numpy(np.ascontiguousarray(value)).clone()
    except TypeError:  # an array of text or objects: refused by the type check
        return value


def _channels_first(value: Any) -> Any:
    x = _tensor(value)
    if isinstance(value, np.ndarray) and isinstance(x, Tensor) and x.ndim == 4:
        turned = x.shape[-1] in _CHANNELS and x.shape[1] not in _CHANNELS
        if turned:
            warnings.warn(
                f"images of shape {tuple(x.shape)} are read as (B, H, W, channels)", stacklevel=4
            )
            return x.permute(0, 3, 1, 2).contiguous()
    return x


def _checked(x: Any, y: Any) -> tuple[Images, Labels]:
    check_images(x)
    check_labels(y, len(x))
    x, y = (
        # inference tensors cannot be used in autograd, and subclasses may override operations
        (part.clone() if part.is_inference() else part).detach().as_subclass(Tensor)
        for part in (x, y)
    )
    return x, y.long()
