"""Claims of robustness as rows, typed from a paper or read from a stored evaluation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from redefense.audit.attack_names import HEADLINES, attack_key, squeezed
from redefense.results.schema import Evaluation

SAME_EPS = 0.05
"""Relative difference of radii that count as equal, as 0.03, 0.031 and 8/255."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One stated figure.

    Attributes:
        where: its position, e.g. `line 5`.
        key: the attack's name in lower case without punctuation, steps and synonyms.
        accuracy: in percent.
        decimals: number of stated decimals; None for figures that were not typed and for counts of
            images.
        spread: the value after +-, in points; such a figure is a mean of several.
        norm, eps: the budget; None if unstated.
        view: the victim model of the attack; empty if unstated.
        aware: whether the attack is aware of the draw; None if neither the table nor the attack's
            name states it.
        bounded: whether the attack is bounded by eps.
        whole: whether the attack ran on all images; if not, its accuracy is that of the cascade up
            to it and is not compared with other attacks.
    """

    where: str
    dataset: str
    method: str
    attack: str
    key: str
    accuracy: float
    decimals: int | None = None
    spread: float | None = None
    norm: str | None = None
    eps: float | None = None
    num_images: int | None = None
    members: int | None = None
    randomized: bool | None = None
    view: str = ""
    aware: bool | None = False
    bounded: bool = True
    whole: bool = True

    @property
    def is_attack(self) -> bool:
        return self.key != "clean" and self.key not in HEADLINES

    def same_budget(self, other: "Claim") -> bool:
        """Whether both budgets are the same: equal norms, radii within `SAME_EPS`."""
        if self.norm != other.norm or self.eps is None or other.eps is None:
            return (self.norm, self.eps) == (other.norm, other.eps)
        return abs(self.eps - other.eps) <= SAME_EPS * max(self.eps, other.eps)

    def covers(self, other: "Claim") -> bool:
        """Whether both radii are stated, in one norm, and this one is at least as large."""
        known = self.eps is not None and other.eps is not None
        return known and self.norm == other.norm and (self.eps or 0) >= (other.eps or 0)

    def __str__(self) -> str:
        digits = 2 if self.decimals is None else self.decimals
        spread = "" if self.spread is None else f" +- {self.spread:g}"
        return f"{self.where}: {self.attack} {self.accuracy:.{digits}f}{spread}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """All claims about one method on one data set, which must be consistent."""

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
        stated = [c.randomized for c in self.claims if c.randomized is not None]
        return any(stated) if stated else None

    @property
    def num_members(self) -> int:
        """The largest stated number of members; 1 if none is stated."""
        return max((c.members or 1 for c in self.claims), default=1)

    def named(self, keys: Iterable[str]) -> tuple[Claim, ...]:
        """Attacks of these names that ran on all images, for comparison."""
        wanted = frozenset(keys)
        return tuple(c for c in self.claims if c.key in wanted and c.whole)


def grouped(claims: Sequence[Claim]) -> list[Group]:
    """Claims grouped by method and data set, in the order of their first row.

    Claims of several tables in one file are grouped together, since they must be consistent. Names
    that differ only by case, spaces, hyphens or Unicode form count as equal.
    """
    groups: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        groups.setdefault((squeezed(claim.dataset), squeezed(claim.method)), []).append(claim)
    return [
        Group(
            subject=" ".join(part for part in (rows[0].dataset, rows[0].method) if part),
            claims=tuple(rows),
        )
        for rows in groups.values()
    ]


def of_evaluation(evaluation: Evaluation) -> list[Claim]:
    """Claims of a stored evaluation: its clean accuracy and every cell's expected accuracy."""
    clean = evaluation.clean
    num_members = len(clean.per_member) or len(evaluation.mixture or ()) or None
    method = str(evaluation.run.get("name") or f"suite {evaluation.suite}")
    randomized = evaluation.randomized
    if randomized is None and num_members is not None:  # older evaluations do not record it
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
        # an unbounded attack is not limited by the threat that it ran at
        threat = cell.threat if cell.bounded else None
        claims.append(
            replace(
                base,
                norm=threat.norm if threat is not None else None,
                eps=threat.eps if threat is not None else None,
                view=cell.view,
                aware=cell.aware,
                bounded=cell.bounded,
                whole=cell.met in (None, evaluation.data.num_images),
            )
        )
    return claims
