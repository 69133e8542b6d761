"""Images and labels given as objects: tensors, arrays, a torch `Dataset` or a `DataLoader`."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from redefense.data import test_indices
from redefense.data.objects import as_tensor, length_of, of_dataset, of_loader
from redefense.errors import InputError
from redefense.types import Images, Labels, check_images, check_labels

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
        pair: Any = of_loader(data)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        # chosen before reading: a data set may be large and slow
        index = _chosen(length_of(data), images)
        return *_checked(*of_dataset(data, index.tolist())), index
    else:
        pair = data
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        got = type(pair).__name__ + (f" of {len(pair)}" if isinstance(pair, tuple | list) else "")
        raise InputError(
            "data must be a specification, a pair (images, labels) of tensors or arrays, a torch "
            f"Dataset with a length, or a DataLoader, got {got}"
        )
    x, y = _checked(_channels_first(pair[0]), as_tensor(pair[1]))
    index = _chosen(len(x), images)
    return (x, y, index) if images is None else (x[index], y[index], index)


def _chosen(total: int, images: int | None) -> Index:
    if images is None:
        return np.arange(total)
    return np.asarray(test_indices(total, images).numpy())


def _channels_first(value: Any) -> Any:
    x = as_tensor(value)
    # tensors have channels first by torch's convention; arrays may come from image files
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
