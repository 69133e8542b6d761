"""Batches whose order and augmentation depend on (seed, epoch, image) alone.

No worker processes and no state: an epoch can be entered at any step, and every rank computes its
slice of the same global batch. Where the images fit on a GPU they are stored there, and batches are
assembled there from the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from redefense.data.dataset import Split
from redefense.errors import ConfigError
from redefense.rng import ImageStreams, draw_seed, mix64, stream
from redefense.types import Batch, Int, UInt8

RESIDENT_SHARE: Final = 0.25
"""Fraction of a GPU's free memory that a resident split may take."""


@dataclass(frozen=True, slots=True)
class Augment:
    """Random crops, flips and cutout.

    Attributes:
        pad: zero padding in pixels on each side, before a random crop of the original size.
        flip: flip images horizontally with probability 1/2.
        cutout: side of a black square around a uniformly drawn pixel; parts outside the image are
            cut off.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        if self.pad < 0 or self.cutout < 0:
            raise ConfigError(
                "augmentation pad and cutout must not be negative, got "
                f"{self.pad} and {self.cutout}"
            )

    def __call__(self, raw: UInt8[Tensor, "B ch H W"], streams: ImageStreams) -> Tensor:
        """Augmented bytes of the same shape, drawn from each image's own stream."""
        height, width = raw.shape[2:]
        corner = streams.integers(0, 2 * self.pad + 1, 2)
        mirrored = (streams.uniform() < 0.5) if self.flip else torch.zeros_like(corner[:, 0]) > 0
        padded = F.pad(raw, [self.pad] * 4)
        down = torch.arange(height, device=raw.device)
        right = torch.arange(width, device=raw.device)
        rows = corner[:, :1] + down
        columns = corner[:, 1:] + torch.where(mirrored[:, None], width - 1 - right, right)
        # crop and flip in one gather: the bytes are copied once
        index = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        flat = index.flatten(1)[:, None].expand(-1, raw.shape[1], -1)
        cropped = padded.flatten(2).gather(2, flat).view_as(raw)
        return self._cut(cropped, streams) if self.cutout else cropped

    def _cut(self, images: Tensor, streams: ImageStreams) -> Tensor:
        inside: list[Tensor] = []  # (B, size): the rows, then the columns, that the square covers
        for size in images.shape[2:]:
            first = streams.integers(0, size, 1) - self.cutout // 2
            at = torch.arange(size, device=images.device)
            inside.append((at >= first) & (at < first + self.cutout))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return images.masked_fill(square, 0)


class Loader:
    """Shuffled, augmented batches of one split.

    Args:
        split: the images; `Batch.index` counts within it.
        batch_size: images of the global batch, over all ranks.
        seed: seed of the run; determines order and augmentation.
        augment: `True` for a crop with 4 pixels of zero padding and a flip, or (pad, flip).
        cutout: side of the cutout square in pixels, none if 0.
        device: device of the batches (as bytes), where they are augmented.
        rank: rank of this process.
        world_size: number of processes that share each batch.
        limit: use only this many images, the same in all epochs and for all seeds.
        resident: keep the split's images on the device. By default on a GPU, if they take at most
            a quarter of its free memory; else the bytes of each batch are copied there.

    The last, incomplete batch of an epoch is dropped, unless it is the only one.

    Raises:
        ConfigError: for sizes that do not fit together.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | tuple[int, bool] | bool,
        cutout: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        resident: bool | None = None,
    ) -> None:
        total = len(split) if limit is None else min(limit, len(split))
        if batch_size < 1 or total < 1:
            raise ConfigError(f"need images and a batch size, got {total} and {batch_size}")
        self.batch_size = min(batch_size, total)
        if not 0 <= rank < world_size or self.batch_size % world_size:
            raise ConfigError(
                f"a batch of {self.batch_size} images cannot be shared equally by {world_size} "
                f"processes (this is rank {rank})"
            )
        self.seed, self.device = seed, torch.device(device)
        self.resident = fits(split, self.device) if resident is None else resident
        self.split = split.to(self.device) if self.resident else split
        # every n-th image: the first half of each rank's slice is part of the batch's first half
        self.share = slice(rank, None, world_size)
        self.augment = _as_augment(augment, cutout)
        # seed 0, not that of the run: runs with a limit then train on the same images
        subset = torch.randperm(len(split), generator=stream(0, "training subset"))
        self.subset = torch.arange(len(split)) if total == len(split) else subset[:total]

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.subset) // self.batch_size

    def order(self, epoch: int) -> Int[Tensor, " N"]:
        """The indices of all images of an epoch, in order."""
        perm = torch.randperm(len(self.subset), generator=stream(self.seed, "order", epoch))
        return self.subset[perm]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This rank's slice of each batch of an epoch, from step `start_step` on."""
        order = self.order(epoch).to(self.split.labels.device)
        salt = draw_seed(stream(self.seed, "augment", epoch))
        for step in range(start_step, len(self)):
            first = step * self.batch_size
            yield self._batch(order[first : first + self.batch_size][self.share], salt)

    def _batch(self, index: Tensor, salt: int) -> Batch:
        raw = self.split.take(index).to(self.device)
        labels, index = self.split.labels[index].to(self.device), index.to(self.device)
        if self.augment is not None:
            # keyed by image and epoch, so neither rank nor step changes what is drawn
            raw = self.augment(raw, ImageStreams(mix64(mix64(index) ^ salt)))
        # bytes up to here: a quarter of the memory, and of the traffic to the device
        return Batch(raw.to(torch.float32).div_(255.0), labels, index)


def fits(split: Split, device: torch.device) -> bool:
    """Whether a split's images may be stored on a GPU, besides the training's memory."""
    # on the CPU the bytes are where they are needed
    if device.type != "cuda":
        return False
    wanted = len(split) * split.store[:1].nbytes
    return bool(wanted <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0])


def _as_augment(augment: Augment | tuple[int, bool] | bool, cutout: int) -> Augment | None:
    if isinstance(augment, bool):
        augment = Augment() if augment else Augment(pad=0, flip=False)
    elif not isinstance(augment, Augment):
        augment = Augment(*augment)
    augment = replace(augment, cutout=cutout or augment.cutout)
    return None if augment == Augment(pad=0, flip=False) else augment
