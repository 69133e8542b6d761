"""Checks a whole data set and lists everything that is wrong with it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from redefense import data
from redefense.data import cache
from redefense.data.dataset import content_digest
from redefense.data.source import Block, Part, Refuse, Source, by_threads, decode, printable
from redefense.errors import DataError

SHOWN = 50  # problems printed; `as_dict` has them all
ALIKE = 3  # problems printed per rule


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Number of images of one split, in total and per class."""

    num_images: int
    per_class: tuple[int, ...]

    def balance(self) -> str:
        low, high = min(self.per_class, default=0), max(self.per_class, default=0)
        return f"{low} images a class" if low == high else f"{low} to {high} images a class"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """The result of `check_dataset`.

    Attributes:
        spec: the data specification.
        found: description of what was found; empty if nothing was.
        shape: channels, height and width.
        checksum: SHA-256 of the content, None if there are problems.
        problems: for each, the file and the rule it breaks; the set is refused if there are any.
        notes: remarks on properties that may be intended.
    """

    spec: str
    found: str
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    train: Counts
    test: Counts
    checksum: str | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready dictionary."""
        return {
            "spec": self.spec,
            "ok": not self.problems,
            "name": self.name,
            "found": self.found,
            "shape": list(self.shape),
            "classes": list(self.classes),
            **{
                what: {"num_images": counts.num_images, "per_class": list(counts.per_class)}
                for what, counts in (("train", self.train), ("test", self.test))
            },
            "checksum": self.checksum,
            "problems": list(self.problems),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The report as text; of similar problems the first few, and their number."""
        lines = [f"{self.spec}: {self.found or 'nothing usable found'}"]
        if self.classes:
            size = "x".join(map(str, self.shape))
            lines += [
                f"{self.train.num_images} training and {self.test.num_images} test images, {size}",
                f"{len(self.classes)} classes: {_shortened(self.classes)}",
                f"balance: training {self.train.balance()}, test {self.test.balance()}",
            ]
        if self.checksum:
            lines.append(f"checksum: sha256 {self.checksum}")
        lines += [f"note: {note}" for note in self.notes]
        problems = _grouped(self.problems)
        lines += problems[:SHOWN]
        if len(problems) > SHOWN:
            lines.append(f"... and more: {len(self.problems)} problems in all")
        return lines


def _grouped(problems: Sequence[str]) -> list[str]:
    """Lines about problems, grouped if they differ only in file and numbers."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        rule = problem.rpartition(": ")[2]
        alike.setdefault(re.sub(r"\d+", "#", rule), []).append(problem)
    lines = []
    for group in alike.values():
        lines += [f"problem: {problem}" for problem in group[:ALIKE]]
        if len(group) > ALIKE:
            lines.append(f"... and {len(group) - ALIKE} more like the last")
    return lines


def check_dataset(spec: str, *, cache_folder: Path | None = None) -> CheckReport:
    """Read and decode everything, and continue where loading would fail.

    Nothing is written. A decoded copy in the cache is verified completely, but not used.
    """
    problems: list[str] = []
    notes: list[str] = []
    source: Source | None = None
    checksum = None
    try:
        source = data.find(spec, problems.append)
        checksum = _content(source, problems.append, notes)
    except DataError as error:
        problems.append(str(error))
    if source and data.DATASETS[spec.partition(":")[0]].place:
        notes += _cached(spec, cache_folder or cache.default_folder(), checksum)
    train, test = _counts(source, "train"), _counts(source, "test")
    if source and (
        untested := [source.classes[n] for n, count in enumerate(test.per_class) if not count]
    ):
        notes.append(f"{len(untested)} classes have no test images: {_shortened(untested)}")
    return CheckReport(
        spec=spec,
        found=source.found if source else "",
        name=source.name if source else "",
        shape=source.shape if source else (),
        classes=source.classes if source else (),
        train=train,
        test=test,
        checksum=None if problems else checksum,
        # each once: an image of the sample is decoded again with all others
        problems=tuple(printable(problem) for problem in dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def _counts(source: Source | None, what: Literal["train", "test"]) -> Counts:
    if source is None:
        return Counts(num_images=0, per_class=())
    part = source.train if what == "train" else source.test
    # others are among the problems, and `bincount` refuses negative numbers
    known = part.labels[(part.labels >= 0) & (part.labels < len(source.classes))]
    per_class = np.bincount(known, minlength=len(source.classes))
    return Counts(num_images=len(part.labels), per_class=tuple(int(n) for n in per_class))


def _content(source: Source, refuse: Refuse, notes: list[str]) -> str:
    """Checksum of the content, as `Dataset.checksum`; duplicates and leaks are noted."""
    content = content_digest(source.classes, source.shape)
    prints: list[NDArray[np.int64]] = []
    for what, part in (("train", source.train), ("test", source.test)):
        marks: list[int] = []
        for block in _readable(part, source.shape, refuse):
            whole = np.ascontiguousarray(block)
            content.update(whole.data)
            marks += [_mark(image) for image in whole]
        content.update(np.ascontiguousarray(part.labels).data)
        # of encoded images some may be unreadable, which are reported by name
        if part.items is None and len(marks) != len(part.labels):
            refuse(f"{source.name} {what}: {len(marks)} images for {len(part.labels)} labels")
        prints.append(np.array(marks, np.int64))
    train, test = prints
    _, first, which = np.unique(train, return_index=True, return_inverse=True)
    if copies := len(train) - len(first):
        message = f"{copies} training images are copies of others"
        if len(train) == len(source.train.labels):  # all could be read
            labels = source.train.labels
            other = int((labels != labels[first][which]).sum())
            message += f", {other} of them in another class" * bool(other)
        notes.append(message)
    leaked = np.flatnonzero(np.isin(test, train))
    if len(leaked):
        notes.append(
            f"{len(leaked)} test images are also training images, the first is number {leaked[0]}"
        )
    return content.hexdigest()


def _readable(part: Part, shape: tuple[int, int, int], refuse: Refuse) -> Iterator[Block]:
    """Blocks of a part without images that cannot be decoded, which are reported by name."""
    if part.items is None:
        yield from part.blocks()
        return

    def attempt(name: str, raw: bytes) -> Block | str:
        try:
            return decode(raw, name, shape, part.framing)
        except DataError as error:
            return str(error)

    for results in by_threads(part.items(), attempt, shape):
        for fault in results:
            if isinstance(fault, str):
                refuse(fault)
        if good := [image for image in results if not isinstance(image, str)]:
            yield np.stack(good)


def _mark(image: Block) -> int:
    # 8 bytes: among a million images two marks are equal by chance once in 40 million sets
    return int.from_bytes(blake2b(image.data, digest_size=8).digest(), "big", signed=True)


def _cached(spec: str, folder: Path, checksum: str | None) -> list[str]:
    at = data.parse(spec).copy_in(folder)
    if not (at / "meta.json").exists():
        return []
    copy = cache.load(at, whole=True)
    if copy is None:
        return [f"decoded copy in {at}: stale or damaged, will be made again"]
    same = checksum is None or copy.checksum() == checksum
    state = "intact" if same else "of other data than these, remove it"
    return [f"decoded copy in {at}: {state}"]


def _shortened(classes: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in classes[:10])
    return shown if len(classes) <= 10 else f"{shown}, ..."
