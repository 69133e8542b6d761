"""Findings of the audit: one reason to doubt one or more figures each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from redefense.audit.table import Claim, Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One violation of a rule.

    Attributes:
        id: of the rule: a key of `RULES`, or a rule that needs more than figures.
        severity: `error` if the claim cannot hold as stated, `note` for a remark.
        subject: the data set and method.
        rows: the figures and their positions.
        figures: the numbers that the rule compared, accuracies in percent.
        why: the reason, one sentence.
    """

    id: str
    severity: Literal["error", "note"]
    subject: str
    rows: tuple[str, ...]
    figures: Mapping[str, float]
    why: str

    def __str__(self) -> str:
        rows = f" [{', '.join(self.rows)}]" if self.rows else ""
        return f"{self.severity} {self.id}: {self.subject}{rows}: {self.why}"


def finding_about(
    group: Group, rows: Sequence[Claim], why: str, severity: Literal["error", "note"] = "error"
) -> Finding:
    """A finding without the id of its rule, which `findings_of` adds."""
    # two rows of one attack need different keys in `figures`
    unique = len({claim.attack for claim in rows}) == len(rows)
    return Finding(
        id="",
        severity=severity,
        subject=group.subject or "claim",
        rows=tuple(str(claim) for claim in rows),
        figures={c.attack if unique else c.where: c.accuracy for c in rows},
        why=why,
    )
