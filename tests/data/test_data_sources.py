"""TinyImageNet, folders, parquet and npz in all layouts; what is wrong is refused by name."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_files import Evil, png, refused, some_pixels, write_parquet, zipped
from redefense.data import Dataset, load_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDEFENSE_CACHE", str(tmp_path / "cache"))


# TinyImageNet


def tiny(root: Path, *, refoldered: bool = False, words: str = "") -> Path:
    """Three classes listed out of order, with a grey image, in the official layout."""
    at = root / "tiny-imagenet-200"
    ids = ["n03", "n01", "n02"]
    for number, one in enumerate(ids):
        folder = at / "train" / one / "images"
        folder.mkdir(parents=True)
        for n, image in enumerate(some_pixels(3, 3, 64, 64)):
            (folder / f"{one}_{n}.JPEG").write_bytes(png(image // (number + 1), "JPEG"))
        (at / "train" / one / f"{one}_boxes.txt").write_text("boxes")
    (at / "train" / "n01" / "images" / "n01_0.JPEG").write_bytes(
        png(some_pixels(1, 64, 64)[0], "JPEG")
    )
    (at / "wnids.txt").write_text("\n".join(ids))
    (at / "words.txt").write_text(words or "n01\tcrane, bird\nn02\tcrane, machine\nn03\tcat")
    (at / "val" / "images").mkdir(parents=True)
    lines = []
    for n, image in enumerate(some_pixels(6, 3, 64, 64)):
        name, one = f"val_{n}.JPEG", ids[n % 3]
        folder = at / "val" / one / "images" if refoldered else at / "val" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(image, "JPEG"))
        lines.append(f"{name}\t{one}\t0\t0\t62\t62")
    if refoldered:
        (at / "val" / "images").rmdir()
    else:
        (at / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def images_by_label(found: Dataset) -> set[tuple[int, bytes]]:
    return {
        (int(y), x.numpy().tobytes())
        for x, y in zip(found.test.images, found.test.labels, strict=True)
    }


def test_tiny_imagenet_is_one_set_in_all_layouts(tmp_path: Path) -> None:
    root = tiny(tmp_path / "official")
    official = load_dataset(f"tiny-imagenet:{root}")
    archive = load_dataset(f"tiny-imagenet:{zipped(root, tmp_path / 'tiny.zip')}")
    inner = load_dataset(f"tiny-imagenet:{root / 'tiny-imagenet-200'}")
    folders = load_dataset(f"tiny-imagenet:{tiny(tmp_path / 'folders', refoldered=True)}")
    assert official.checksum() == archive.checksum() == inner.checksum()
    (tmp_path / "around").mkdir()
    zipped(root, tmp_path / "around" / "tiny-imagenet-200.zip")
    assert load_dataset(f"tiny-imagenet:{tmp_path / 'around'}").checksum() == official.checksum()
    assert torch.equal(official.train.images, folders.train.images)
    assert images_by_label(official) == images_by_label(folders)
    assert "zip archive" in archive.found
    assert "re-foldered" in folders.found


def test_tiny_imagenet_sorts_ids_and_makes_grey_images_rgb(tmp_path: Path) -> None:
    found = load_dataset(f"tiny-imagenet:{tiny(tmp_path)}")
    assert found.classes == ("crane (n01)", "crane (n02)", "cat")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.test.labels.tolist() == [2, 0, 1, 2, 0, 1]
    grey = found.train.images[0]
    assert found.shape == (3, 64, 64)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    assert not torch.equal(found.train.images[1][0], found.train.images[1][1])


def test_tiny_imagenet_may_be_hub_parquet(tmp_path: Path) -> None:
    rows = [(png(image), n % 2) for n, image in enumerate(some_pixels(4, 3, 64, 64))]
    root = write_parquet(tmp_path / "a", rows, rows, ["n01", "n02"], image="image")
    found = load_dataset(f"tiny-imagenet:{root}")
    assert (found.name, found.classes) == ("tiny-imagenet", ("n01", "n02"))
    small = [(png(image), n % 2) for n, image in enumerate(some_pixels(4, 3, 8, 8))]
    other = write_parquet(tmp_path / "b", small, small, ["n01", "n02"])
    refused(f"tiny-imagenet:{other}", "images are 3x8x8, expected 3x64x64")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_0.JPEG\tn99\t0\t0\t1\t1", "line 7: unknown label 'n99'"),
        ("val_0.JPEG\tn01\t0\t0\t1\t1", "line 7: duplicate label for val_0.JPEG"),
        ("val_9.JPEG\tn01\t0\t0\t1\t1", "line 7: 'val_9.JPEG' is missing"),
        ("../x.JPEG\tn01\t0\t0\t1\t1", "line 7: '../x.JPEG' is missing"),
    ],
)
def test_wrong_annotations_are_refused_by_line(line: str, message: str, tmp_path: Path) -> None:
    annotations = tiny(tmp_path) / "tiny-imagenet-200/val/val_annotations.txt"
    annotations.write_text(annotations.read_text() + line)
    refused(f"tiny-imagenet:{tmp_path}", message)


def test_labels_changed_in_place_are_seen(tmp_path: Path) -> None:
    annotations = tiny(tmp_path) / "tiny-imagenet-200/val/val_annotations.txt"
    spec = f"tiny-imagenet:{tmp_path}"
    before = load_dataset(spec).test.labels.tolist()
    text = annotations.read_text()
    annotations.write_text(text.replace("n01", "n0x").replace("n02", "n01").replace("n0x", "n02"))
    turned = {0: 1, 1: 0, 2: 2}
    assert load_dataset(spec).test.labels.tolist() == [turned[label] for label in before]
    words = annotations.parents[1] / "words.txt"
    words.write_text(words.read_text().replace("cat", "dog"))
    assert load_dataset(spec).classes[2] == "dog"


def test_damage_to_tiny_imagenet_is_named(tmp_path: Path) -> None:
    at = tiny(tmp_path) / "tiny-imagenet-200"
    extra = at / "val" / "images" / "extra.JPEG"
    extra.write_bytes(b"")
    refused(f"tiny-imagenet:{tmp_path}", "extra.JPEG: has no line")
    extra.unlink()
    (at / "train" / "n77" / "images").mkdir(parents=True)
    (at / "train" / "n77" / "images" / "x.JPEG").write_bytes(b"")
    refused(f"tiny-imagenet:{tmp_path}", "train/n77: unknown class")
    (at / "train" / "n77" / "images" / "x.JPEG").unlink()
    ids = at / "wnids.txt"
    ids.write_text(ids.read_text() + "\nn01")
    refused(f"tiny-imagenet:{tmp_path}", "class n01 is listed 2 times")
    ids.write_text("n01\nn02\nn03\nn04")
    refused(f"tiny-imagenet:{tmp_path}", "class 'n04' has no images")
    ids.unlink()
    refused(f"tiny-imagenet:{tmp_path}", "no wnids.txt")


def rewritten(place: Path, name: str, content: bytes, **attributes: int) -> Path:
    """A zip archive with one more entry."""
    with zipfile.ZipFile(place, "a") as archive:
        entry = zipfile.ZipInfo(name)
        entry.compress_type = zipfile.ZIP_DEFLATED
        for key, value in attributes.items():
            setattr(entry, key, value)
        archive.writestr(entry, content)
    return place


@pytest.mark.parametrize(
    ("name", "content", "attributes", "message"),
    [
        ("../evil.JPEG", b"x", {}, "leads out of the archive"),
        ("/evil.JPEG", b"x", {}, "leads out of the archive"),
        ("link.JPEG", b"/etc/passwd", {"external_attr": 0o120777 << 16}, "link in an archive"),
        ("bomb.JPEG", bytes(2**22), {}, "decompression bomb"),
        ("a\x1b[31m.JPEG", b"x", {}, "unprintable name"),
    ],
)
def test_unsafe_zip_archives_are_refused(
    name: str, content: bytes, attributes: dict[str, int], message: str, tmp_path: Path
) -> None:
    place = zipped(tiny(tmp_path / "data"), tmp_path / "tiny.zip")
    refused(f"tiny-imagenet:{rewritten(place, name, content, **attributes)}", message)


def test_damaged_zip_archives_are_refused(tmp_path: Path) -> None:
    place = zipped(tiny(tmp_path / "data"), tmp_path / "tiny.zip")
    whole = place.read_bytes()
    place.write_bytes(whole[: len(whole) // 2])
    refused(f"tiny-imagenet:{place}", "damaged")
    at = whole.index(b"val/images/val_3.JPEG") + 200
    place.write_bytes(whole[:at] + bytes(50) + whole[at + 50 :])
    refused(f"tiny-imagenet:{place}", "val_3.JPEG.*damaged")


# folders (the kinds of damage are in test_data_check.py)


def folder(root: Path, *, grey: bool = False, test: str = "test") -> Path:
    for split in ("train", test):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            shape = (12, 10) if grey else (3, 12, 10)
            for n, image in enumerate(some_pixels(2, *shape)):
                (root / split / label / f"{n}.png").write_bytes(png(image // len(label)))
    return root


@pytest.mark.parametrize("test", ["test", "val", "validation"])
@pytest.mark.parametrize("grey", [True, False])
def test_folders_and_their_archives_are_one_set(grey: bool, test: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "set", grey=grey, test=test)
    (root / "train" / "cat" / ".DS_Store").write_bytes(b"litter")
    (root / "train" / "Thumbs.db").write_bytes(b"litter")
    found = load_dataset(f"folder:{root}")
    assert found.classes == ("cat", "dog")
    assert found.shape == ((1, 12, 10) if grey else (3, 12, 10))
    expected = torch.from_numpy(some_pixels(2, *((12, 10) if grey else (3, 12, 10))) // 3)
    assert torch.equal(found.train.images[:2], expected.view(2, -1, 12, 10))
    archive = load_dataset(f"folder:{zipped(tmp_path / 'set', tmp_path / 'set.zip')}")
    wrapped = load_dataset(f"folder:{zipped(tmp_path, tmp_path.parent / 'wrapped.zip')}")
    assert archive.checksum() == found.checksum() == wrapped.checksum()


def test_grey_images_among_colour_ones_become_rgb(tmp_path: Path) -> None:
    root = folder(tmp_path)
    grey = some_pixels(1, 12, 10)[0]
    (root / "train" / "cat" / "0.png").write_bytes(png(grey))
    images = load_dataset(f"folder:{root}").train.images
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, 12, 10))


def test_links_inside_a_folder_are_followed(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "train" / "cat" / "2.png").symlink_to(root / "train" / "cat" / "0.png")
    images = load_dataset(f"folder:{root}").train.images
    assert torch.equal(images[2], images[0])


# npz


def npz(place: Path, **changes: object) -> Path:
    arrays: dict[str, object] = {
        "x_train": some_pixels(6, 9, 7, 3), "y_train": np.arange(6) % 3,
        "x_test": some_pixels(3, 9, 7, 3), "y_test": np.arange(3),
    }  # fmt: skip
    kept = {key: value for key, value in (arrays | changes).items() if value is not None}
    np.savez(place, **kept)  # type: ignore[arg-type]  # arrays, or what should be refused
    return place


def test_arrays_in_every_order_of_axes(tmp_path: Path) -> None:
    last = load_dataset(f"npz:{npz(tmp_path / 'last.npz')}")
    x_train, x_test = (some_pixels(n, 9, 7, 3).transpose(0, 3, 1, 2) for n in (6, 3))
    first = load_dataset(f"npz:{npz(tmp_path / 'first.npz', x_train=x_train, x_test=x_test)}")
    assert last.shape == (3, 9, 7)
    assert last.checksum() == first.checksum()
    assert torch.equal(last.train.images, torch.from_numpy(x_train.copy()))
    grey = npz(tmp_path / "grey.npz", x_train=some_pixels(6, 9, 7), x_test=some_pixels(3, 9, 7))
    assert load_dataset(f"npz:{grey}").shape == (1, 9, 7)
    np.savez(
        tmp_path / "med.npz",
        train_images=some_pixels(6, 9, 7), train_labels=np.arange(6)[:, None] % 3,
        test_images=some_pixels(3, 9, 7), test_labels=np.arange(3)[:, None],
        classes=np.array(["a", "b", "c"]),
    )  # fmt: skip
    assert load_dataset(f"npz:{tmp_path / 'med.npz'}").classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "needs the arrays x_train y_train x_test y_test"),
        ({"x_train": some_pixels(6, 9, 7, 3) / 255}, "x_train: needs bytes"),
        ({"x_train": some_pixels(6, 9, 7, 4)}, "x_train: needs 1 or 3 channels"),
        ({"x_train": some_pixels(6, 8, 8, 3)}, "differ in shape"),
        ({"x_train": some_pixels(6, 3, 7, 3)}, "does not show which axis holds the channels"),
        ({"x_train": some_pixels(6, 1, 49, 1)}, "does not show which axis holds the channels"),
        ({"y_train": np.eye(3, dtype=int)[np.arange(6) % 3]}, "needs integers"),
        ({"y_train": np.arange(6) % 2 == 0}, "needs integers"),
        ({"y_train": np.arange(6) % 3 + 1, "y_test": np.arange(3) + 1}, "class '0' has no images"),
        ({"y_train": np.array([0, 1, 2, 0, 1, 2**63], np.uint64)}, "1 unknown labels"),
        ({"y_test": np.array([0, 1, 5])}, "class '3' has no images"),
        ({"y_train": np.arange(5) % 3}, "6 images x_train for 5 y_train"),
        ({"y_train": np.arange(6) % 3 - 1}, "1 unknown|2 unknown"),
        ({"y_train": np.zeros(6, int)}, "class '1' has no images"),
        ({"y_train": np.zeros(6)}, "needs integers"),
        ({"y_train": np.array([Evil(Path("x"))] * 6)}, "y_train: holds Python objects"),
        ({"y_train": np.array(0)}, "needs integers"),
        ({"classes": np.array(["a", "A", "b"])}, "duplicate class 'A'"),
        ({"classes": np.array(["a", "b", "a"])}, "duplicate class 'a'"),
        ({"x_train": np.zeros((6, 1000, 1000, 3), np.uint8)}, "differ in shape"),
    ],
)
def test_wrong_arrays_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    refused(f"npz:{npz(tmp_path / 'x.npz', **changes)}", message)


def test_npz_bombs_and_other_files_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", x_train=np.zeros((600, 200, 200, 3), np.uint8))
    refused(f"npz:{tmp_path / 'bomb.npz'}", "x_train.npy: .* decompression bomb")
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**15, 32, 32)}
    np.lib.format.write_array_header_1_0(claimed := io.BytesIO(), header)
    place = npz(tmp_path / "claims.npz", x_train=None)
    with zipfile.ZipFile(place, "a") as archive:
        archive.writestr("x_train.npy", claimed.getvalue())
    refused(f"npz:{place}", "x_train: damaged")
    (tmp_path / "text.npz").write_text("nothing")
    refused(f"npz:{tmp_path / 'text.npz'}", "not a readable .npz file")


def test_labels_in_the_order_of_classes_are_no_bomb(tmp_path: Path) -> None:
    many = 40_000
    labels = np.arange(many) // (many // 2)
    place = tmp_path / "sorted.npz"
    pixels = np.zeros((many, 1, 1, 1), np.uint8)
    np.savez_compressed(place, x_train=pixels, y_train=labels, x_test=pixels[:4], y_test=labels[:4])
    with zipfile.ZipFile(place) as archive:
        entry = archive.getinfo("y_train.npy")
    assert entry.file_size > 100 * entry.compress_size
    assert load_dataset(f"npz:{place}").train.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_zipfile_would_unpack_whole_before_it_looks_is_refused(
    tmp_path: Path, method: int
) -> None:
    root = tiny(tmp_path / "official")
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w", method) as archive:
        for file in root.rglob("*"):
            archive.write(file, file.relative_to(root))
    refused(f"tiny-imagenet:{tmp_path / 'tiny.zip'}", "another method than deflate")
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("x_train.npy", b"0")
    refused(f"npz:{tmp_path / 'x.npz'}", "another method than deflate")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_of_megabytes_is_refused_before_it_is_read(tmp_path: Path, form: int) -> None:
    with tarfile.open(tmp_path / "long.tar.gz", "w:gz", format=form) as archive:
        archive.addfile(tarfile.TarInfo("x" * 2**21), io.BytesIO())
    refused(f"cifar10:{tmp_path / 'long.tar.gz'}", "a name of .* bytes, more than 1048576, refused")
