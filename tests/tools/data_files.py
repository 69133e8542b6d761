"""Files of images that the tests of `redefense.data` read."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from redefense.data import load_dataset
from redefense.errors import DataError
from redefense.rng import stream

Pixels = NDArray[np.uint8]


def some_pixels(count: int, *shape: int) -> Pixels:
    rng = stream(0, "pixels", count, *shape)
    return torch.randint(256, (count, *shape), generator=rng, dtype=torch.uint8).numpy()


def png(pixels: Pixels, kind: str = "PNG") -> bytes:
    """One image, (H, W) grey or (3, H, W) colour."""
    image = Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0).copy())
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def refused(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(spec)
    assert "\n" not in str(caught.value)


class Evil:
    """Pickles as a call that would leave a file behind."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.place),)


def zipped(root: Path, place: Path) -> Path:
    with zipfile.ZipFile(place, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
    return place


def write_parquet(
    root: Path, train: list[tuple[bytes, int]], test: list[tuple[bytes, int]], names: list[str],
    *, label: str = "label", image: str = "img", file: str = "{}-00000-of-00001.parquet",
) -> Path:  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    for split, rows in (("train", train), ("test", test)):
        table = pa.table(
            {
                image: pa.array(
                    [{"path": None, "bytes": raw} for raw, _ in rows],
                    pa.struct({"path": pa.string(), "bytes": pa.binary()}),
                ),
                label: pa.array([y for _, y in rows], pa.int64()),
                "coarse": pa.array([0] * len(rows), pa.int64()),
            }
        )
        if label == "label":
            table = table.drop_columns("coarse")
        place = root / file.format(split)
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(meta), place)
    return root
