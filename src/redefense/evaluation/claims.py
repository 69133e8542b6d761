"""Claims of robustness as rows: typed in from a paper, or taken from an evaluation of ours."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from redefense.config import check_linf
from redefense.errors import ConfigError, DataError
from redefense.evaluation.names import HEADLINES, UNBOUNDED, attack_key, knows_the_draw
from redefense.evaluation.records import Evaluation

COLUMNS = (
    "table", "dataset", "method", "attack", "accuracy", "norm", "eps", "num_images", "members",
    "randomized",
)  # fmt: skip

OPTIONAL = ("aware",)
"""Columns that a table may have besides."""

NORMS = ("inf", "2", "1", "0")

_TRUTH = {"": None, "true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One figure somebody states.

    Attributes:
        where: how to find it, e.g. `line 5`.
        key: the attack's name in lower case without punctuation, steps and synonyms.
        accuracy: in percent.
        decimals: digits stated after the point; None for a figure that was not typed.
        norm, eps: the budget; None where unstated.
        view: what the attacker queried; empty where unstated.
        aware: whether the attacker knows that answers are drawn; None where neither the table
            nor the attack's name tells.
        bounded: whether an eps bounds the attack.
    """

    where: str
    dataset: str
    method: str
    attack: str
    key: str
    accuracy: float
    decimals: int | None = None
    norm: str | None = None
    eps: float | None = None
    num_images: int | None = None
    members: int | None = None
    randomized: bool | None = None
    view: str = ""
    aware: bool | None = False
    bounded: bool = True

    @property
    def is_attack(self) -> bool:
        return self.key != "clean" and self.key not in HEADLINES

    @property
    def budget(self) -> tuple[str | None, float | None]:
        return self.norm, self.eps

    def __str__(self) -> str:
        digits = 2 if self.decimals is None else self.decimals
        return f"{self.where}: {self.attack} {self.accuracy:.{digits}f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All that is claimed of one method on one data set: the claims that must agree."""

    subject: str
    claims: tuple[Claim, ...]

    @property
    def clean(self) -> Claim | None:
        return next((c for c in self.claims if c.key == "clean"), None)

    @property
    def attacks(self) -> tuple[Claim, ...]:
        return tuple(c for c in self.claims if c.is_attack)

    @property
    def randomized(self) -> bool | None:
        said = [c.randomized for c in self.claims if c.randomized is not None]
        return any(said) if said else None

    @property
    def num_members(self) -> int:
        """The most that is stated; 1 if nothing is."""
        return max((c.members or 1 for c in self.claims), default=1)

    def named(self, keys: Iterable[str]) -> tuple[Claim, ...]:
        wanted = frozenset(keys)
        return tuple(c for c in self.claims if c.key in wanted)


def grouped(claims: Sequence[Claim]) -> list[Group]:
    """Claims about the same method and data set, in the order of their first row.

    The table does not separate them: what one paper says of one model in two tables must agree.
    """
    groups: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        groups.setdefault((claim.dataset, claim.method), []).append(claim)
    return [
        Group(subject=" ".join(part for part in key if part), claims=tuple(rows))
        for key, rows in groups.items()
    ]


def read_csv(path: Path) -> list[Claim]:
    """Claims of a CSV with the columns `COLUMNS`; accuracies in percent, empty where unstated.

    A column `aware` may say whose attacker knows of the draw, whatever the attack's name.

    Raises:
        DataError: naming the line, column and value that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    reader = csv.DictReader(text.splitlines(), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from None
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}")
    if not rows:
        raise DataError(f"{path} states no figure")
    return [_claim(path, line, row) for line, row in rows]


def _claim(path: Path, line: int, row: dict[str, str | None]) -> Claim:
    values = {column: (row.get(column) or "").strip() for column in (*COLUMNS, *OPTIONAL)}
    if None in row:
        raise DataError(f"{path} line {line} has more cells than columns")

    def number(column: str, low: float, high: float) -> float | None:
        text = values[column].removesuffix("%").strip()
        if not text:
            return None
        try:
            above, _, below = text.partition("/")  # `8/255` is how budgets are written
            value = float(above) / (float(below) if below else 1.0)
        except (ValueError, ZeroDivisionError):
            value = float("nan")
        if not low <= value <= high:
            raise DataError(
                f"{path} line {line}: {column} must be a number from {low:g} to {high:g}, "
                f"got {values[column]!r}"
            )
        return value

    def count(column: str) -> int | None:
        value = number(column, 1.0, 1e12)
        if value is not None and value != int(value):
            raise DataError(f"{path} line {line}: {column} must be whole, got {values[column]!r}")
        return None if value is None else int(value)

    def truth(column: str) -> bool | None:
        text = values[column]
        if text.lower() not in _TRUTH:
            raise DataError(
                f"{path} line {line}: {column} must be true, yes, 1, false, no, 0 or empty, "
                f"got {text!r}"
            )
        return _TRUTH[text.lower()]

    accuracy = number("accuracy", 0.0, 100.0)
    if accuracy is None or not values["attack"] or not values["method"]:
        raise DataError(f"{path} line {line}: method, attack and accuracy must be given")
    key, eps, aware = attack_key(values["attack"]), number("eps", 0.0, 1e9), truth("aware")
    norm = _norm(values["norm"])
    if norm not in (None, *NORMS):
        raise DataError(
            f"{path} line {line}: norm must be {', '.join(NORMS)} or empty, got {values['norm']!r}"
        )
    if norm == "inf" and eps is not None:
        try:
            check_linf(eps, f"{path} line {line}: L-inf eps")
        except ConfigError as error:
            raise DataError(str(error)) from None
    return Claim(
        where=f"line {line}",
        dataset=values["dataset"],
        method=values["method"],
        attack=values["attack"],
        key=key,
        accuracy=accuracy,
        decimals=len(values["accuracy"].removesuffix("%").strip().partition(".")[2]),
        norm=norm,
        eps=eps,
        num_images=count("num_images"),
        members=count("members"),
        randomized=truth("randomized"),
        aware=knows_the_draw(key) if aware is None else aware,
        bounded=eps is not None or key not in UNBOUNDED,
    )


def _norm(text: str) -> str | None:
    """`Linf`, `L-inf`, `inf`, `L2`, `2` ... as one of `NORMS`; None if empty, else as written."""
    plain = text.lower().replace("\u221e", "inf").replace("\u2113", "l")
    plain = re.sub(r"[-_ {}\\]", "", plain).removeprefix("l").removesuffix(".0")
    return {"infty": "inf", "infinity": "inf"}.get(plain, plain) or None


def of_evaluation(evaluation: Evaluation) -> list[Claim]:
    """What a stored evaluation claims: its clean accuracy and every cell's expected accuracy."""
    clean = evaluation.clean
    num_members = len(clean.per_member) or len(evaluation.mixture or ()) or None
    method = str(evaluation.run.get("name") or f"suite {evaluation.suite}")
    randomized = evaluation.randomized
    if randomized is None and num_members is not None:  # stored before this was told
        randomized = num_members > 1

    def claim(where: str, attack: str, accuracy: float) -> Claim:
        return Claim(
            where=where,
            dataset=evaluation.data.name,
            method=method,
            attack=attack,
            key=attack_key(attack),
            accuracy=100 * accuracy,
            num_images=evaluation.data.num_images,
            members=num_members,
            randomized=randomized,
        )

    claims = [] if clean.expected is None else [claim("clean", "clean", clean.expected)]
    for cell in evaluation.cells:
        if cell.accuracy.expected is None or cell.attack == "clean":
            continue
        base = claim(cell.id, cell.attack, cell.accuracy.expected)
        threat = cell.threat if cell.bounded else None
        claims.append(
            replace(
                base,
                norm=threat.norm if threat is not None else None,
                eps=threat.eps if threat is not None else None,
                view=cell.view,
                aware=cell.aware,
                bounded=cell.bounded,
            )
        )
    return claims
