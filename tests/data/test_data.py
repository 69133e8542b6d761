"""The digits, the splits, and batches that depend on (seed, epoch, image) alone."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from far import FAR, far_device
from redefense.data import (
    DATASETS,
    Augment,
    Dataset,
    Loader,
    Split,
    load_dataset,
    test_indices,
    train_validation,
)
from redefense.data.dataset import stratified_order
from redefense.data.loader import fits
from redefense.errors import ConfigError, DataError
from redefense.rng import ImageStreams, mix64, stream


def numbered(count: int, shape: tuple[int, int, int] = (3, 32, 32)) -> Split:
    """Random images with labels 0..9 in turn."""
    rng = stream(0, "numbered", count)
    images = torch.randint(256, (count, *shape), generator=rng, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 10)


def plain(split: Split, **changes: object) -> Loader:
    chosen = {"batch_size": 8, "seed": 0, "augment": False} | changes
    return Loader(split, **chosen)  # type: ignore[arg-type]  # mixed values


# digits


def test_the_shipped_digits_are_sklearns() -> None:
    ours, theirs = load_dataset("digits"), load_digits()
    images = np.concatenate([ours.train.images.numpy(), ours.test.images.numpy()])[:, 0]
    labels = np.concatenate([ours.train.labels.numpy(), ours.test.labels.numpy()])

    def keyed(pixels: np.ndarray, classes: np.ndarray) -> list[bytes]:
        return sorted(p.tobytes() + bytes([c]) for p, c in zip(pixels, classes, strict=True))

    expected = np.round(theirs.images * 255 / 16).astype(np.uint8)
    assert keyed(images, labels) == keyed(expected, theirs.target)


def test_the_digits_test_split_is_fixed_and_keeps_the_proportions() -> None:
    digits = load_dataset("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    everything = digits.train.labels.bincount() + digits.test.labels.bincount()
    exact = everything * 360 / 1797
    assert ((digits.test.labels.bincount() - exact).abs() < 1).all()
    # content, so that neither split can change unseen
    assert digits.checksum() == load_dataset("digits").checksum()
    assert digits.checksum().startswith("bb27075c6309db09")


def test_the_checksum_sees_every_part() -> None:
    split, classes = numbered(6), tuple("abcdefghij")
    base = Dataset("x", classes, split, split, "")
    images, labels = split.images.clone(), split.labels.clone()
    images[5, 2, 31, 31] ^= 1
    labels[0] = 9
    others = [
        Dataset("x", classes, Split(images, split.labels), split, ""),
        Dataset("x", classes, split, Split(images, split.labels), ""),
        Dataset("x", classes, split, Split(split.images, labels), ""),
        Dataset("x", tuple("jihgfedcba"), split, split, ""),
    ]
    assert len({base.checksum(), *(other.checksum() for other in others)}) == 5
    assert Dataset("other name", classes, split, split, "").checksum() == base.checksum()


# splits


def test_selections_share_storage_and_compose() -> None:
    split = numbered(20)
    some = split.select(torch.tensor([7, 3, 11])).select(torch.tensor([2, 0]))
    assert some.store is split.store
    assert torch.equal(some.images, split.images[[11, 7]])
    assert some.labels.tolist() == [1, 7]
    assert torch.equal(some.float(torch.tensor([1])), split.images[[7]].float() / 255)
    assert torch.equal(torch.cat(list(some.chunks(1))), some.images)
    with pytest.raises(ConfigError, match="one label per image"):
        Split(split.images, split.labels[:3])


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_every_beginning_of_a_stratified_order_keeps_the_proportions(
    counts: list[int], seed: int, data: st.DataObject
) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = stratified_order(labels, stream(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    size = data.draw(st.integers(1, len(labels)))
    taken = labels[order[:size]].bincount(minlength=len(counts))
    share = torch.tensor(counts) / len(labels)
    # half an image for the class, and its share of all classes' halves
    assert ((taken - share * size).abs() <= 0.5 + share * len(counts) / 2 + 1e-5).all()


def test_validation_is_disjoint_and_named_by_the_data_set() -> None:
    digits = load_dataset("digits")
    train, validation, held = train_validation(digits)
    again = train_validation(digits)[2]
    assert torch.equal(held, again)
    assert len(validation) == 144
    assert len(train) + len(validation) == len(digits.train)
    assert torch.equal(validation.images, digits.train.images[held])
    assert train.rows is not None
    assert not set(train.rows.tolist()) & set(held.tolist())
    renamed = Dataset("other", digits.classes, digits.train, digits.test, "")
    assert not torch.equal(train_validation(renamed)[2], held)
    with pytest.raises(ConfigError, match="leaves a part empty"):
        train_validation(digits, 1.0)


def test_fewer_test_images_are_a_beginning_of_more() -> None:
    assert torch.equal(test_indices(1000, 500)[:100], test_indices(1000, 100))
    assert sorted(test_indices(360, 360).tolist()) == list(range(360))
    with pytest.raises(ConfigError, match=r"\[1, 360\], got 361"):
        test_indices(360, 361)


# batches


def test_an_epoch_shows_each_image_once_with_its_label() -> None:
    split = numbered(40)
    batches = list(plain(split).epoch(0))
    assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(40))
    for batch in batches:
        assert torch.equal(batch.x, split.float(batch.index))
        assert torch.equal(batch.y, split.labels[batch.index])


def test_the_last_incomplete_batch_is_dropped_unless_it_is_the_only_one() -> None:
    loader = plain(numbered(30))
    assert [len(b.y) for b in loader.epoch(0)] == [8, 8, 8]
    assert len(loader) == 3
    small = plain(numbered(5))
    assert [len(b.y) for b in small.epoch(0)] == [5]
    assert len(small) == 1


def test_order_follows_from_seed_and_epoch_alone() -> None:
    split = numbered(64)
    orders = [plain(split, seed=s).order(e) for s in range(2) for e in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    loader = plain(split)
    list(loader.epoch(5))  # what was asked before leaves no trace
    assert torch.equal(loader.order(1), orders[1])


def in_turns(shares: list[Tensor]) -> Tensor:
    return torch.stack(shares, 1).flatten(0, 1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_in_turns_are_the_global_batch(world_size: int) -> None:
    split = numbered(64)
    whole = list(plain(split, augment=True, batch_size=16).epoch(3))
    ranks = [
        list(plain(split, augment=True, batch_size=16, rank=r, world_size=world_size).epoch(3))
        for r in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert torch.equal(in_turns([rank[step].x for rank in ranks]), batch.x)
        assert torch.equal(in_turns([rank[step].y for rank in ranks]), batch.y)
        assert torch.equal(in_turns([rank[step].index for rank in ranks]), batch.index)


def test_an_epoch_can_be_entered_at_any_step() -> None:
    loader = plain(numbered(64), augment=True)
    whole = list(loader.epoch(2))
    for start in (0, 3, 8):
        rest = list(loader.epoch(2, start))
        assert len(rest) == len(whole) - start
        for one, other in zip(rest, whole[start:], strict=True):
            assert torch.equal(one.x, other.x)


@pytest.mark.parametrize("where", ["cpu", "far"])
def test_images_that_lie_on_the_device_give_the_bits_of_the_host(where: str) -> None:
    whole = numbered(96)
    split = whole.select(torch.arange(90, 10, -1))  # of a store that holds more
    settings: dict[str, object] = {"augment": True, "limit": 40, "rank": 1, "world_size": 2}
    host = list(plain(split, **settings).epoch(3, 1))
    with far_device() if where == "far" else nullcontext():
        device = FAR if where == "far" else torch.device("cpu")
        loader = plain(split, **settings, device=device, resident=True)
        assert loader.split.store.shape == (80, 3, 32, 32)
        assert loader.split.store.device == loader.split.labels.device == device
        found = list(loader.epoch(3, 1))
        assert len(found) == len(host) == 4
        for one, other in zip(found, host, strict=True):
            assert one.x.device == one.y.device == one.index.device == device
            for name in ("x", "y", "index"):
                assert torch.equal(getattr(one, name).cpu(), getattr(other, name))


def test_images_stay_on_the_host_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    split = numbered(8)
    assert plain(split).split is split
    gpu, size = torch.device("cuda"), 8 * 3 * 32 * 32
    for free, there in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert fits(split, gpu) == there


def by_image(loader: Loader, epoch: int) -> dict[int, Tensor]:
    return {
        index: image
        for batch in loader.epoch(epoch)
        for index, image in zip(batch.index.tolist(), batch.x, strict=True)
    }


def test_cutout_blackens_a_square_around_a_pixel_drawn_evenly() -> None:
    size, side, count = 6, 3, 4000
    white = torch.full((count, 2, size, size), 255, dtype=torch.uint8)
    streams = ImageStreams(torch.arange(count) + (1 << 40))
    black = Augment(pad=0, flip=False, cutout=side)(white, streams) == 0
    assert torch.equal(black[:, 0], black[:, 1])
    rows, columns = black[:, 0].any(2), black[:, 0].any(1)
    assert torch.equal(black[:, 0], rows[:, :, None] & columns[:, None, :])
    for covered in (rows, columns):
        # a centre at the border cuts one of three pixels off; those covered are neighbours
        lengths = covered.sum(1)
        assert set(lengths.tolist()) == {2, 3}
        assert float((lengths == 2).double().mean()) == pytest.approx(2 / size, abs=0.03)
        assert bool((covered[:, 1:] != covered[:, :-1]).sum(1).le(2).all())
    share = float(black.double().mean())
    assert share == pytest.approx(((3 * size - 2) / size**2) ** 2, abs=0.01)


def test_cutout_comes_after_the_crop_and_the_flip_and_changes_neither() -> None:
    images = {
        cutout: by_image(plain(numbered(24), augment=True, cutout=cutout), 1) for cutout in (0, 2)
    }
    for index, whole in images[0].items():
        cut = images[2][index]
        assert torch.equal(torch.where(cut == 0, 0, whole), cut)


def test_augmentation_of_an_image_does_not_depend_on_its_batch() -> None:
    split = numbered(48)
    small = by_image(plain(split, augment=True, batch_size=4), 1)
    large = by_image(plain(split, augment=True, batch_size=24), 1)
    assert all(torch.equal(small[index], large[index]) for index in range(48))
    other_epoch = by_image(plain(split, augment=True), 2)
    other_seed = by_image(plain(split, augment=True, seed=1), 1)
    assert sum(torch.equal(small[i], other_epoch[i]) for i in range(48)) < 6
    assert sum(torch.equal(small[i], other_seed[i]) for i in range(48)) < 6


@pytest.mark.parametrize(("pad", "flip"), [(4, True), (2, False), (0, True), (0, False)])
def test_crops_and_flips_equal_their_definition(pad: int, flip: bool) -> None:
    split = numbered(200, (3, 10, 12))
    keys = mix64(torch.arange(200))
    augmented = Augment(pad, flip)(split.images, ImageStreams(keys))
    corners = ImageStreams(keys)
    corner = corners.integers(0, 2 * pad + 1, 2)
    mirrored = corners.uniform() < 0.5
    seen = set()
    for image, out, (top, left), mirror in zip(
        split.images.numpy(), augmented.numpy(), corner.tolist(), mirrored.tolist(), strict=True
    ):
        wide = np.pad(image, [(0, 0), (pad, pad), (pad, pad)])
        expected = wide[:, top : top + 10, left : left + 12]
        expected = expected[:, :, ::-1] if mirror and flip else expected
        assert np.array_equal(out, expected)
        seen.add((top, left))
    assert len(seen) == (1 if pad == 0 else min((2 * pad + 1) ** 2, len(seen)))


def test_crops_are_uniform_and_half_of_the_images_are_mirrored() -> None:
    count = 20_000
    ramp = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) + 1
    streams = ImageStreams(mix64(torch.arange(count)))
    out = Augment(1, True)(ramp.expand(count, 1, 8, 8).contiguous(), streams)
    # the pixel at the centre of a crop names its corner and whether it is mirrored
    centres, counts = out[:, 0, 4, 4].unique(return_counts=True)
    assert len(centres) == 12  # 3 rows by 3 columns, whose mirror images overlap in 2 of 4
    assert int(counts.sum()) == count
    rows = (centres.long() - 1) // 8
    for row in rows.unique():
        share = counts[rows == row].sum().item() / count
        assert abs(share - 1 / 3) < 5 * math.sqrt(2 / 9 / count)


def test_a_limit_is_one_choice_for_all_epochs_and_seeds() -> None:
    split = numbered(100)
    chosen = [
        set(plain(split, limit=32, seed=seed).order(epoch).tolist())
        for seed in range(2)
        for epoch in range(2)
    ]
    assert all(some == chosen[0] for some in chosen)
    assert len(chosen[0]) == 32
    assert chosen[0] < set(plain(split, limit=64).order(0).tolist())
    assert len(plain(split, limit=32)) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"batch_size": 9, "world_size": 2},
        {"rank": 2, "world_size": 2},
        {"limit": 0},
        {"augment": (-1, True)},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        plain(numbered(40), **changes)


def test_nothing_touches_the_global_generators() -> None:
    before = torch.random.get_rng_state(), repr(np.random.get_state())
    list(plain(numbered(16), augment=True).epoch(0))
    train_validation(load_dataset("digits"))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]


# specs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "unknown data set 'mnist'; choose from digits, cifar10"),
        ("digits:/tmp", "digits has no path"),
        ("cifar10", "cifar10 needs a path: cifar10:PATH"),
        ("cifar10:/no/such/place", "no such file or folder.*--download"),
        ("tiny-imagenet:/no/such/place", "no such file or folder.*tiny-imagenet-200.zip"),
        ("cifr10:/data/cifar", r"unknown data set 'cifr10' \(did you mean cifar10\?\); choose"),
        ("mnist:/data/x.npz", "unknown data set 'mnist'; choose"),
        ("cifar-10-python.tar.gz", "write cifar10:cifar-10-python.tar.gz"),
        ("data/cifar-100-python", "write cifar100:data/cifar-100-python"),
        ("tiny-imagenet-200.zip", "write tiny-imagenet:tiny-imagenet-200.zip"),
        ("photos.tar.gz", "write folder:photos.tar.gz"),
        ("cifar10.parquet", "write parquet:cifar10.parquet"),
    ],
)
def test_wrong_specs_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(spec)
    assert caught.value.code == 3
    assert "\n" not in str(caught.value)


def test_every_kind_has_a_line_for_the_user() -> None:
    assert list(DATASETS) == [
        "digits", "cifar10", "cifar100", "tiny-imagenet", "folder", "parquet", "npz",
    ]  # fmt: skip
    assert all(reader.summary for reader in DATASETS.values())
