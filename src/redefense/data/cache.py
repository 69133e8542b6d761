"""Cache of decoded data sets on disk, memory-mapped.

One folder per set: `meta.json` names the array files, with digests of their pieces, and the source
files with size and times. It is replaced atomically after the arrays are complete; arrays are
`.npy` and never pickled. Stale or damaged entries are decoded again.
"""

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redefense.data.dataset import Dataset, Digest, Split, content_digest
from redefense.data.source import Part, Source, all_blocks
from redefense.errors import BAD_JSON

FORMAT = 2  # increased whenever files or the decoding change
PIECE = 2**24  # bytes under one digest
WHOLE = 2**31  # up to this many bytes every piece is verified at each load
SAMPLE = 64  # pieces verified, evenly spaced, in larger files
ABANDONED = 24 * 3600.0  # seconds after which an unfinished file is removed

Meta = dict[str, Any]
Tick = Callable[[int], None]


def default_folder() -> Path:
    """`$REDEFENSE_CACHE`, or `redefense` in the user's cache folder."""
    if own := os.environ.get("REDEFENSE_CACHE"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "redefense"
    return Path.home() / ".cache" / "redefense"


def entry(folder: Path, kind: str, path: Path, options: str = "") -> Path:
    """The folder of one set's cache."""
    # surrogates encode bytes of a path that are not UTF-8
    place = os.path.realpath(path) + options
    key = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:16]
    return folder / f"{kind}-{key}"


def load(at: Path, *, whole: bool = False) -> Dataset | None:
    """The set cached in `at`, or None if there is none, it is stale, or it is damaged.

    Up to 2 GiB every byte is verified; of larger sets 64 pieces of 16 MiB, unless `whole` is set.
    """
    try:
        meta: Meta = json.loads((at / "meta.json").read_bytes())
        seal = meta.pop("seal")
        # the digests below protect the arrays, this seal the digests themselves
        if seal != _seal(meta) or meta["format"] != FORMAT:
            return None
        # before the arrays: comparing times is cheap, digests read every byte
        if meta["sources"] != stamps([Path(place) for place, *_ in meta["sources"]]):
            return None
        if not all(_intact(at / name, how, whole=whole) for name, how in meta["arrays"].items()):
            return None
        return _dataset(at, meta)
    except (*BAD_JSON, KeyError, TypeError):
        return None


def store(at: Path, source: Source, tick: Tick) -> Dataset:
    """Decode `source` into `at`, block by block, with a few blocks in memory.

    Raises:
        DataError: if the source is damaged.
        OSError: if the cache cannot be written.
    """
    at.mkdir(parents=True, exist_ok=True)
    sources = stamps(source.files)  # before reading: a change meanwhile makes the cache stale
    # two processes that decode the same set write different files
    token, arrays = uuid.uuid4().hex[:8], {}
    previous = _names(at)
    content = content_digest(source.classes, source.shape)
    try:
        for what, part in (("train", source.train), ("test", source.test)):
            images, labels = (at / f"{what}-{token}-{kind}.npy" for kind in ("images", "labels"))
            arrays[images.name] = _write_images(
                images, source, part, f"{source.name} {what}", content, tick
            )
            np.save(labels, part.labels, allow_pickle=False)
            content.update(np.ascontiguousarray(part.labels).data)
            arrays[labels.name] = digests(labels)
        meta: Meta = {
            "format": FORMAT,
            "name": source.name,
            "classes": list(source.classes),
            "found": source.found,
            "sources": sources,
            "arrays": arrays,
            "checksum": content.hexdigest(),
        }
    # an interrupt, too, must not leave gigabytes behind
    except BaseException:
        for left in at.glob(f"*-{token}-*.npy"):
            left.unlink(missing_ok=True)
        raise
    aside = at / f"meta-{token}.json"
    aside.write_text(json.dumps(meta | {"seal": _seal(meta)}))
    # the last step: until then readers find the old arrays, afterwards the new ones
    aside.replace(at / "meta.json")
    _clean(at, previous)
    return _dataset(at, meta)


def stamps(files: "tuple[Path, ...] | list[Path]") -> list[list[Any]]:
    """Absolute path, size (0 for a folder) and times of each file.

    The modification time is not enough: copying tools set it, so a file may be replaced by another
    of equal size and time. The change time cannot be set.
    """
    found: list[list[Any]] = []
    for file in files:
        status = file.stat()
        size = 0 if file.is_dir() else status.st_size
        found.append([str(file.absolute()), size, status.st_mtime_ns, status.st_ctime_ns])
    return found


def digests(file: Path) -> list[str]:
    """SHA-256 of each 16 MiB of a file, computed on all cores."""
    return _digests(file, range(_pieces(file)))


def _pieces(file: Path) -> int:
    return -(-file.stat().st_size // PIECE)


def _digests(file: Path, which: "range | list[int]") -> list[str]:
    def digest(piece: int) -> str:
        with file.open("rb") as handle:
            handle.seek(piece * PIECE)
            return hashlib.sha256(handle.read(PIECE)).hexdigest()

    # threads, since hashing releases the interpreter's lock
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(digest, which))


def _intact(file: Path, expected: list[str], *, whole: bool) -> bool:
    count = _pieces(file)
    if count != len(expected):
        return False
    if whole or count * PIECE <= WHOLE:
        return _digests(file, range(count)) == expected
    some = sorted({round(place) for place in np.linspace(0, count - 1, SAMPLE)})
    return _digests(file, some) == [expected[piece] for piece in some]


def _seal(meta: Meta) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write_images(
    file: Path, source: Source, part: Part, what: str, content: Digest, tick: Tick
) -> list[str]:
    size = (len(part.labels), *source.shape)
    # written, not mapped: a full disk then raises an error instead of a signal
    with file.open("wb") as handle:
        # the header of a .npy file first, so that blocks can be appended to it
        header = {"descr": "|u1", "fortran_order": False, "shape": size}
        np.lib.format.write_array_header_1_0(handle, header)
        for block in all_blocks(part, what, tick):
            whole = np.ascontiguousarray(block)
            content.update(whole.data)
            handle.write(whole.data)
    return digests(file)


def _dataset(at: Path, meta: Meta) -> Dataset:
    splits = {}
    for what in ("train", "test"):
        names = [name for name in meta["arrays"] if name.startswith(what)]
        (images,) = (name for name in names if name.endswith("-images.npy"))
        (labels,) = (name for name in names if name.endswith("-labels.npy"))
        # copy on write: torch needs writable memory; the file is not changed
        mapped = np.load(at / images, mmap_mode="c", allow_pickle=False)
        splits[what] = Split(
            torch.from_numpy(mapped), torch.from_numpy(np.load(at / labels, allow_pickle=False))
        )
    return Dataset(
        name=meta["name"],
        classes=tuple(meta["classes"]),
        train=splits["train"],
        test=splits["test"],
        found=meta["found"],
        known_checksum=meta["checksum"],
    )


def _names(at: Path) -> list[str]:
    """Array files of the entry that is about to be replaced."""
    with contextlib.suppress(*BAD_JSON, KeyError, TypeError, AttributeError):
        return list(json.loads((at / "meta.json").read_bytes())["arrays"])
    return []


def _clean(at: Path, previous: list[str]) -> None:
    for name in previous:
        if Path(name).name == name:  # a damaged list must not name files outside the folder
            (at / name).unlink(missing_ok=True)
    current = _names(at)
    for file in at.glob("*.npy"):
        with contextlib.suppress(OSError):
            # younger ones may be written by another process at this moment
            if file.name not in current and time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()
