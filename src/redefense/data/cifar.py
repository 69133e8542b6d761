"""CIFAR-10 and CIFAR-100 in every layout they are handed around in, found by looking."""

from dataclasses import replace
from pathlib import Path

from redefense.data import parquet
from redefense.data.source import Source
from redefense.errors import DataError

SHAPE = (3, 32, 32)


def read_cifar10(path: Path | None) -> Source:
    """CIFAR-10 from a folder or file."""
    return _read(path, "cifar10", 10)


def read_cifar100(path: Path | None) -> Source:
    """CIFAR-100 with its fine labels, from a folder or file."""
    return _read(path, "cifar100", 100)


def _read(path: Path | None, name: str, num_classes: int) -> Source:
    if path is None:
        raise DataError(f"{name} needs a path: write {name}:PATH")
    source = parquet.read(path, name)
    if source.shape != SHAPE or len(source.classes) != num_classes:
        raise DataError(
            f"{path}: not {name}: found {len(source.classes)} classes of images "
            f"{'x'.join(map(str, source.shape))}, expected {num_classes} of 3x32x32"
        )
    return replace(source, found=f"{name} as {source.found}")
