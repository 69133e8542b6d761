"""Files of an unfinished evaluation: written atomically, reused, and redone if damaged.

Images are processed in fixed chunks with separate random streams. A saved chunk therefore equals
the chunk computed again, on any number of processes.
"""

import io
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from redefense.errors import BAD_JSON
from redefense.evaluation.progress import SILENT, Progress
from redefense.results.records import BAD_ARRAYS
from redefense.rng import CHUNK
from redefense.runtime.files import write_bytes
from redefense.runtime.workers import SINGLE_PROCESS, Workers

Arrays = dict[str, NDArray[Any]]

VALUES: Final = 2 * CHUNK * 3 * 64 * 64
"""Largest number of values (pixels x channels, summed over images) in a chunk."""


def read_object(path: Path | None, *keys: str) -> dict[str, Any] | None:
    """The object in a JSON file; None if it is missing or damaged, or lacks one of the keys."""
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except BAD_JSON:
        return None
    return found if isinstance(found, dict) and found.keys() >= set(keys) else None


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an npz file atomically."""
    content = io.BytesIO()  # not into the file: numpy's archive writes again when it is closed
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_bytes(path, content.getvalue())


def read_arrays(path: Path | None) -> Arrays | None:
    """The arrays of an npz file; None if it is missing or damaged."""
    if path is None or not path.is_file():
        return None
    try:
        # opened here: numpy does not close a file that it cannot read
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except BAD_ARRAYS:
        return None


def chunk_size(shape: Sequence[int]) -> int:
    """Images per chunk: `CHUNK`, fewer if they are large; 16 of 224 x 224 pixels.

    So the memory of an attack on large images does not grow with their number.

    Args:
        shape: (channels, height, width) of an image.
    """
    # by the shape alone: streams are named by chunk, so results depend on its size
    return max(1, min(CHUNK, VALUES // math.prod(shape)))


def in_chunks(
    count: int,
    work: Callable[[slice], Mapping[str, Any]],
    *,
    size: int = CHUNK,
    fits: Callable[[slice, Arrays], bool] = lambda images, part: True,
    kept: Path | None = None,
    workers: Workers = SINGLE_PROCESS,
    progress: Progress = SILENT,
) -> list[Arrays]:
    """Process `count` images in chunks.

    Args:
        count: number of images.
        work: computes the arrays of a chunk, including "forwards" (its number of passes).
        size: images per chunk.
        fits: whether the arrays saved for a chunk can be those of `work`.
        kept: folder of finished chunks, to resume from after an interruption; call `forget` once
            their union is saved.
        workers: the processes over which the chunks are distributed.
        progress: advanced after each chunk.

    Returns:
        The arrays of all chunks, in their order, on every process.
    """
    starts = range(0, count, size)
    parts = []
    for start in workers.share(starts):
        images = slice(start, min(start + size, count))
        # a single chunk is not saved separately from its union
        place = kept / f"{start}.npz" if kept is not None and len(starts) > 1 else None
        part = found = read_arrays(place)
        if found is not None and not fits(images, found):
            part = found = None
        if part is None:
            part = {key: np.asarray(value) for key, value in work(images).items()}
            if place is not None:
                write_arrays(place, part)
        progress.advance(images.stop - start, float(part["forwards"]), found=found is not None)
        parts.append(part)
    return workers.gather(parts)


def own_images(count: int, workers: Workers, size: int = CHUNK) -> int:
    """How many of `count` images this process computes, in chunks of `size`."""
    return sum(min(size, count - start) for start in workers.share(range(0, count, size)))


class ChunkStore:
    """Arrays of the chunks of attacks, by the attack's name and the chunk's first image.

    Args:
        folder: holds one file for each chunk; without it they are kept in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[tuple[str, int], Arrays] = {}

    def write(self, name: str, start: int, arrays: Arrays) -> None:
        """Keep the arrays of a chunk."""
        if self._folder is None:
            self._memory[name, start] = arrays
        else:
            write_arrays(self._folder / name / f"{start}.npz", arrays)

    def read(self, name: str, start: int) -> Arrays | None:
        """The arrays of a chunk; None if there are none, or they are damaged."""
        if self._folder is None:
            return self._memory.get((name, start))
        return read_arrays(self._folder / name / f"{start}.npz")

    def forget(self) -> None:
        """Remove all."""
        self._memory.clear()
        forget(self._folder)


def forget(kept: Path | None) -> None:
    """Remove the saved chunks."""
    if kept is not None and kept.is_dir():
        shutil.rmtree(kept)
