"""Reads typed tables of claims: one row per figure, separated by commas or tabs."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from redefense.audit.attack_names import UNBOUNDED, attack_key, knows_the_draw
from redefense.audit.table import Claim
from redefense.errors import ConfigError, DataError, TableError
from redefense.radius import check_linf

COLUMNS: Final = (
    "table", "dataset", "method", "attack", "accuracy", "norm", "eps", "num_images", "members",
    "randomized",
)  # fmt: skip

OPTIONAL: Final = ("aware",)
"""Optional columns of a table."""

NORMS: Final = ("inf", "2", "1", "0")

_TRUTH = {"": None, "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SPREAD = re.compile(r"\s*(?:\u00b1|\+\s*/?\s*[-\u2212]|\\pm)\s*")
_WRAPPED = re.compile(rf"_?([({{])({_SPREAD.pattern}[^(){{}}]*)[)}}]")
"""A spread in brackets or as a subscript of TeX."""


def read_csv(path: Path) -> list[Claim]:
    """Claims of a table with the columns `COLUMNS`; accuracies in percent, empty where unstated.

    A column `aware` may state whether the attack is aware of the draw, whatever its name.

    Raises:
        DataError: if lines cannot be read; it names each line with its column and value.
    """
    try:
        # spreadsheets write a byte-order mark before the first name
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None
    # not splitlines(): cells may contain other separators of lines and pages
    table = io.StringIO(text, newline="")
    # strict: otherwise an unclosed quote would silently join lines
    reader = csv.DictReader(table, delimiter=_delimiter(path, text), strict=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from None
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise DataError(
            f"{path} has no columns {', '.join(missing)}: add them, with empty cells where the "
            f"source states nothing. The first line must be {','.join(COLUMNS)}"
        )
    twice = [column for column in (*COLUMNS, *OPTIONAL) if names.count(column) > 1]
    if twice:
        raise DataError(f"{path} has more than one column {', '.join(twice)}")
    claims, refused = [], []
    for line, row in rows:
        # spreadsheets export empty lines as separators only
        if not any(map(_filled, row.values())):
            continue
        try:
            claims.append(_Row.of(row).claim(line))
        except ConfigError as error:
            refused.append(f"line {line}: {error}")
    # all at once: a typed table has many slips, and one round for each would be tedious
    if len(refused) > 1:
        raise TableError(f"{path}: {len(refused)} lines cannot be read\n  " + "\n  ".join(refused))
    if refused:
        raise DataError(f"{path} {refused[0]}")
    if not claims:
        raise DataError(f"{path} has no figures")
    return claims


def _delimiter(path: Path, text: str) -> str:
    """The separator of the columns, from the header.

    Raises:
        DataError: for semicolons: such files may use decimal commas, which are ambiguous.
    """
    header = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    counts = {mark: header.count(mark) for mark in (",", "\t", ";")}
    mark = max(counts, key=lambda key: counts[key])
    if mark == ";":
        raise DataError(
            f"{path} separates columns by semicolons: use commas or tabs, and write decimal points"
        )
    return mark


def _filled(cell: object) -> bool:
    return any(map(_filled, cell)) if isinstance(cell, list) else bool(cell and str(cell).strip())


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a table; its methods raise ConfigError, naming column and value."""

    cells: Mapping[str, str]

    @classmethod
    def of(cls, row: Mapping[str | None, object]) -> "_Row":
        # DictReader collects surplus cells under the key None
        if None in row:
            raise ConfigError("more cells than columns")
        # it gives None for cells that a short line lacks
        return cls({key: str(row.get(key) or "").strip() for key in (*COLUMNS, *OPTIONAL)})

    def number(self, text: str, column: str, low: float, high: float) -> float:
        try:
            value = float(text)
        except ValueError:
            # compares as false with every limit, so it is refused below
            value = float("nan")
        if not low <= value <= high:
            # a decimal comma is guessed for the hint only: 1,234 may be a thousand
            point = text.replace(",", ".", 1)
            hint = f" (write {point})" if re.fullmatch(r"\d+,\d{1,2}", text) else ""
            if column == "accuracy" and (found := re.fullmatch(r"([\d.]+)\s*\(([\d.]+)\)", text)):
                hint = f" (write {found[1]} +- {found[2]} if the brackets hold a spread)"
            raise ConfigError(
                f"{column} must be a number from {low:g} to {high:g}, "
                f"got {self.cells[column]!r}{hint}"
            )
        return value

    def accuracy(self) -> tuple[float, int | None, float | None, int | None]:
        """Percent, number of decimals, spread, and the number of images if it is a count."""
        written = self.cells["accuracy"]
        text, *spread = [_bare(part) for part in _SPREAD.split(_WRAPPED.sub(r"\2", written))]
        count = re.fullmatch(r"(\d+)\s*/\s*(\d+)", text)
        if count is not None and not spread:
            right, images = int(count[1]), int(count[2])
            if not 0 < images >= right:
                raise ConfigError(f"accuracy must not count more than all images, got {written!r}")
            return 100 * right / images, None, None, images
        value = self.number(text, "accuracy", 0.0, 100.0)
        if len(spread) > 1:
            raise ConfigError(f"accuracy must have one spread at most, got {written!r}")
        beyond = self.number(spread[0], "accuracy", 0.0, 100.0) if spread else None
        return value, len(text.partition(".")[2]), beyond, None

    def eps(self) -> float | None:
        """The radius, also as a fraction such as `8/255`."""
        text = self.cells["eps"]
        if not text:
            return None
        above, slash, below = (part.strip() for part in text.partition("/"))
        value = self.number(above, "eps", 0.0, 1e9)
        return value / self.number(below, "eps", 1e-9, 1e9) if slash else value

    def count(self, column: str) -> int | None:
        text = self.cells[column]
        if not text:
            return None
        value = self.number(text, column, 1.0, 1e12)
        if value != int(value):
            raise ConfigError(f"{column} must be a whole number, got {text!r}")
        return int(value)

    def truth(self, column: str) -> bool | None:
        text = self.cells[column]
        if text.lower() not in _TRUTH:
            raise ConfigError(f"{column} must be true, yes, 1, false, no, 0 or empty, got {text!r}")
        return _TRUTH[text.lower()]

    def norm(self) -> str | None:
        """`Linf`, `L-inf`, `inf`, `L2`, `2` ... as one of `NORMS`; None if empty."""
        text = self.cells["norm"]
        plain = text.lower().replace("\u221e", "inf").replace("\u2113", "l")
        plain = re.sub(r"[_ {}\\$^]", "", plain)
        plain = re.sub(r"^l-?", "", plain).removesuffix(".0")
        norm = {"infty": "inf", "infinity": "inf"}.get(plain, plain) or None
        if norm not in (None, *NORMS):
            raise ConfigError(f"norm must be {', '.join(NORMS)} or empty, got {text!r}")
        return norm

    def claim(self, line: int) -> Claim:
        if not all(self.cells[key] for key in ("accuracy", "attack", "method")):
            raise ConfigError("method, attack and accuracy must not be empty")
        accuracy, decimals, spread, counted = self.accuracy()
        key, norm, eps = attack_key(self.cells["attack"]), self.norm(), self.eps()
        # in L-inf a radius above 1 is surely meant in levels of 255
        if norm == "inf" and eps is not None:
            check_linf(eps)
        num_images, aware = self.count("num_images"), self.truth("aware")
        if counted is not None and num_images not in (None, counted):
            raise ConfigError(f"accuracy counts {counted} images, but num_images is {num_images}")
        return Claim(
            where=f"line {line}",
            dataset=self.cells["dataset"],
            method=self.cells["method"],
            attack=self.cells["attack"],
            key=key,
            accuracy=accuracy,
            decimals=decimals,
            spread=spread,
            norm=norm,
            eps=eps,
            num_images=num_images or counted,
            members=self.count("members"),
            randomized=self.truth("randomized"),
            aware=knows_the_draw(key) if aware is None else aware,
            # with a stated eps even CW counts as bounded: papers score it at a given distortion
            bounded=eps is not None or key not in UNBOUNDED,
        )


def _bare(text: str) -> str:
    """A figure without percent sign, TeX commands and spaces."""
    return re.sub(r"\\?%", "", text).replace("$", "").strip()
