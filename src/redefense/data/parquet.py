"""Parquet files as the Hugging Face hub stores image sets: a struct of bytes, and a label."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from redefense.data.framing import Framing, framing_of
from redefense.data.labels import SPLITS, check_classes, check_labels, numbered_classes
from redefense.data.source import Part, Refuse, Source, common_shape, encoded, spread
from redefense.data.tree import allowed_root, file_fault, folders_above, is_hidden
from redefense.errors import BAD_JSON, DataError, first_of, need, one_line

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("label", "labels", "fine_label", "class", "target")
"""Names of the label column, in order of preference; columns of other names must be a `ClassLabel`.
"""

SHARD = re.compile(r"(?P<what>.*?)(?P<number>\d{1,9})(-of-(?P<total>\d{1,9})(?!\d).*)?")
"""Pattern of the names of a table's parts, such as 0000, train-3 or train-00000-of-00002-ab12."""

UNREADABLE = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError)
"""Base classes of pyarrow's errors."""


def read(
    path: Path,
    refuse: Refuse,
    name: str = "parquet",
    *,
    config: str | None = None,
    label: str | None = None,
    image: str | None = None,
    resize: str | None = None,
    crop: str | None = None,
) -> Source:
    """The parquet files of one configuration below a folder.

    The image column is the struct with a field `bytes`; the label is the integer column named
    `label` (see `LABELS`) or the only one that the schema's `huggingface` metadata calls a
    `ClassLabel`. The names of the classes come from that metadata, or are the numbers.

    Args:
        path: a folder, e.g. a clone from the hub.
        refuse: handler of faults.
        name: name of the set.
        config: folder of the configuration, if there are several.
        label: name of the label column, if it is not a usual one.
        image: name of the image column, if there are several.
        resize: see `Framing`.
        crop: likewise.

    Raises:
        DataError: if pyarrow is missing, or files, splits, columns or labels are invalid.
    """
    framing = framing_of(resize, crop)
    files = split_files(path, config)
    pq = need("pyarrow.parquet", "reading parquet", extra="parquet", error=DataError)
    train, test = (_Table(files[split], pq, path, label, image) for split in ("train", "test"))
    if (train.image, train.label) != (test.image, test.label):
        raise DataError(f"{path}: the columns of train and test differ")
    if train.classes != test.classes:
        raise DataError(f"{path}: the classes of train and test differ")
    classes = train.classes or numbered_classes(str(path), train.labels, test.labels)
    check_classes(classes, str(path), refuse)
    check_labels(train.labels, classes, f"{path} train", refuse, full=True)
    check_labels(test.labels, classes, f"{path} test", refuse, full=False)
    shape = common_shape((*train.sample(), *test.sample()), refuse, str(path), framing)
    everything = (*files["train"], *files["test"])
    return Source(
        name=name,
        classes=classes,
        shape=shape,
        train=train.part(shape, framing),
        test=test.part(shape, framing),
        found=f"hub parquet in {path}: image column {train.image!r}, label column {train.label!r}"
        + f"; {framing}" * bool(framing),
        files=(*folders_above(everything, path), *everything),
    )


def split_files(path: Path, config: str | None = None) -> dict[str, list[Path]]:
    """Parquet files of one configuration by split.

    The split is found by file name (train-...) or folder (train/...), and the configuration is the
    folder that holds the files, as on the hub.

    Raises:
        DataError: if there is no training or no test file, parts of a table are missing, there are
            several configurations and none is chosen, or a link points outside the folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: not a folder of parquet files")
    places = sorted(path.rglob("*.parquet"))
    everything = [file for file in places if not is_hidden(file.relative_to(path).as_posix())]
    configs: dict[str, dict[str, list[Path]]] = {}
    for file in everything:
        if fault := file_fault(file, allowed_root(path)):
            raise DataError(fault)
        if (split := _split(file)) is not None:
            inside = file.parent.parent if file.parent.name in SPLITS[split] else file.parent
            folder = (path if file.parent == path else inside).relative_to(path).as_posix()
            configs.setdefault(folder, {name: [] for name in SPLITS})[split].append(file)
    found = _chosen(path, configs, config)
    # sets without a public test, as ImageNet, are measured on their validation images
    found["test"] = found["test"] or found["validation"]
    for split in ("train", "test"):
        if not found[split]:
            raise DataError(
                f"{path}: no {split} file among {len(everything)} parquet files; "
                f"expected {split}-*.parquet or {split}/0000.parquet"
            )
        _check_shards(found[split], f"{path}: {split}")
    return found


def _split(file: Path) -> str | None:
    first = file.stem.replace("_", "-").replace(".", "-").split("-")[0]
    for split, words in SPLITS.items():
        if first in words or (first.isdigit() and file.parent.name in words):
            return split
    return None


def _chosen(
    path: Path, configs: Mapping[str, dict[str, list[Path]]], config: str | None
) -> dict[str, list[Path]]:
    names = sorted(configs)
    if config is not None and config not in configs:
        raise DataError(f"{path}: no configuration {config!r}; there are {first_of(names)}")
    if config is None and len(names) > 1:
        raise DataError(
            f"{path}: {len(names)} configurations, {first_of(names)}; choose one, "
            f"as in parquet:{path}?config={quote(names[0])}, or give its folder"
        )
    return configs[config or names[0]] if names else {split: [] for split in SPLITS}


def _check_shards(files: Sequence[Path], where: str) -> None:
    """Check that the files of one split are all the parts of one table, each once."""
    shards = [match for file in files if (match := SHARD.fullmatch(file.stem))]
    # files of two tables in one folder would be joined to one set silently
    several = len(shards) < len(files) or len({(s["what"], s["total"]) for s in shards}) > 1
    if several and len(files) > 1:
        raise DataError(
            f"{where}: {first_of([file.name for file in files])} are not numbered as parts of one "
            f"table, as in train-00000-of-{len(files):05}.parquet"
        )
    if not shards:
        return
    (what, number, total), numbers = shards[0].group("what", "number", "total"), set()
    for file, shard in zip(files, shards, strict=True):
        if int(shard["number"]) in numbers:
            raise DataError(f"{where}: {file.name}: this part occurs twice")
        numbers.add(int(shard["number"]))
    # a few count from one, but not the hub's own conversion, 0000.parquet
    converted = not what and len(number) == 4
    first = int(not converted and 0 not in numbers and bool(numbers & {1, int(total or 1)}))
    if total is None and what and min(numbers) > 1:  # a year, for instance
        return
    expected = range(first, first + int(total) if total else max(numbers) + 1)
    ending = f"-of-{total}" if total else ""

    def named(n: int) -> str:
        return f"{what}{n:0{len(number)}}{ending}.parquet"

    if unknown := numbers - set(expected):
        raise DataError(f"{where}: {named(min(unknown))}: more than {total} parts")
    if missing := len(expected) - len(numbers):
        some = [*islice((named(n) for n in expected if n not in numbers), 3)]
        message = f"{missing} of {len(expected)} parts are missing"
        raise DataError(f"{where}: {message}: {first_of(some, count=missing)}")


def _structs(schema: "pa.Schema") -> list[str]:
    """Names of columns that may hold encoded images."""
    structs = [f for f in schema if str(f.type).startswith("struct<")]
    return [str(f.name) for f in structs if f.type.get_field_index("bytes") >= 0]


def _integers(schema: "pa.Schema") -> list[str]:
    return [str(f.name) for f in schema if str(f.type).startswith(("int", "uint"))]


class _Table:
    """The files of one split and their two columns."""

    def __init__(
        self, files: Sequence[Path], pq: Any, path: Path, label: str | None, image: str | None
    ) -> None:
        self.files, self.pq = files, pq
        self._hint = f"as in parquet:{path}?"
        schema = self._open(files[0]).schema_arrow
        self.image = self._image_column(schema, image)
        self.label = self._label_column(schema, label)
        self.classes = self._class_names(schema, self.label)
        self.labels = np.concatenate([self._labels(file) for file in files])

    def _open(self, file: Path) -> Any:
        try:
            return self.pq.ParquetFile(file)
        except UNREADABLE as error:
            raise DataError(f"{file}: not a readable parquet file") from error

    def _labels(self, file: Path) -> np.ndarray:
        opened = self._open(file)
        schema = opened.schema_arrow
        if self.label not in _integers(schema) or self.image not in _structs(schema):
            raise DataError(f"{file}: other columns than in {self.files[0].name}: {schema.names}")
        if self._class_names(schema, self.label) != self.classes:
            raise DataError(f"{file}: other names of classes than in {self.files[0].name}")
        try:
            column = opened.read(columns=[self.label]).column(0)
        except UNREADABLE as error:
            raise DataError(
                f"{file}: column {self.label!r} cannot be read ({one_line(error)})"
            ) from error
        if column.null_count:
            raise DataError(f"{file}: {column.null_count} images without a label")
        return np.asarray(column.to_numpy(), np.int64)

    def _image_column(self, schema: "pa.Schema", chosen: str | None) -> str:
        fields = _structs(schema)
        if chosen is not None:
            fields = [chosen] if chosen in fields else []
        if len(fields) != 1:
            among = first_of([*fields, *(name for name in schema.names if name not in fields)])
            raise DataError(
                f"{self.files[0]}: needs one image column (a struct with bytes), found "
                f"{len(fields)} among {among}; of several name one, {self._hint}image=COLUMN"
            )
        return fields[0]

    def _label_column(self, schema: "pa.Schema", chosen: str | None) -> str:
        fields = _integers(schema)
        if chosen is not None:
            known = [chosen] if chosen in fields else []
        else:
            known = [name for name in LABELS if name in fields][:1]
            known = known or [name for name in fields if self._class_names(schema, name)]
        if len(known) != 1:
            raise DataError(
                f"{self.files[0]}: needs a label column: an integer one named {LABELS[0]} or "
                f"described as a ClassLabel; found {first_of(fields) or 'no integers'}. Name "
                f"another, {self._hint}label=COLUMN"
            )
        return known[0]

    def _class_names(self, schema: "pa.Schema", column: str) -> tuple[str, ...]:
        raw = (schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            feature = json.loads(raw).get("info", {}).get("features", {}).get(column, {})
            names = feature.get("names") or ()
            if isinstance(names, dict):  # number to name, as in some dataset cards
                names = [names[str(number)] for number in range(len(names))]
            return tuple(str(name) for name in names)
        except (*BAD_JSON, AttributeError, TypeError, KeyError) as error:
            raise DataError(f"{self.files[0]}: damaged huggingface metadata") from error

    def images(self) -> Iterator[tuple[str, bytes]]:
        for file in self.files:
            yield from self._rows(file, 1024)

    def _rows(self, file: Path, size: int) -> Iterator[tuple[str, bytes]]:
        row = 0
        try:
            for batch in self._open(file).iter_batches(size, columns=[self.image]):
                for raw in batch.column(0).field("bytes").to_pylist():
                    # a null is reported as an empty file, under its name
                    yield f"{file} row {row}", raw or b""
                    row += 1
        except UNREADABLE as error:
            raise DataError(f"{file}: damaged after row {row} ({one_line(error)})") from error

    def sample(self) -> list[tuple[str, bytes]]:
        """Some images, from the first rows of each of some files."""
        # batches of eight rows, since a file is read by whole batches
        return [row for file in spread(self.files) for row in islice(self._rows(file, 8), 8)]

    def part(self, shape: tuple[int, int, int], framing: Framing) -> Part:
        return encoded(self.labels, self.images, shape, framing)
