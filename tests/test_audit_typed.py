"""The audit of typed tables: whose attacker knows of the draw, and budgets that cannot be meant."""

import re
from pathlib import Path

import pytest

from redefense.evaluation.audit import Finding, audit
from redefense.evaluation.claims import COLUMNS, OPTIONAL
from redefense.evaluation.names import AWARE, attack_key

ROOT = Path(__file__).parents[1]


def typed(folder: Path, *rows: str, header: str = ",".join(COLUMNS)) -> list[Finding]:
    """Findings about rows `attack,accuracy,norm,eps,num_images,members,randomized[,aware]`."""
    path = folder / "table.csv"
    path.write_text("\n".join([header, *(f"1,CIFAR-10,ours,{row}" for row in rows)]) + "\n")
    return audit(path)


def beside_pgd(folder: Path, attack: str, aware: str | None = None) -> dict[str, str]:
    """Severity by id of what is found about PGD and a stronger attack on a random ensemble."""
    column = "" if aware is None else f",{aware}"
    findings = typed(
        folder,
        "clean,87.8,,,10000,8,true" + column.replace(str(aware), ""),
        "PGD,51.1,inf,0.03,10000,8,true" + column.replace(str(aware), ""),
        f"{attack},40.0,inf,0.03,10000,8,true{column}",
        header=",".join(COLUMNS if aware is None else (*COLUMNS, *OPTIONAL)),
    )
    return {f.id: f.severity for f in findings}


@pytest.mark.parametrize(
    "attack",
    ["AutoAttack-rand", "AutoAttack (rand)", "white-box adaptive", "ARC", "hinge-20",
     "meanprob_pgd", "exact EoT"],
)  # fmt: skip
def test_attacks_made_for_the_draw_count_by_name(tmp_path: Path, attack: str) -> None:
    assert beside_pgd(tmp_path, attack) == {}


@pytest.mark.parametrize("attack", ["EOT-PGD", "BPDA+EOT", "EoT", "APGD (EoT-20)"])
def test_an_average_over_draws_counts_only_where_the_table_says_so(
    tmp_path: Path, attack: str
) -> None:
    assert beside_pgd(tmp_path, attack)["unaware-only"] == "error"
    assert "unaware-only" not in beside_pgd(tmp_path, attack, aware="true")


@pytest.mark.parametrize("attack", ["transfer", "AutoAttack (standard)", "PGD-L2", "NI-FGSM"])
def test_names_of_attacks_that_ignore_the_draw_do_not_count(tmp_path: Path, attack: str) -> None:
    # in papers `transfer` is an attack on a surrogate, which knows less than PGD does
    assert beside_pgd(tmp_path, attack)["unaware-only"] == "error"


@pytest.mark.parametrize("attack", ["adaptive PGD", "OurAttack"])
def test_of_an_unknown_attack_nobody_can_tell_whether_it_knows_the_draw(
    tmp_path: Path, attack: str
) -> None:
    named = {"unknown-attack": "note"}
    assert beside_pgd(tmp_path, attack) == {"unaware-only": "note"} | named
    assert beside_pgd(tmp_path, attack, aware="") == {"unaware-only": "note"} | named
    assert beside_pgd(tmp_path, attack, aware="true") == named
    assert beside_pgd(tmp_path, attack, aware="false") == {"unaware-only": "error"} | named


def test_what_a_table_says_of_its_attackers_overrides_their_names(tmp_path: Path) -> None:
    assert beside_pgd(tmp_path, "MIM", aware="yes") == {}
    assert beside_pgd(tmp_path, "AutoAttack-rand", aware="no") == {"unaware-only": "error"}


def test_an_unknown_attack_that_beats_the_aware_ones_may_be_aware_itself(tmp_path: Path) -> None:
    rows = ("hinge,45.0,inf,0.03,10000,8,true", "Ours,30.0,inf,0.03,10000,8,true")
    assert {f.id for f in typed(tmp_path, *rows)} == {"unknown-attack"}


def test_members_of_whom_it_is_not_said_whether_one_is_drawn_are_noted(tmp_path: Path) -> None:
    clean, pgd = "clean,87.8,,,10000,{0},{1}", "PGD,51.1,inf,0.03,10000,{0},{1}"

    def found(members: str, randomized: str, *more: str) -> list[tuple[str, str]]:
        rows = [row.format(members, randomized) for row in (clean, pgd, *more)]
        return [(f.id, f.severity) for f in typed(tmp_path, *rows)]

    assert found("8", "") == [("draw-unstated", "note")]
    assert found("8", "", "ARC,40.0,inf,0.03,10000,{0},{1}") == []  # who knows the draw was asked
    assert found("1", "") == found("", "") == []
    assert found("8", "true") == [("unaware-only", "error")]
    assert found("8", "false") == [("draw-denied", "note")]
    (finding,) = typed(tmp_path, clean.format(8, ""), pgd.format(8, ""))
    assert "one of the 8 members is drawn" in finding.why


def test_the_page_lists_the_names_that_count() -> None:
    page = (ROOT / "docs" / "audit.md").read_text()
    (row,) = re.findall(r"^\| of whom knows[^|]*\|([^|]*)\|", page, re.MULTILINE)
    assert {attack_key(name) for name in re.findall(r"`([^`]+)`", row)} == AWARE
