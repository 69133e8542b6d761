"""Folders and archives as operating systems leave them: hidden files, empty folders, spellings."""

import os
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from data_files import png, refused, some_pixels, write_parquet, zipped
from redefense.data import load_dataset
from redefense.data.check import check_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDEFENSE_CACHE", str(tmp_path / "cache"))


def put(root: Path, *names: str) -> Path:
    """Unlike images at some places below a folder."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(some_pixels(len(names), 3, 8, 8)[number]))
    return root


def sound(root: Path) -> Path:
    return put(root, *(f"{split}/{label}/0.png" for split in ("train", "test") for label in "ab"))


def as_folder(root: Path) -> Path:
    return root


def as_zip(root: Path) -> Path:
    return zipped(root, root.with_suffix(".zip"))


def as_tar(root: Path) -> Path:
    with tarfile.open(place := root.with_suffix(".tar.gz"), "w:gz") as archive:
        archive.add(root, ".")
    return place


FORMS = [as_folder, as_zip, as_tar]
LITTER = [
    "train/a/.ipynb_checkpoints/0-checkpoint.png", "train/.ipynb_checkpoints/x.png",
    "__MACOSX/train/a/._0.png", "train/__MACOSX/0.png", "train/a/._0.png", "train/a/Thumbs.db",
    "train/a/@eaDir/0.png/SYNOPHOTO_THUMB.png", "test/desktop.ini", "test/b/.DS_Store",
    ".git/objects/ab/cdef", ".git/train/a/0.png", ".hidden/train/c/0.png", "test/.c/0.png",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_hidden_files_and_folders_are_no_part_of_a_set(
    form: Callable[[Path], Path], tmp_path: Path
) -> None:
    expected = load_dataset(f"folder:{sound(tmp_path / 'set')}").checksum()
    root = put(tmp_path / "set", *LITTER)
    sound(root)
    (root / ".git" / "link").symlink_to("/etc/passwd")
    (root / "train" / ".trash").mkdir()
    if form is not as_folder:
        (root / ".git" / "link").unlink()
    report = check_dataset(f"folder:{form(root)}")
    assert report.problems == ()
    assert report.checksum == load_dataset(f"folder:{form(root)}").checksum() == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inside", ["", ".gitkeep", "deeper", ".ipynb_checkpoints/0.png"])
def test_a_class_without_images_is_refused_whatever_else_it_holds(
    form: Callable[[Path], Path], inside: str, tmp_path: Path
) -> None:
    root = sound(tmp_path / "set")
    if inside.endswith((".gitkeep", ".png")):
        put(root, f"train/c/{inside}")
    else:
        (root / "train" / "c" / inside).mkdir(parents=True)
    refused(f"folder:{form(root)}", "train/c: empty class")


def test_hidden_images_are_no_part_of_tiny_imagenet(tmp_path: Path) -> None:
    at = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(
        ["train/n1/images/0.JPEG", "train/n2/images/0.JPEG", "val/images/0.JPEG"]
    ):
        (at / name).parent.mkdir(parents=True)
        (at / name).write_bytes(png(some_pixels(3, 3, 64, 64)[number], "JPEG"))
    (at / "wnids.txt").write_text("n1\nn2\n")
    (at / "val" / "val_annotations.txt").write_text("0.JPEG\tn1\t0\t0\t1\t1\n")
    expected = load_dataset(f"tiny-imagenet:{tmp_path}").checksum()
    put(at, "train/n1/images/._0.JPEG", "val/images/._0.JPEG", "val/images/Thumbs.db")
    put(at, "train/.ipynb_checkpoints/0.JPEG", "__MACOSX/wnids.txt")
    assert load_dataset(f"tiny-imagenet:{tmp_path}").checksum() == expected


COMPOSED = unicodedata.normalize("NFC", "café")
DECOMPOSED = unicodedata.normalize("NFD", "café")


def test_a_class_is_the_same_in_both_unicode_forms(tmp_path: Path) -> None:
    checksums = set()
    for train in (COMPOSED, DECOMPOSED):
        for test in (COMPOSED, DECOMPOSED):
            root = put(tmp_path / f"{len(train)}{len(test)}",
                *(f"{split}/{label}/0.png" for split, own in (("train", train), ("test", test))
                  for label in ("bar", own)))  # fmt: skip
            found = load_dataset(f"folder:{root}")
            assert found.classes == ("bar", COMPOSED)
            assert found.test.labels.tolist() == [0, 1]
            checksums.add(found.checksum())
    assert len(checksums) == 1


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("other", [DECOMPOSED, "CAFÉ", f"{COMPOSED} "])
def test_classes_that_nobody_can_tell_apart_are_refused(
    split: str, other: str, tmp_path: Path
) -> None:
    root = put(sound(tmp_path / "set"), f"train/{COMPOSED}/0.png", f"{split}/{COMPOSED}/0.png")
    put(root, f"{split}/{other}/0.png")
    refused(f"folder:{root}", "duplicate class .* but for case, spaces or Unicode form")
    rows = [(png(image), n % 2) for n, image in enumerate(some_pixels(4, 3, 8, 8))]
    table = write_parquet(tmp_path / "table", rows, rows, [COMPOSED, other])
    refused(f"parquet:{table}", "duplicate class")


def test_a_test_class_in_another_case_is_unknown(tmp_path: Path) -> None:
    root = put(sound(tmp_path / "set"), "test/A/0.png")
    refused(f"folder:{root}", "test: duplicate class 'a'|test/A: unknown class")
    (root / "test" / "a" / "0.png").unlink()
    (root / "test" / "a").rmdir()
    refused(f"folder:{root}", "test/A: unknown class, not among the training ones")


@pytest.mark.parametrize("form", FORMS)
def test_one_of_several_data_sets_must_be_chosen(
    form: Callable[[Path], Path], tmp_path: Path
) -> None:
    root = sound(tmp_path / "set" / "v1").parent
    assert load_dataset(f"folder:{root}").classes == ("a", "b")
    sound(root / "v2")
    refused(
        f"folder:{form(root)}", r"2 folders hold a data set each \(v1/, v2/\): give one of them"
    )
    twice = put(sound(tmp_path / "twice"), "testing/a/0.png", "testing/b/0.png")
    refused(f"folder:{form(twice)}", "the folders test and testing name one split")


def test_classes_without_test_images_are_noted(tmp_path: Path) -> None:
    root = put(sound(tmp_path / "set"), "train/c/0.png", "train/d/0.png")
    assert "2 classes have no test images: c, d" in check_dataset(f"folder:{root}").notes


def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path) -> None:
    root = sound(tmp_path / "set")
    (root / "train" / "a" / "1.png").symlink_to("2.png")
    (root / "train" / "a" / "2.png").symlink_to("1.png")
    refused(f"folder:{root}", "[12].png: link to nothing, refused")
    (root / "train" / "a" / "1.png").unlink()
    (root / "train" / "a" / "2.png").unlink()
    (root / "train" / "a" / "again").symlink_to("..", target_is_directory=True)
    refused(f"folder:{root}", "again: link to a folder, refused")
    (tmp_path / "round").symlink_to("round")
    refused(f"folder:{tmp_path / 'round'}", "no such file or folder")


@pytest.mark.parametrize("kind", ["folder", "npz", "parquet", "cifar10", "tiny-imagenet"])
@pytest.mark.parametrize("place", ["x" * 5000, "~nobody-of-this-name/set"])
def test_places_that_cannot_be_are_one_line(kind: str, place: str) -> None:
    refused(f"{kind}:{place}", "no such file|cannot be read")


def test_a_path_that_is_no_text_is_read(tmp_path: Path) -> None:
    root = sound(tmp_path / os.fsdecode(b"caf\xe9"))
    found = load_dataset(f"folder:{root}")
    assert load_dataset(f"folder:{root}").checksum() == found.checksum()
