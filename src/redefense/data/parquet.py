"""Parquet files as the Hugging Face hub stores image sets: a struct of bytes, and a label."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from redefense.data.source import Block, Part, Source, decoded, measure
from redefense.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val"),
}
LABELS = ("label", "labels", "fine_label")
"""Names tried in this order where a table has several integer columns."""


def read(path: Path | None, name: str = "parquet") -> Source:
    """All parquet files below a folder (or one split's folder layout), of any column names.

    The image column is the struct with a field `bytes`, the label an integer column; the names of
    the classes come from the schema's `huggingface` metadata, or are the numbers.

    Raises:
        DataError: if pyarrow is missing, or files, splits, columns or labels are not as needed.
    """
    if path is None:
        raise DataError(f"{name} needs a folder: write {name}:PATH")
    pq = _pyarrow_parquet()
    files = split_files(path)
    train = _Table(files["train"], pq)
    test = _Table(files["test"], pq)
    if train.classes != test.classes:
        raise DataError(f"{path}: the classes of train and test differ")
    classes = train.classes or _numbered(path, train.labels, test.labels)
    for table in (train, test):
        table.check_labels(len(classes))
    name_of_first, first = next(train.images())
    shape = measure(first, name_of_first)
    return Source(
        name=name,
        classes=classes,
        shape=shape,
        train=train.part(shape),
        test=test.part(shape),
        found=f"hub parquet in {path}: image column {train.image!r}, label column {train.label!r}",
        files=(*files["train"], *files["test"]),
    )


def split_files(path: Path) -> dict[str, list[Path]]:
    """Parquet files below `path` by split, found by file name (train-...) or folder (train/...).

    The validation files serve as test where there are no others.

    Raises:
        DataError: if there is no training or no test file.
    """
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    everything = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    for file in everything:
        for split, words in SPLITS.items():
            if file.stem.split("-")[0].split("_")[0] in words or file.parent.name in words:
                found[split].append(file)
    if not found["test"]:
        found["test"] = found["validation"]
    for split in ("train", "test"):
        if not found[split]:
            raise DataError(
                f"{path}: no {split} file among {len(everything)} parquet files; "
                f"expected {split}-*.parquet or {split}/*.parquet"
            )
    return found


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "reading parquet needs pyarrow: pip install 'redefense[parquet]'"
        ) from error
    return pyarrow.parquet


def _numbered(path: Path, *labels: np.ndarray) -> tuple[str, ...]:
    top = max(int(some.max(initial=-1)) for some in labels)
    if top > 9999:
        raise DataError(f"{path}: labels up to {top} without names of classes")
    return tuple(str(number) for number in range(top + 1))


class _Table:
    """The files of one split, columns found by their type."""

    def __init__(self, files: Sequence[Path], pq: Any) -> None:
        self.files, self.pq = files, pq
        schema = self._open(files[0]).schema_arrow
        self.image = self._image_column(schema)
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        self.features = features.get("info", {}).get("features", {})
        self.label = self._label_column(schema)
        self.classes = tuple(self.features.get(self.label, {}).get("names", ()))
        parts = [self._open(file).read(columns=[self.label]).column(0).to_numpy() for file in files]
        self.labels = np.concatenate(parts).astype(np.int64)

    def _open(self, file: Path) -> Any:
        try:
            return self.pq.ParquetFile(file)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise DataError(f"{file}: not a readable parquet file") from error

    def _image_column(self, schema: "pa.Schema") -> str:
        fields = [f.name for f in schema if str(f.type).startswith("struct<bytes: binary")]
        if len(fields) != 1:
            raise DataError(
                f"{self.files[0]}: needs one image column (a struct with bytes), "
                f"found {len(fields)} among {schema.names}"
            )
        return str(fields[0])

    def _label_column(self, schema: "pa.Schema") -> str:
        fields = [f.name for f in schema if str(f.type).startswith(("int", "uint"))]
        if len(fields) > 1:
            fields = [name for name in LABELS if name in fields][:1]
        if len(fields) != 1:
            raise DataError(
                f"{self.files[0]}: needs one integer column of labels, found {schema.names}"
            )
        return str(fields[0])

    def check_labels(self, num_classes: int) -> None:
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(wrong):
            raise DataError(
                f"{self.files[0]}: {len(wrong)} labels outside [0, {num_classes}), "
                f"the first is {self.labels[wrong[0]]} at row {wrong[0]}"
            )

    def images(self) -> Iterator[tuple[str, bytes]]:
        for file in self.files:
            row = 0
            for batch in self._open(file).iter_batches(1024, columns=[self.image]):
                for raw in batch.column(0).field("bytes").to_pylist():
                    if raw is None:
                        raise DataError(f"{file} row {row}: no image bytes")
                    yield f"{file} row {row}", raw
                    row += 1

    def part(self, shape: tuple[int, int, int]) -> Part:
        def blocks() -> Iterator[Block]:
            return decoded(self.images(), shape)

        return Part(labels=self.labels, blocks=blocks)
