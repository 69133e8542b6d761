"""Files of an unfinished evaluation: written atomically, reused, and redone if damaged.

Images are worked through in fixed chunks. Every chunk has random streams of its own, so that what
is kept of a chunk is what working on it again would give, on however many processes.
"""

import io
import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from redefense.evaluation.progress import SILENT, Progress
from redefense.rng import CHUNK
from redefense.runtime.files import write_bytes
from redefense.runtime.workers import ALONE, Workers

Arrays = dict[str, NDArray[Any]]


def read_object(path: Path | None) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an npz file, whole or not at all."""
    content = io.BytesIO()  # not into the file: numpy's archive writes again when it is closed
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_bytes(path, content.getvalue())


def read_arrays(path: Path | None) -> Arrays | None:
    """The arrays of an npz file; None where there is none that can be read."""
    if path is None or not path.is_file():
        return None
    try:
        # opened here: numpy leaves a file that it cannot read to the garbage collector
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error):
        return None


def in_chunks(
    count: int,
    work: Callable[[slice], Mapping[str, Any]],
    *,
    fits: Callable[[slice, Arrays], bool] = lambda images, part: True,
    kept: Path | None = None,
    workers: Workers = ALONE,
    progress: Progress = SILENT,
) -> list[Arrays]:
    """Work through `count` images, chunk by chunk.

    Args:
        count: of images.
        work: makes the arrays of a chunk, "forwards" (passes that it took) among them.
        fits: whether the arrays found for a chunk are those that `work` would make.
        kept: folder in which finished chunks are kept, and found again after an interruption;
            `forget` it once their union is saved.
        workers: the processes among which the chunks are spread.
        progress: is told of each chunk.

    Returns:
        The arrays of all chunks, in their order, on every process.
    """
    starts = range(0, count, CHUNK)
    parts = []
    for start in workers.share(starts):
        images = slice(start, min(start + CHUNK, count))
        # a single chunk is saved with what it is the whole of
        place = kept / f"{start}.npz" if kept is not None and len(starts) > 1 else None
        found = read_arrays(place)
        if found is not None and not fits(images, found):
            found = None
        part = found
        if part is None:
            part = {key: np.asarray(value) for key, value in work(images).items()}
            if place is not None:
                write_arrays(place, part)
        progress.advance(images.stop - start, float(part["forwards"]), found=found is not None)
        parts.append(part)
    return workers.gather(parts)


def own_images(count: int, workers: Workers) -> int:
    """How many of `count` images fall to this process."""
    return sum(min(CHUNK, count - start) for start in workers.share(range(0, count, CHUNK)))


def forget(kept: Path | None) -> None:
    """Remove the chunks kept there."""
    if kept is not None and kept.is_dir():
        shutil.rmtree(kept)
