"""Images and labels of torch data sets and loaders."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from redefense.errors import DataError, InputError, RedefenseError, first_line


def of_dataset(data: Dataset[Any], index: Iterable[int] | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels of a torch data set, each read once.

    Args:
        data: returns pairs (image, label).
        index: of the images to read; default: all.

    Raises:
        InputError: if it returns something else, or has no length.
        DataError: if it fails.
    """
    index = range(length_of(data)) if index is None else index
    try:
        rows: list[Any] = [data[i] for i in index]
    except RedefenseError:
        raise
    except Exception as error:  # a user's data set may raise anything
        raise DataError(f"the data set cannot be read: {first_line(error)}") from error
    rule = "the data set must return pairs (image, label) of equal sizes"
    return _joined(rows, rule, torch.stack)


def length_of(data: Any) -> int:
    """The number of images.

    Raises:
        InputError: if it has no length.
    """
    try:
        return len(data)
    except (TypeError, NotImplementedError) as error:
        raise InputError(f"{type(data).__name__} has no length: use one with a length") from error


def of_loader(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    """The images and labels of a loader, in its order.

    Raises:
        InputError: if it shuffles, drops images, or returns something else than pairs.
        DataError: if it fails.
    """
    if isinstance(loader.sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        raise InputError(
            "the loader shuffles, so that its images have no fixed order: use shuffle=False, or "
            "pass the data set itself"
        )
    if loader.drop_last and (lost := length_of(loader.sampler) % (loader.batch_size or 1)):
        raise InputError(
            f"the loader drops its last {lost} images: use drop_last=False, or pass the data set "
            "itself"
        )
    try:
        batches = list(loader)
    except Exception as error:  # a user's data set may raise anything
        raise DataError(f"the loader cannot be read: {first_line(error)}") from error
    rule = "the loader must return batches (images, labels) of equal sizes"
    return _joined(batches, rule, torch.cat)


def _joined(rows: Sequence[Any], rule: str, join: Any) -> tuple[Tensor, Tensor]:
    """The pairs joined by `torch.cat` or `torch.stack`; `rule` begins every error."""
    if not all(isinstance(row, tuple | list) and len(row) == 2 for row in rows):
        raise InputError(rule)
    images, labels = zip(*rows, strict=True)
    if not all(isinstance(as_tensor(x), Tensor) for x in images):
        raise InputError(f"{rule}, as tensors: got {type(images[0]).__name__} as the first image")
    try:
        return (join([as_tensor(x) for x in images]), join([torch.as_tensor(y) for y in labels]))
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{rule}: {first_line(error)}") from error


def as_tensor(value: Any) -> Any:
    """An array or a list of numbers as a tensor of its own memory; anything else unchanged."""
    if not isinstance(value, np.ndarray | list | tuple):
        return value
    try:
        return torch.from_numpy(np.ascontiguousarray(value)).clone()
    except (TypeError, ValueError):  # of text, objects or unequal rows: refused by the type check
        return value
