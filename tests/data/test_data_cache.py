"""The second load is the first one; what is stale or damaged is made again."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_files import png, refused, some_pixels
from redefense.data import cache, load_dataset, source
from redefense.data.dataset import Dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set of 2 x 3 training and 2 x 1 test images."""
    for split, count in (("train", 3), ("test", 1)):
        for number, label in enumerate(("cat", "dog")):
            folder = tmp_path / "set" / split / label
            folder.mkdir(parents=True)
            for n, image in enumerate(some_pixels(count, 3, 8, 8)):
                (folder / f"{n}.png").write_bytes(png(image ^ (number * 7)))
    return tmp_path / "set"


def load(root: Path) -> Dataset:
    return load_dataset(f"folder:{root}", cache=root.parent / "cache")


def entry(root: Path) -> Path:
    (found,) = (root.parent / "cache").iterdir()
    return found


def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images decoded from now on."""
    names: list[str] = []
    original = source.decode

    def decode(raw: bytes, name: str, *how: Any) -> source.Block:
        names.append(name)
        return original(raw, name, *how)

    monkeypatch.setattr(source, "decode", decode)
    return names


def same(one: Dataset, other: Dataset) -> None:
    assert (one.name, one.classes, one.found) == (other.name, other.classes, other.found)
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert one.checksum() == other.checksum()


def test_a_second_load_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)
    names = decodes(monkeypatch)
    same(load(root), first)
    assert names == []
    # the checksum that came along is that of the content
    again = Dataset(first.name, first.classes, first.train, first.test, first.found)
    assert again.checksum() == first.checksum()


def test_a_cached_set_is_mapped_and_cannot_be_written_through(root: Path) -> None:
    load(root)
    first = load(root)
    before = first.train.images.clone()
    first.train.images.zero_()
    assert torch.equal(load(root).train.images, before)
    assert not [file for file in entry(root).iterdir() if b"pickle" in file.read_bytes()]


def exchange(file: Path, content: bytes, *, moved: bool) -> None:
    """Another content of the same size and time."""
    before = file.stat()
    assert len(content) == before.st_size
    aside = file.with_name("aside") if moved else file
    aside.write_bytes(content)
    os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
    aside.replace(file)


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("moved", [False, True])
def test_other_content_of_equal_size_and_time_is_seen(
    kind: str, moved: bool, root: Path, tmp_path: Path
) -> None:
    contents = []
    for number, image in enumerate(some_pixels(2, 3, 8, 8)):
        if kind == "folder":
            file, spec = root / "train" / "cat" / "0.png", f"folder:{root}"
            file.write_bytes(png(image, "BMP"))
        else:
            file, spec = root / "set.npz", f"npz:{root / 'set.npz'}"
            y = (np.arange(6) + number) % 2
            np.savez(file, x_train=some_pixels(6, 8, 8), y_train=y, x_test=image, y_test=y[:3])
        contents.append(file.read_bytes())
    file.write_bytes(contents[0])
    first = load_dataset(spec, cache=tmp_path / "cache").checksum()
    exchange(file, contents[1], moved=moved)
    second = load_dataset(spec, cache=tmp_path / "cache").checksum()
    assert second != first
    assert second == load_dataset(spec, cache=tmp_path / "fresh").checksum()


@pytest.mark.parametrize("change", ["touched", "altered", "added", "removed", "class"])
def test_a_changed_source_is_decoded_again(
    change: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(root)
    image = root / "train" / "cat" / "0.png"
    if change == "touched":
        os.utime(image, ns=(0, time.time_ns() + 10**9))
    elif change == "altered":
        image.write_bytes(png(255 - some_pixels(1, 3, 8, 8)[0]))
    elif change == "added":
        (image.parent / "9.png").write_bytes(png(some_pixels(1, 3, 8, 8)[0]))
    elif change == "class":
        (root / "train" / "fox").mkdir()
        (root / "train" / "fox" / "0.png").write_bytes(png(some_pixels(1, 3, 8, 8)[0]))
    else:
        image.unlink()
    names = decodes(monkeypatch)
    second = load(root)
    assert len(names) == {"added": 9, "class": 9, "removed": 7}.get(change, 8)
    assert (second.checksum() == first.checksum()) == (change == "touched")
    # what was replaced is gone: one description, the lock, four arrays
    assert len(list(entry(root).iterdir())) == 6


def damage(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(raw)
    os.utime(file, ns=times)


@pytest.mark.parametrize(
    "what", ["train-*-images", "train-*-labels", "test-*-images", "test-*-labels", "short", "gone"]
)
def test_damaged_arrays_are_detected_and_made_again(
    what: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(root)
    before = first.train.images.clone()
    names = decodes(monkeypatch)
    (file,) = entry(root).glob(f"{what}.npy" if "*" in what else "train-*-images.npy")
    if what == "gone":
        file.unlink()
    elif what == "short":
        # written aside: the first load still maps the old file
        file.with_suffix(".cut").write_bytes(file.read_bytes()[:-5])
        file.with_suffix(".cut").replace(file)
    else:
        damage(file)
    second = load(root)
    assert len(names) == 8
    assert torch.equal(second.train.images, before)


@pytest.mark.parametrize("field", ["classes", "sources", "arrays", "checksum", "seal", "", "other"])
def test_an_altered_description_is_not_believed(
    field: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(root)
    meta = json.loads((entry(root) / "meta.json").read_text())
    if field == "other":
        meta["arrays"]["../../../outside.npy"] = []
    elif field:
        meta[field] = meta[field][::-1] if isinstance(meta[field], (str, list)) else {}
    text = json.dumps(meta) if field else "{"
    (entry(root) / "meta.json").write_text(text)
    outside = entry(root).parent.parent / "outside.npy"
    outside.write_bytes(b"kept")
    names = decodes(monkeypatch)
    same(load(root), first)
    assert len(names) == 8
    assert outside.read_bytes() == b"kept"


def test_a_crash_while_writing_leaves_no_cache_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "test" / "dog" / "0.png").write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDEFENSE_CACHE", str(root.parent / "cache"))
        refused(f"folder:{root}", "dog/0.png: not an image")
    assert [file.name for file in entry(root).iterdir()] == ["lock"]
    stale = entry(root) / "train-0000-images.npy"
    stale.write_bytes(b"left by a killed process")
    os.utime(stale, (0, 0))
    (root / "test" / "dog" / "0.png").write_bytes(png(some_pixels(1, 3, 8, 8)[0]))
    load(root)
    assert not stale.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_cache_that_cannot_be_written_stops_nobody(
    code: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(root).checksum()

    def fail(*_: object) -> Dataset:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache, "store", fail)
    found = load_dataset(f"folder:{root}", cache=root.parent / "other")
    assert found.checksum() == expected


def test_large_sets_are_verified_by_a_sample_and_whole_on_request(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PIECE", 16)
    monkeypatch.setattr(cache, "WHOLE", 100)
    monkeypatch.setattr(cache, "SAMPLE", 3)
    load(root)
    (file,) = entry(root).glob("train-*-images.npy")
    raw = bytearray(file.read_bytes())
    raw[200] ^= 1  # in none of the pieces at the ends and in the middle
    file.write_bytes(raw)
    assert cache.load(entry(root)) is not None
    assert cache.load(entry(root), whole=True) is None
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert cache.load(entry(root)) is None


def load_elsewhere(root: Path, answers: "multiprocessing.Queue[tuple[str, float]]") -> None:
    started = time.perf_counter()
    answers.put((load(root).checksum(), time.perf_counter() - started))


def test_processes_that_start_together_agree(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=load_elsewhere, args=(root, answers)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = {answers.get(timeout=60)[0] for _ in workers}
    for worker in workers:
        worker.join()
    assert found == {load(root).checksum()}
    assert len(list(entry(root).iterdir())) == 6


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REDEFENSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "redefense"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.default_folder() == Path("/xdg/redefense")
    monkeypatch.setenv("REDEFENSE_CACHE", "/own")
    assert cache.default_folder() == Path("/own")


def test_progress_is_told_on_stderr(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_dataset(f"folder:{root}", cache=root.parent / "cache", progress=True)
    assert capsys.readouterr().out == ""
    assert np.array_equal(load(root).train.labels.numpy(), [0, 0, 0, 1, 1, 1])
