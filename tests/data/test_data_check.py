"""`check_dataset` goes through everything and names each fault."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import png, some_pixels, write_parquet, zipped
from redefense.data import load_dataset
from redefense.data.check import check_dataset
from redefense.errors import DataError
from redefense.rng import stream


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDEFENSE_CACHE", str(tmp_path / "cache"))


def sound(root: Path) -> Path:
    """Three classes of 4 training and 2 test images that are all different."""
    images = iter(some_pixels(18, 3, 16, 16))
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog", "emu"):
            (root / split / label).mkdir(parents=True)
            for n in range(count):
                (root / split / label / f"{n}.png").write_bytes(png(next(images)))
    return root


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that claims a great many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def sixteen_bits() -> bytes:
    image = Image.fromarray(np.zeros((16, 16), np.uint16))
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def broken_in_thirteen_ways(root: Path) -> dict[str, str]:
    """A set with thirteen kinds of damage: a part of the file's name, and what is said of it."""
    cat = sound(root) / "train" / "cat"
    whole = (cat / "0.png").read_bytes()
    (cat / "empty.png").write_bytes(b"")
    (cat / "text.png").write_bytes(b"this is no image")
    (cat / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (cat / "size.png").write_bytes(png(some_pixels(1, 3, 16, 20)[0]))
    (cat / "bomb.png").write_bytes(bomb(100_000, 100_000))
    (cat / "deep.png").write_bytes(sixteen_bits())
    (cat / "notes.txt").write_text("who put this here?")
    (root / "train" / "loose.png").write_bytes(whole)
    outside = root.parent / "secret.png"
    outside.write_bytes(whole)
    (cat / "outside.png").symlink_to(outside)
    (cat / "nothing.png").symlink_to(cat / "gone.png")
    os.mkfifo(cat / "pipe.png")
    (root / "train" / "fox").mkdir()
    (root / "test" / "gnu").mkdir()
    (root / "test" / "gnu" / "0.png").write_bytes(whole)
    return {
        "train/cat/empty.png": "empty file",
        "train/cat/text.png": "not an image of a known format",
        "train/cat/truncated.png": "damaged image",
        "train/cat/size.png": "is 20x16, the others 16x16",
        "train/cat/bomb.png": "decompression bomb",
        "train/cat/deep.png": "more than 8 bits",
        "train/cat/notes.txt": "not an image by its name",
        "train/loose.png": "not at train/CLASS/FILE",
        "train/cat/outside.png": "link out of",
        "train/cat/nothing.png": "link to nothing",
        "train/cat/pipe.png": "neither file nor folder",
        "train/fox": "empty class",
        "test/gnu": "unknown class",
    }


def test_thirteen_kinds_of_damage_are_each_named(tmp_path: Path) -> None:
    expected = broken_in_thirteen_ways(tmp_path / "set")
    report = check_dataset(f"folder:{tmp_path / 'set'}")
    assert len(expected) == 13
    for name, rule in expected.items():
        (problem,) = (problem for problem in report.problems if name in problem)
        assert rule in problem
    assert len(report.problems) == 13
    assert report.checksum is None
    assert json.loads(json.dumps(report.as_dict()))["ok"] is False
    text = "\n".join(report.lines())
    assert all(name in text for name in expected)


@pytest.mark.parametrize("number", range(13))
def test_each_kind_of_damage_alone_is_refused(number: int, tmp_path: Path) -> None:
    expected = broken_in_thirteen_ways(tmp_path / "set")
    kept = list(expected)[number]
    for name in expected:
        if name != kept:
            _remove(tmp_path / "set" / name)
    with pytest.raises(DataError, match=expected[kept]) as caught:
        load_dataset(f"folder:{tmp_path / 'set'}")
    assert kept in str(caught.value)
    assert caught.value.code == 3


def _remove(file: Path) -> None:
    if file.is_dir():
        for inner in file.iterdir():
            inner.unlink()
        file.rmdir()
    else:
        file.unlink()


def test_formats_that_call_other_programs_are_not_tried(tmp_path: Path) -> None:
    root = sound(tmp_path)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    (root / "train" / "cat" / "script.png").write_bytes(script)
    (problem,) = check_dataset(f"folder:{root}").problems
    assert "script.png: not an image of a known format" in problem


def test_a_sound_set_is_counted_and_has_the_checksum_of_its_load(tmp_path: Path) -> None:
    root = sound(tmp_path / "set")
    report = check_dataset(f"folder:{root}")
    assert report.problems == ()
    assert report.notes == ()
    assert report.train.per_class == (4, 4, 4)
    assert report.test.num_images == 6
    assert report.checksum == load_dataset(f"folder:{root}").checksum()
    assert report.as_dict()["shape"] == [3, 16, 16]
    lines = report.lines()
    assert "balance: training 4 images a class, test 2 images a class" in lines
    assert f"checksum: sha256 {report.checksum}" in lines
    assert "3 classes: cat, dog, emu" in lines
    assert not (tmp_path / "cache" / "x").exists()


def test_the_digits_pass() -> None:
    report = check_dataset("digits")
    assert report.problems == ()
    assert report.checksum == load_dataset("digits").checksum()
    assert report.train.balance() == "139 to 146 images a class"


def test_copies_are_noted_and_not_refused(tmp_path: Path) -> None:
    root = sound(tmp_path)
    whole = (root / "train" / "cat" / "0.png").read_bytes()
    (root / "train" / "dog" / "9.png").write_bytes(whole)
    (root / "test" / "emu" / "9.png").write_bytes(whole)
    report = check_dataset(f"folder:{root}")
    assert report.problems == ()
    assert report.notes == (
        "1 training images are copies of others, 1 of them in another class",
        "1 test images are also training images, the first is number 6",
    )


def test_copies_in_another_class_are_counted(tmp_path: Path) -> None:
    root = sound(tmp_path)
    cat = root / "train" / "cat"
    for place in (
        root / "train" / "dog" / "8.png",
        root / "train" / "emu" / "9.png",
        cat / "7.png",
    ):
        place.write_bytes((cat / "0.png").read_bytes())
    (note,) = check_dataset(f"folder:{root}").notes
    assert note == "3 training images are copies of others, 2 of them in another class"


def test_every_broken_row_of_a_table_is_named(tmp_path: Path) -> None:
    rows = [(png(image), n % 2) for n, image in enumerate(some_pixels(8, 3, 8, 8))]
    rows[3] = (b"broken", 1)
    rows[6] = (rows[6][0][:60], 0)
    root = write_parquet(tmp_path, rows, rows[:2], ["no", "yes"])
    problems = check_dataset(f"parquet:{root}").problems
    assert [p.split(": ")[0].split()[-2:] for p in problems] == [["row", "3"], ["row", "6"]]


def test_what_cannot_be_found_is_a_problem_too(tmp_path: Path) -> None:
    report = check_dataset(f"folder:{tmp_path / 'none'}")
    assert report.problems == (f"{tmp_path / 'none'}: no such file or folder",)
    assert report.lines()[0].endswith("nothing usable found")
    assert check_dataset("mnist").problems[0].startswith("unknown data set 'mnist'")


def test_the_state_of_the_cached_copy_is_told(tmp_path: Path) -> None:
    spec = f"folder:{sound(tmp_path / 'set')}"
    load_dataset(spec)
    (note,) = check_dataset(spec).notes
    assert note.endswith("intact")
    (file,) = (tmp_path / "cache").glob("*/train-*-images.npy")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    (note,) = check_dataset(spec).notes
    assert note.endswith("stale or damaged, will be made again")


def test_names_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    root = sound(tmp_path)
    (root / "train" / "cat" / "\x1b[2J.png").write_bytes(b"x")
    (problem,) = check_dataset(f"folder:{root}").problems
    assert "\x1b" not in problem
    assert "\\x1b[2J.png: unprintable name" in problem
    with pytest.raises(DataError, match="unprintable name") as caught:
        load_dataset(f"folder:{root}")
    assert str(caught.value).isprintable()


def test_checking_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    check_dataset("digits")
    assert torch.equal(torch.random.get_rng_state(), before)


def zip_of(root: Path, place: Path) -> Path:
    return zipped(sound(root), place)


def tar_of(root: Path, place: Path) -> Path:
    sound(root)
    with tarfile.open(place, "w:gz") as archive:
        archive.add(root, ".")
    return place


def arrays_of(root: Path, place: Path) -> Path:
    root.mkdir()
    x, y = some_pixels(6, 8, 8), np.arange(6) % 2
    np.savez(place, x_train=x, y_train=y, x_test=x, y_test=y)
    return place


def table_of(root: Path, place: Path) -> Path:
    rows = [(png(image), n % 2) for n, image in enumerate(some_pixels(6, 3, 8, 8))]
    return write_parquet(root, rows, rows, ["no", "yes"]) / "train-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("kind", "write"),
    [("folder", zip_of), ("folder", tar_of), ("npz", arrays_of), ("parquet", table_of)],
)
def test_no_damage_whatever_ends_in_a_traceback(
    kind: str, write: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "set", tmp_path / "packed")
    if kind == "npz":
        file = (tmp_path / "packed.npz").rename(tmp_path / "packed")
    sound_bytes, rng = file.read_bytes(), stream(0, "damage", kind)
    spec = f"{kind}:{file.parent if kind == 'parquet' else file}"
    assert check_dataset(spec).problems == ()
    refusals = 0
    for _ in range(60):
        raw = torch.tensor(list(sound_bytes), dtype=torch.uint8)
        # most structure is at both ends
        place = torch.randint(min(400, len(raw)), (8,), generator=rng)
        place = torch.where(torch.rand(8, generator=rng) < 0.5, place, len(raw) - 1 - place)
        raw[place] = torch.randint(256, (8,), generator=rng, dtype=torch.uint8)
        file.write_bytes(raw.numpy().tobytes())
        report = check_dataset(spec)
        refusals += bool(report.problems)
        assert all(line.isprintable() for line in report.lines())
    assert refusals > 30


def test_problems_alike_are_told_by_the_first_few_and_their_count(tmp_path: Path) -> None:
    root = sound(tmp_path)
    for n in range(9):
        (root / "train" / "cat" / f"wrong-{n}.png").write_bytes(png(np.zeros((3, 5 + n, 8), "u1")))
    (root / "test" / "cat" / "empty.png").touch()
    report = check_dataset(f"folder:{root}")
    assert len(report.problems) == 10
    printed = [line for line in report.lines() if line.startswith(("problem", "..."))]
    assert sum("one size" in line for line in printed) == 3
    assert "... and 6 more like the last" in printed
    assert sum("empty file" in line for line in printed) == 1
