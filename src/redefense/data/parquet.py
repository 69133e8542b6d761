"""Parquet files as the Hugging Face hub stores image sets: a struct of bytes, and a label."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from redefense.data.labels import SPLITS, check_classes, check_labels
from redefense.data.source import Part, Refuse, Source, common_shape, encoded, one_line, spread
from redefense.data.tree import allowed_root, file_fault, folders_above
from redefense.errors import DataError, lacking

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", "labels", "fine_label")
"""Names tried in this order where a table has several integer columns."""

MAX_UNNAMED = 10_000

UNREADABLE = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError)
"""Bases of all errors of pyarrow."""


def read(path: Path, refuse: Refuse, name: str = "parquet") -> Source:
    """All parquet files below a folder, of any column names.

    The image column is the struct with a field `bytes`, the label an integer column; the names of
    the classes come from the schema's `huggingface` metadata, or are the numbers.

    Raises:
        DataError: if pyarrow is missing, or files, splits, columns or labels are not as needed.
    """
    files = split_files(path)
    pq = _pyarrow_parquet()
    train, test = (_Table(files[split], pq) for split in ("train", "test"))
    if train.classes != test.classes:
        raise DataError(f"{path}: the classes of train and test differ")
    classes = train.classes or _numbered(path, train.labels, test.labels)
    check_classes(classes, str(path), refuse)
    check_labels(train.labels, classes, f"{path} train", refuse, full=True)
    check_labels(test.labels, classes, f"{path} test", refuse, full=False)
    shape = common_shape((*train.sample(), *test.sample()), refuse, str(path))
    everything = (*files["train"], *files["test"])
    return Source(
        name=name,
        classes=classes,
        shape=shape,
        train=train.part(shape),
        test=test.part(shape),
        found=f"hub parquet in {path}: image column {train.image!r}, label column {train.label!r}",
        files=(*folders_above(everything, path), *everything),
    )


def split_files(path: Path) -> dict[str, list[Path]]:
    """Parquet files below `path` by split, found by file name (train-...) or folder (train/...).

    Raises:
        DataError: if there is no training or no test file, or a link leads elsewhere.
    """
    if not path.is_dir():
        raise DataError(f"{path}: not a folder of parquet files")
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    everything = sorted(path.rglob("*.parquet"))
    for file in everything:
        if fault := file_fault(file, allowed_root(path)):
            raise DataError(fault)
        first = file.stem.replace("_", "-").replace(".", "-").split("-")[0]
        for split, words in SPLITS.items():
            if first in words or (first.isdigit() and file.parent.name in words):
                found[split].append(file)
    found["test"] = found["test"] or found["validation"]
    for split in ("train", "test"):
        if not found[split]:
            raise DataError(
                f"{path}: no {split} file among {len(everything)} parquet files; "
                f"expected {split}-*.parquet or {split}/0000.parquet"
            )
    return found


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(lacking("reading parquet", "pyarrow", "parquet")) from error
    return pyarrow.parquet


def _numbered(path: Path, *labels: np.ndarray) -> tuple[str, ...]:
    top = max(int(some.max(initial=-1)) for some in labels)
    if top >= MAX_UNNAMED:
        raise DataError(f"{path}: labels up to {top} without names of classes")
    return tuple(str(number) for number in range(top + 1))


class _Table:
    """The files of one split, columns found by their type."""

    def __init__(self, files: Sequence[Path], pq: Any) -> None:
        self.files, self.pq = files, pq
        schema = self._open(files[0]).schema_arrow
        self.image = self._image_column(schema)
        self.label = self._label_column(schema)
        self.classes = self._class_names(schema)
        self.labels = np.concatenate([self._labels(file) for file in files])

    def _open(self, file: Path) -> Any:
        try:
            return self.pq.ParquetFile(file)
        except UNREADABLE as error:
            raise DataError(f"{file}: not a readable parquet file") from error

    def _labels(self, file: Path) -> np.ndarray:
        try:
            column = self._open(file).read(columns=[self.label]).column(0)
        except UNREADABLE as error:
            raise DataError(
                f"{file}: column {self.label!r} cannot be read ({one_line(error)})"
            ) from error
        if column.null_count:
            raise DataError(f"{file}: {column.null_count} images without a label")
        return np.asarray(column.to_numpy(), np.int64)

    def _image_column(self, schema: "pa.Schema") -> str:
        fields = [
            f.name
            for f in schema
            if str(f.type).startswith("struct<") and f.type.get_field_index("bytes") >= 0
        ]
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

    def _class_names(self, schema: "pa.Schema") -> tuple[str, ...]:
        raw = (schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            feature = json.loads(raw).get("info", {}).get("features", {}).get(self.label, {})
            names = feature.get("names", ())
            if isinstance(names, dict):  # number to name, as some cards have it
                names = [names[str(number)] for number in range(len(names))]
            return tuple(str(name) for name in names)
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise DataError(f"{self.files[0]}: damaged huggingface metadata") from error

    def images(self) -> Iterator[tuple[str, bytes]]:
        for file in self.files:
            yield from self._rows(file, 1024)

    def _rows(self, file: Path, size: int) -> Iterator[tuple[str, bytes]]:
        row = 0
        try:
            for batch in self._open(file).iter_batches(size, columns=[self.image]):
                for raw in batch.column(0).field("bytes").to_pylist():
                    yield f"{file} row {row}", raw or b""
                    row += 1
        except UNREADABLE as error:
            raise DataError(f"{file}: damaged after row {row} ({one_line(error)})") from error

    def sample(self) -> list[tuple[str, bytes]]:
        """Some images, from the first rows of each of some files."""
        return [row for file in spread(self.files) for row in islice(self._rows(file, 8), 8)]

    def part(self, shape: tuple[int, int, int]) -> Part:
        return encoded(self.labels, self.images, shape)
