"""Every layout of CIFAR gives the same images; what is unsafe is refused by name."""

import hashlib
import io
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
import torch

from data_files import Evil, Pixels, png, refused, some_pixels, write_parquet
from redefense.data import hub, load_dataset
from redefense.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDEFENSE_CACHE", str(tmp_path / "cache"))


# CIFAR


def cifar(kind: str) -> tuple[Pixels, list[int], list[str]]:
    """Images (N, 3072), labels and names of classes: 5 batches (10: 1 batch) and the test one."""
    classes = 10 if kind == "cifar10" else 100
    count = 60 if kind == "cifar10" else 200
    return some_pixels(count, 3072), [n % classes for n in range(count)], _names(classes)


def _names(classes: int) -> list[str]:
    return [f"class{n}" for n in range(classes)]


def parts(kind: str) -> list[tuple[str, slice]]:
    if kind == "cifar10":
        train = [(f"data_batch_{n}", slice(10 * n - 10, 10 * n)) for n in range(1, 6)]
        return [*train, ("test_batch", slice(50, 60))]
    return [("train", slice(0, 100)), ("test", slice(100, 200))]


def as_python_2(data: Pixels, labels: list[int], key: str) -> bytes:
    """A batch as Python 2 pickled it: byte strings, numpy's old module name."""
    rows, pixels = data.shape[0], data.tobytes()

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt"
        + text(b"b") + b"tR(I1\n(I" + str(rows).encode() + b"\nI3072\ntcnumpy\ndtype\n("
        + text(b"u1") + b"I0\nI1\ntR(I3\n" + text(b"|") + b"NNNI-1\nI-1\nI0\ntbI00\n"
        + text(pixels) + b"tb"
    )  # fmt: skip
    listed = b"(" + b"".join(b"I%d\n" % y for y in labels) + b"l"
    names = b"(" + b"".join(text(b"x%d.png" % n) for n in range(rows)) + b"l"
    return (
        b"\x80\x02(" + text(b"data") + array + text(key.encode()) + listed
        + text(b"filenames") + names + b"d."
    )  # fmt: skip


def as_python_3(data: Pixels, labels: list[int], key: str) -> bytes:
    return pickle.dumps({"data": data, key: labels}, protocol=4)


def write_python(root: Path, kind: str, batch: Callable[[Pixels, list[int], str], bytes]) -> Path:
    data, labels, names = cifar(kind)
    folder = root / ("cifar-10-batches-py" if kind == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    key, names_key, meta = (
        ("labels", "label_names", "batches.meta")
        if kind == "cifar10"
        else ("fine_labels", "fine_label_names", "meta")
    )
    for name, rows in parts(kind):
        (folder / name).write_bytes(batch(data[rows], labels[rows], key))
    listed = [name.encode() for name in names]
    (folder / meta).write_bytes(pickle.dumps({names_key.encode(): listed}, protocol=2))
    return root


def write_binary(root: Path, kind: str) -> Path:
    data, labels, names = cifar(kind)
    folder = root / ("cifar-10-batches-bin" if kind == "cifar10" else "cifar-100-binary")
    folder.mkdir(parents=True)
    for name, rows in parts(kind):
        coarse = b"" if kind == "cifar10" else b"\x07"
        records = [
            coarse + bytes([y]) + x.tobytes() for x, y in zip(data[rows], labels[rows], strict=True)
        ]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    meta = "batches.meta.txt" if kind == "cifar10" else "fine_label_names.txt"
    (folder / meta).write_text("\n".join(names) + "\n\n")
    return root


def write_hub(root: Path, kind: str) -> Path:
    data, labels, names = cifar(kind)
    rows = [(png(x.reshape(3, 32, 32)), y) for x, y in zip(data, labels, strict=True)]
    half = 50 if kind == "cifar10" else 100
    label = "label" if kind == "cifar10" else "fine_label"
    return write_parquet(root, rows[:half], rows[half:], names, label=label)


def packed(
    root: Path, kind: str, write: Callable[[Path], Path], mode: Literal["w", "w:gz"]
) -> Path:
    """The tar archive of what `write` makes, in the folder that is returned."""
    inner = write(root / "unpacked")
    out = root / "packed"
    out.mkdir()
    name = "cifar-10-python.tar.gz" if kind == "cifar10" else "cifar-100-python.tar.gz"
    with tarfile.open(out / name, mode) as archive:
        for file in sorted(inner.rglob("*")):
            archive.add(file, file.relative_to(inner), recursive=False)
    return out


LAYOUTS: dict[str, Callable[[Path, str], Path]] = {
    "python 2": lambda root, kind: write_python(root, kind, as_python_2),
    "python 3": lambda root, kind: write_python(root, kind, as_python_3),
    "binary": write_binary,
    "hub": write_hub,
    "tar.gz python": lambda root, kind: packed(
        root, kind, lambda inner: write_python(inner, kind, as_python_2), "w:gz"
    ),
    "tar binary": lambda root, kind: packed(
        root, kind, lambda inner: write_binary(inner, kind), "w"
    ),
}


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_cifar_gives_the_same_images(
    layout: str, kind: str, tmp_path: Path
) -> None:
    data, labels, names = cifar(kind)
    found = load_dataset(f"{kind}:{LAYOUTS[layout](tmp_path / 'data', kind)}")
    half = 50 if kind == "cifar10" else 100
    images = torch.from_numpy(data).view(-1, 3, 32, 32)
    assert found.classes == tuple(names)
    assert torch.equal(found.train.images, images[:half])
    assert torch.equal(found.test.images, images[half:])
    assert found.train.labels.tolist() == labels[:half]
    assert found.test.labels.tolist() == labels[half:]
    assert layout.split()[0] in found.found or "tar archive" in found.found
    assert found.found.startswith(kind)


def test_the_path_may_be_the_archive_or_the_folder_itself(tmp_path: Path) -> None:
    root = LAYOUTS["tar.gz python"](tmp_path, "cifar10")
    (archive,) = root.iterdir()
    whole = load_dataset(f"cifar10:{root}").checksum()
    assert load_dataset(f"cifar10:{archive}").checksum() == whole
    inner = tmp_path / "unpacked" / "cifar-10-batches-py"
    assert load_dataset(f"cifar10:{inner}").checksum() == whole


@pytest.mark.parametrize("hidden", ["labels", "data", "other"])
def test_a_pickle_that_wants_to_import_anything_is_refused(hidden: str, tmp_path: Path) -> None:
    root = write_python(tmp_path / "data", "cifar10", as_python_3)
    trace = tmp_path / "was-here"
    content = {"data": some_pixels(10, 3072), "labels": [0] * 10} | {hidden: Evil(trace)}
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(content))
    refused(f"cifar10:{root}", "data_batch_3: refused as unsafe.*tries to import posix.mkdir")
    assert not trace.exists()


def global_pickle(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n.".encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("numpy", "load"), ("numpy.core.multiarray", "scalar"),
     ("redefense.data.pickles", "load"), ("_codecs", "decode"), ("numpy", "ndarray.tofile")],
)  # fmt: skip
def test_only_five_names_can_be_asked_for(module: str, name: str, tmp_path: Path) -> None:
    root = write_python(tmp_path, "cifar10", as_python_3)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(global_pickle(module, name))
    refused(f"cifar10:{root}", f"test_batch: refused as unsafe.*{module}.{name}")


def test_pickles_that_only_fill_the_memory_are_refused(tmp_path: Path) -> None:
    root = write_python(tmp_path, "cifar10", as_python_3)
    batch = root / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    refused(f"cifar10:{root}", "expands to more memory")
    batch.write_bytes(b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".")
    refused(f"cifar10:{root}", "test_batch: .*(BYTEARRAY8|damaged)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\x80\x04garbage", "damaged"),
        (pickle.dumps([1, 2]), "damaged pickle"),
        (pickle.dumps({"data": np.zeros((10, 3072), np.float32), "labels": []}), "unsigned bytes"),
        (pickle.dumps({"data": np.zeros((10, 5), np.uint8), "labels": [0] * 10}), "rows of 3072"),
        (pickle.dumps({"data": np.zeros((10, 3072), np.uint8)}), "no list of numbers `labels`"),
        (
            pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": [0] * 9}),
            "10 images for 9 labels",
        ),
        (
            pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": [10] * 10}),
            r"10 unknown labels outside \[0, 10\)",
        ),
    ],
)
def test_damaged_python_batches_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    root = write_python(tmp_path, "cifar10", as_python_3)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(content)
    refused(f"cifar10:{root}", message)


def test_missing_and_truncated_batches_are_named(tmp_path: Path) -> None:
    root = write_binary(tmp_path, "cifar10")
    batch = root / "cifar-10-batches-bin" / "data_batch_4.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    refused(f"cifar10:{root}", r"data_batch_4.bin: 30729 bytes are not records of 3073")
    batch.unlink()
    refused(f"cifar10:{root}", "data_batch_4.bin is missing")
    refused(f"cifar100:{root}", "contains no cifar100")


def test_another_set_is_not_taken_for_cifar(tmp_path: Path) -> None:
    rows = [(png(some_pixels(1, 3, 16, 16)[0]), n % 2) for n in range(4)]
    root = write_parquet(tmp_path, rows, rows, ["a", "b"])
    refused(f"cifar10:{root}", "not cifar10: found 2 classes of images 3x16x16")


# archives


def tar_with(place: Path, member: tarfile.TarInfo, content: bytes = b"") -> Path:
    member.size = len(content)
    with tarfile.open(place, "w:gz") as archive:
        archive.addfile(member, io.BytesIO(content))
    return place


def test_tar_archives_that_lead_out_or_expand_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "cifar.tar.gz"
    for name in ("../data_batch_1", "/etc/data_batch_1", "a/../../b", "c:\\b"):
        tar_with(place, tarfile.TarInfo(name), b"x")
        refused(f"cifar10:{place}", "name leads out of the archive")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        link = tarfile.TarInfo("data_batch_1")
        link.type, link.linkname = kind, "/etc/passwd"
        tar_with(place, link)
        refused(f"cifar10:{place}", "link in an archive")
    pipe = tarfile.TarInfo("data_batch_1")
    pipe.type = tarfile.FIFOTYPE
    tar_with(place, pipe)
    refused(f"cifar10:{place}", "neither file nor folder")
    with tarfile.open(place, "w") as archive:
        archive.addfile(huge := tarfile.TarInfo("data_batch_1"))
        huge.size = 2**40
        archive.addfile(tarfile.TarInfo("other"))
    header = bytearray(place.read_bytes())
    sized = tarfile.TarInfo("data_batch_1")
    sized.size = 2**33
    header[:512] = sized.tobuf(tarfile.GNU_FORMAT)
    place.write_bytes(bytes(header))
    refused(f"cifar10:{place}", r"8589934592 bytes, more than \d+, refused")
    place.write_bytes(place.read_bytes()[:100])
    refused(f"cifar10:{place}", "damaged")


# the hub


def stand_in_for_hub(content: dict[str, bytes], calls: list[str]) -> ModuleType:
    """A client that writes the given files into the folder it is asked to use."""

    def hf_hub_download(
        repo: str, name: str, *, repo_type: str, revision: str, local_dir: Path
    ) -> str:
        assert (repo, repo_type, revision) == (
            "uoft-cs/cifar10", "dataset", hub.HUB["cifar10"].revision,
        )  # fmt: skip
        calls.append(name)
        if not content:
            raise OSError("no network")
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (local_dir / name).write_bytes(content[name])
        return str(local_dir / name)

    module = ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]  # a stand-in
    return module


def test_downloads_are_pinned_checked_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_hub(tmp_path / "source", "cifar10")
    content = {name: (source / Path(name).name).read_bytes() for name in hub.HUB["cifar10"].files}
    calls: list[str] = []
    place = tmp_path / "place"
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in_for_hub({}, calls))
    with pytest.raises(DataError, match=r"download failed \(no network\)"):
        load_dataset(f"cifar10:{place}", download=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in_for_hub(content, calls))
    with pytest.raises(DataError, match=r"SHA-256 .* expected 8428b53a.*; removed"):
        load_dataset(f"cifar10:{place}", download=True)
    assert not list(place.rglob("*.parquet"))
    ours = {name: hashlib.sha256(raw).hexdigest() for name, raw in content.items()}
    pinned = hub.HubSet(repo="uoft-cs/cifar10", revision=hub.HUB["cifar10"].revision, files=ours)
    monkeypatch.setattr(hub, "HUB", {"cifar10": pinned})
    found = load_dataset(f"cifar10:{place}", download=True)
    assert found.checksum() == load_dataset(f"cifar10:{source}").checksum()
    # other data are never touched, and without the option nothing is fetched
    calls.clear()
    assert len(load_dataset(f"cifar10:{source}", download=True).train) == 50
    refused(f"cifar10:{tmp_path / 'elsewhere'}", "no such file or folder.*--download")
    with pytest.raises(DataError, match="npz cannot be downloaded"):
        load_dataset(f"npz:{tmp_path / 'elsewhere'}", download=True)
    assert calls == []


def test_a_missing_hub_client_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"needs huggingface_hub; .* -e '\.\[hub\]'"):
        load_dataset(f"cifar10:{tmp_path / 'place'}", download=True)
