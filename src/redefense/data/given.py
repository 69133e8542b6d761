"""Users' data sets: functions that return images and labels, registered by name."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redefense.data.dataset import Dataset, Split
from redefense.data.npz import from_arrays
from redefense.data.objects import of_dataset, of_loader
from redefense.data.source import Part, Refuse, Source
from redefense.errors import DataError, RedefenseError, first_line


def needs_path(function: Callable[..., Any]) -> bool:
    """Whether the function needs a path."""
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(function).parameters.values()
    )


def reader(name: str, function: Callable[..., Any]) -> Callable[..., Source]:
    """Read the data set from a path, with a handler of faults, as `find` does."""
    takes = needs_path(function)

    def read(path: Path, refuse: Refuse) -> Source:
        try:
            found = function(path) if takes else function()
        except RedefenseError:
            raise
        except Exception as error:  # a user's function may raise anything
            if isinstance(error, OSError) and error.filename is not None:
                raise  # it names the file
            raise DataError(
                f"the data set {name} cannot be read: {type(error).__name__}: {first_line(error)}"
            ) from error
        return as_source(name, found, refuse)

    return read


def as_source(name: str, found: Any, refuse: Refuse) -> Source:
    """A data set, or ((x_train, y_train), (x_test, y_test)), under a name.

    Each of the two pairs may also be a torch `Dataset` or a `DataLoader` that does not shuffle.

    Images are bytes as in an npz file, or floats in [0, 1], which are rounded to bytes.

    Raises:
        DataError: naming the part that breaks a rule.
    """
    if isinstance(found, Dataset):
        return Source(
            name=name,
            classes=found.classes,
            shape=found.shape,
            train=_part(found.train),
            test=_part(found.test),
            found=found.found,
        )
    try:
        train, test = found
        (x_train, y_train), (x_test, y_test) = _pair(train), _pair(test)
    except (TypeError, ValueError):
        raise DataError(
            f"the data set {name} must be a redefense.data.Dataset or a pair of pairs "
            f"((x_train, y_train), (x_test, y_test)), or of torch data sets, got "
            f"{type(found).__name__}"
        ) from None
    arrays = {
        "x_train": _bytes(x_train, f"{name}: x_train"),
        "y_train": _array(y_train),
        "x_test": _bytes(x_test, f"{name}: x_test"),
        "y_test": _array(y_test),
    }
    return from_arrays(arrays, name=name, where=name, found=f"arrays of {name}", refuse=refuse)


def _pair(part: Any) -> Any:
    """Images and labels; those of a torch data set or loader are read."""
    if isinstance(part, torch.utils.data.DataLoader):
        return of_loader(part)
    return of_dataset(part) if isinstance(part, torch.utils.data.Dataset) else part


def _part(split: Split) -> Part:
    return Part(
        labels=split.labels.numpy().astype(np.int64),
        blocks=lambda: (some.numpy() for some in split.chunks(1024)),
    )


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _bytes(images: Any, where: str) -> NDArray[Any]:
    raw = _array(images)
    if raw.dtype.kind != "f":
        return raw
    if not raw.size or not 0 <= float(raw.min()) <= float(raw.max()) <= 1:  # false for NaN, too
        raise DataError(
            f"{where}: images as floats must lie in [0, 1], got "
            + (f"{raw.min():g} to {raw.max():g}" if raw.size else "none")
        )
    return (raw * 255).round().astype(np.uint8)
