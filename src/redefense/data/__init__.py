"""Every source of images a user has: found by looking, checked, and held as bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from redefense.data import cifar, digits, parquet
from redefense.data.dataset import Dataset, Split, test_indices, train_validation
from redefense.data.loader import Augment, Loader
from redefense.data.source import Source, materialise
from redefense.errors import DataError

__all__ = [
    "DATASETS", "Augment", "Dataset", "Loader", "Reader", "Split", "load_dataset",
    "test_indices", "train_validation",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """How one kind of data set is found: a line for the user, and a function of its path."""

    summary: str
    read: Callable[[Path | None], Source]


DATASETS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "digits": Reader(summary="1,797 8x8 digits, shipped", read=digits.read),
        "cifar10": Reader(summary="CIFAR-10, any layout: cifar10:PATH", read=cifar.read_cifar10),
        "cifar100": Reader(
            summary="CIFAR-100, any layout: cifar100:PATH", read=cifar.read_cifar100
        ),
        "parquet": Reader(summary="hub image parquet: parquet:PATH", read=parquet.read),
    }
)


def find(spec: str) -> Source:
    """What a spec (`digits`, `cifar10:PATH` ...) names, without decoding any image.

    Raises:
        DataError: if the kind is unknown, or nothing of this kind is at the path.
    """
    kind, _, place = spec.partition(":")
    if kind not in DATASETS:
        raise DataError(f"unknown data set {kind!r}; choose from {', '.join(DATASETS)}")
    path = Path(place).expanduser() if place else None
    if path is not None and not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return DATASETS[kind].read(path)


def load_dataset(
    spec: str, *, cache: Path | None = None, download: bool = False, progress: bool = False
) -> Dataset:
    """Load a data set named by a spec such as `digits` or `cifar10:PATH`.

    Raises:
        DataError: one line that names the file and the rule.
    """
    return materialise(find(spec))
