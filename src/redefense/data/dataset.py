"""A data set: images as bytes, labels, and its training, validation and test splits."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from redefense.errors import ConfigError
from redefense.rng import stream
from redefense.types import Float, Int, UInt8

HASH_CHUNK = 64 * 2**20
"""Bytes hashed or copied at a time, so that a memory-mapped set is never loaded whole."""


# no generated comparison: == of tensors has no single truth value
@dataclass(frozen=True, slots=True, init=False, repr=False, eq=False)
class Split:
    """N labelled images.

    A subset of another split shares its storage, so that a set larger than memory can be split
    without a copy.

    Attributes:
        store: bytes shared with other splits, (R, ch, H, W).
        labels: class of each of the N images.
        rows: indices into the store, None for all.
    """

    store: UInt8[Tensor, "R ch H W"]
    labels: Int[Tensor, " N"]
    rows: Int[Tensor, " N"] | None

    def __init__(self, images: Tensor, labels: Tensor, rows: Tensor | None = None) -> None:
        if len(labels) != len(images if rows is None else rows):
            raise ConfigError(f"need one label per image, got {len(labels)} for {len(images)}")
        object.__setattr__(self, "store", images)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "rows", rows)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of shape {self.shape})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.store.shape[1:]
        return channels, height, width

    @property
    def images(self) -> UInt8[Tensor, "N ch H W"]:
        """All images; subsets are copied, so prefer `take` on large sets."""
        return self.store if self.rows is None else self.store.index_select(0, self.rows)

    def take(self, index: Int[Tensor, " B"]) -> UInt8[Tensor, "B ch H W"]:
        """Some images, as bytes."""
        rows = index if self.rows is None else self.rows[index]
        return self.store.index_select(0, rows)  # copies whole images, unlike indexing

    def chunks(self, size: int) -> Iterator[UInt8[Tensor, "B ch H W"]]:
        """All images in order, as bytes, `size` at a time, without a copy where possible."""
        if self.rows is None:
            yield from self.store.split(size)
        else:
            yield from (self.store.index_select(0, rows) for rows in self.rows.split(size))

    def float(self, index: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B ch H W"]:
        """Some images (all, without `index`) as float32 in [0, 1]."""
        raw = self.images if index is None else self.take(index)
        return raw.to(torch.float32).div_(255.0)

    def to(self, device: torch.device) -> "Split":
        """A copy of these images on a device, made in parts to limit host memory."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8, device=device)
        per_chunk = max(1, HASH_CHUNK // max(1, self.store[:1].numel()))
        for first, some in zip(range(0, len(self), per_chunk), self.chunks(per_chunk), strict=True):
            images[first : first + len(some)].copy_(some)
        return Split(images, self.labels.to(device))

    def select(self, index: Int[Tensor, " B"]) -> "Split":
        """Some images as a separate split, without a copy."""
        rows = index if self.rows is None else self.rows[index]
        return Split(self.store, self.labels[index], rows)


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one set.

    Attributes:
        name: the set's name, which also names its validation split.
        classes: name of each class, in the order of the labels.
        found: description of what was found.
        known_checksum: the checksum, if it was computed before.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    found: str
    known_checksum: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.train.shape

    @cached_property
    def _digest(self) -> str:
        digest = content_digest(self.classes, self.shape)
        for split in (self.train, self.test):
            per_chunk = max(1, HASH_CHUNK // max(1, split.store[:1].numel()))
            for some in split.chunks(per_chunk):
                digest.update(some.contiguous().numpy().data)
            # one integer type, so that equal labels have one checksum
            digest.update(split.labels.to(torch.int64).contiguous().numpy().data)
        return digest.hexdigest()

    def checksum(self) -> str:
        """Hex SHA-256 over classes, shape, images and labels: equal content, equal checksum."""
        return self.known_checksum or self._digest


@runtime_checkable
class Digest(Protocol):
    """A running SHA-256."""

    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def content_digest(classes: Sequence[str], shape: tuple[int, int, int]) -> Digest:
    """The start of `Dataset.checksum`; training images and labels and those of the test follow."""
    return hashlib.sha256(json.dumps([list(classes), list(shape)]).encode())


def stratified_order(labels: Int[Tensor, " N"], rng: torch.Generator) -> Int[Tensor, " N"]:
    """A random order in which every prefix is stratified by class.

    An image that is the r-th of the n of its class (in a random permutation) is placed at (r + 1/2)
    / n. So any prefix takes within half an image of the same fraction of each class, and within one
    image of the exact fraction where all C classes have equal size.
    """
    perm = torch.randperm(len(labels), generator=rng)
    by_class = labels[perm].argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    of_class = labels[perm][by_class]
    place = (torch.arange(len(labels)) - starts[of_class] + 0.5) / counts[of_class]
    # in the order of the permutation first, so that ties between classes are broken at random
    shuffled = torch.empty_like(place)
    shuffled[by_class] = place
    return perm[shuffled.argsort(stable=True)]


def train_validation(
    dataset: Dataset, fraction: float = 0.1
) -> tuple[Split, Split, Int[Tensor, " V"]]:
    """Split the training images into training and validation images.

    The split depends on the data set's name and labels alone, never on a run's seed, and is
    stratified by class.

    Returns:
        The training split, the validation split, and the latter's indices in `dataset.train`.

    Raises:
        ConfigError: if a part would be empty.
    """
    total = len(dataset.train)
    size = round(fraction * total)
    if not 0 < size < total:
        raise ConfigError(
            f"a validation fraction of {fraction:g} of {total} training images leaves a part empty"
        )
    order = stratified_order(dataset.train.labels, stream(0, "split", dataset.name))
    # validation images stay in this order, in which every prefix is stratified
    held, kept = order[:size], order[size:].sort().values
    return dataset.train.select(kept), dataset.train.select(held), held


def test_indices(total: int, count: int) -> Int[Tensor, " n"]:
    """The first `count` of one published permutation of `total` test images.

    Raises:
        ConfigError: if count is not in [1, total].
    """
    if not 1 <= count <= total:
        raise ConfigError(f"the number of test images must lie in [1, {total}], got {count}")
    return torch.randperm(total, generator=stream(0, "test images"))[:count]


test_indices.__test__ = False  # type: ignore[attr-defined]  # its name makes pytest collect it
