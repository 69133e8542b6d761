"""Arrays of images and labels in one .npz file."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redefense.data.labels import check_classes, check_labels, numbered_classes
from redefense.data.source import Block, Part, Refuse, Source
from redefense.data.tree import BROKEN, method_fault, size_fault
from redefense.errors import DataError, one_line

# as in the files of Keras, and in those of MedMNIST
KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)


def read(path: Path, refuse: Refuse) -> Source:
    """Images as bytes (N, H, W), (N, H, W, ch) or (N, ch, H, W), ch 1 or 3; labels (N,) or (N, 1).

    Arrays are `x_train y_train x_test y_test` or `train_images train_labels test_images
    test_labels`; an array `classes` of strings may name the classes.

    Raises:
        DataError: naming the array that breaks a rule.
    """
    arrays = _Arrays(path)
    keys = next((keys for keys in KEYS if set(keys) <= set(arrays.names)), None)
    if keys is None:
        raise DataError(f"{path}: needs the arrays {' '.join(KEYS[0])}, has {arrays.names}")
    named = {key: arrays[key] for key in (*keys, "classes") if key in arrays.names}
    return from_arrays(
        named, keys, name=path.stem, where=str(path), refuse=refuse, files=(path,),
        found=f"arrays {' '.join(keys)} of {path}",
    )  # fmt: skip


def from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    keys: tuple[str, str, str, str] = KEYS[0],
    *,
    name: str,
    where: str,
    found: str,
    refuse: Refuse,
    files: tuple[Path, ...] = (),
) -> Source:
    """A data set from arrays; see `read` for what they hold.

    Raises:
        DataError: naming the place and the array that breaks a rule.
    """
    x_train, y_train, x_test, y_test = keys
    images = {key: _channels_first(arrays[key], f"{where}: {key}") for key in (x_train, x_test)}
    labels = {key: _labels(arrays[key], f"{where}: {key}") for key in (y_train, y_test)}
    shape = images[x_train].shape[1:]
    if images[x_test].shape[1:] != shape:
        raise DataError(f"{where}: images of {x_train} and {x_test} differ in shape")
    classes = _names(arrays["classes"], where) if "classes" in arrays else (
        numbered_classes(where, *labels.values())
    )  # fmt: skip
    check_classes(classes, where, refuse)
    for x, y, full in ((x_train, y_train, True), (x_test, y_test, False)):
        if len(images[x]) != len(labels[y]):
            raise DataError(f"{where}: {len(images[x])} images {x} for {len(labels[y])} {y}")
        check_labels(labels[y], classes, f"{where}: {y}", refuse, full=full)

    def part(x: str, y: str) -> Part:
        return Part(labels=labels[y], blocks=lambda: iter([images[x]]))

    return Source(
        name=name,
        classes=classes,
        shape=(shape[0], shape[1], shape[2]),
        train=part(x_train, y_train),
        test=part(x_test, y_test),
        found=found,
        files=files,
    )


class _Arrays:
    """The arrays of an untrusted file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    size, packed = entry.file_size, entry.compress_size
                    # arrays of any size are accepted, and up to 64 MiB with any ratio of
                    # compression, since sorted labels compress a thousandfold
                    if fault := method_fault(entry) or size_fault(size, packed, size, free=2**26):
                        raise DataError(f"{path}: {entry.filename}: {fault}")
            with np.load(path, allow_pickle=False) as stored:
                self.names = sorted(stored.files)
        except (*BROKEN, RuntimeError) as error:
            raise DataError(f"{path}: not a readable .npz file ({one_line(error)})") from error

    def __getitem__(self, key: str) -> NDArray[Any]:
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                return np.asarray(stored[key])
        except ValueError as error:
            raise DataError(
                f"{self.path}: {key}: holds Python objects (a pickle), refused"
                if "pickle" in str(error)
                else f"{self.path}: {key}: damaged ({one_line(error)})"
            ) from error
        except (*BROKEN, RuntimeError, MemoryError) as error:  # e.g. encrypted, or absurdly large
            raise DataError(f"{self.path}: {key}: damaged ({one_line(error)})") from error


def _channels_first(images: NDArray[Any], where: str) -> Block:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise DataError(
            f"{where}: needs bytes (uint8) of shape (N, H, W), (N, H, W, ch) or (N, ch, H, W), "
            f"got {images.dtype} {images.shape}"
        )
    if images.ndim == 3:
        return images[:, None]
    if images.shape[1] in (1, 3) and images.shape[3] in (1, 3) and images[0].size > 1:
        raise DataError(
            f"{where}: shape {images.shape} does not show which axis holds the channels, the "
            "second or the last; images 1 or 3 pixels high or wide cannot be read"
        )
    if images.shape[1] in (1, 3):
        return images
    if images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    raise DataError(f"{where}: needs 1 or 3 channels, got shape {images.shape}")


def _labels(labels: NDArray[Any], where: str) -> NDArray[np.int64]:
    if (
        labels.dtype.kind not in "iu"
        or labels.ndim not in (1, 2)
        or (labels.shape not in ((len(labels),), (len(labels), 1)))
    ):
        raise DataError(f"{where}: needs integers (N,), got {labels.dtype} {labels.shape}")
    return labels.reshape(-1).astype(np.int64)


def _names(names: NDArray[Any], path: str) -> tuple[str, ...]:
    if names.dtype.kind != "U" or names.ndim != 1:
        raise DataError(f"{path}: classes: needs strings (C,), got {names.dtype} {names.shape}")
    return tuple(str(name) for name in names)
