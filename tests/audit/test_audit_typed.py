"""The audit of typed tables: whose attacker knows of the draw, and budgets that cannot be meant."""

import re
from pathlib import Path

import pytest

from redefense.audit.attack_names import AWARE, attack_key
from redefense.audit.audit import Finding, audit
from redefense.audit.csv_table import COLUMNS, OPTIONAL, read_csv
from redefense.errors import DataError

ROOT = Path(__file__).parents[2]


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


def test_a_random_start_is_no_random_answer_and_a_clean_row_no_attack(tmp_path: Path) -> None:
    assert attack_key("PGD (rand init)") == attack_key("PGD (rand)") == "pgd"
    assert attack_key("Auto-PGD") == "apgd"
    assert attack_key("AutoAttack [12]") == attack_key("AA [Croce et al.]") == "autoattack"
    assert attack_key("PGD-CE") == "pgd"
    assert {attack_key(n) for n in ("No attack", "benign", "Clean acc.")} == {"clean"}
    # whatever it means: a row without an eps, beside one with, is no attacker who knew
    rows = [
        "clean,87.8,,,10000,8,true", "PGD,51.1,inf,0.03,10000,8,true", "Top-1,86.0,,,10000,8,true",
    ]  # fmt: skip
    found = {f.id: f.severity for f in typed(tmp_path, *rows)}
    assert found["unaware-only"] == "error"


@pytest.mark.parametrize(
    ("eps", "severity"), [("0.03", "note"), ("0.015", "note"), ("0.12", "error")]
)
def test_an_aware_attack_excuses_others_of_its_budget_or_a_larger_one(
    tmp_path: Path, eps: str, severity: str
) -> None:
    rows = [
        "clean,87.8,,,10000,8,true", f"ARC,20.0,inf,{eps},10000,8,true",
        "APGD,45.0,inf,0.03,10000,8,true", "AutoAttack,60.0,inf,0.03,10000,8,true",
    ]  # fmt: skip
    found = {f.id: f.severity for f in typed(tmp_path, *rows)}
    assert found["autoattack-above-apgd"] == severity


@pytest.mark.parametrize("attack", ["adaptive PGD", "OurAttack"])
def test_whether_an_unknown_attack_knows_the_draw_is_unknown(tmp_path: Path, attack: str) -> None:
    named = {"unknown-attack": "note"}
    assert beside_pgd(tmp_path, attack) == {"unaware-only": "note"} | named
    assert beside_pgd(tmp_path, attack, aware="") == {"unaware-only": "note"} | named
    assert beside_pgd(tmp_path, attack, aware="true") == named
    assert beside_pgd(tmp_path, attack, aware="false") == {"unaware-only": "error"} | named


def test_knowledge_stated_in_a_table_overrides_the_names_of_attacks(tmp_path: Path) -> None:
    assert beside_pgd(tmp_path, "MIM", aware="yes") == {}
    assert beside_pgd(tmp_path, "AutoAttack-rand", aware="no") == {"unaware-only": "error"}


def test_an_unknown_attack_that_beats_the_aware_ones_may_be_aware_itself(tmp_path: Path) -> None:
    rows = ("hinge,45.0,inf,0.03,10000,8,true", "Ours,30.0,inf,0.03,10000,8,true")
    assert {f.id for f in typed(tmp_path, *rows)} == {"unknown-attack"}


def test_a_note_says_if_a_table_does_not_state_whether_a_member_is_drawn(tmp_path: Path) -> None:
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
    assert "one of the 8 members at random" in finding.why


@pytest.mark.parametrize(
    ("norm", "eps", "rule"),
    [
        ("inf", "8", r"line 3: L-inf eps must lie in \[0, 1\] .* got 8 \(did you mean 8/255\?\)"),
        ("L-inf", "8", "did you mean 8/255"),
        ("\u2113\u221e", "300", "got 300$"),  # no number of levels either
        ("L3", "0.5", "line 3: norm must be inf, 2, 1, 0 or empty, got 'L3'"),
        ("max", "0.5", "norm must be .* got 'max'"),
        ("-2", "0.5", "norm must be .* got '-2'"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused_by_line(
    tmp_path: Path, norm: str, eps: str, rule: str
) -> None:
    with pytest.raises(DataError, match=rule):
        typed(tmp_path, "clean,90.0,,,10000,1,false", f"PGD,40.0,{norm},{eps},10000,1,false")


@pytest.mark.parametrize("norm", ["inf", "Linf", "L-inf", "l_inf", "L_{\\infty}", "\u2113\u221e"])
def test_a_norm_may_be_written_in_all_usual_ways(tmp_path: Path, norm: str) -> None:
    # only figures in the same norm are compared
    rows = (f"PGD,40.0,{norm},8/255,10000,1,false", "AutoAttack,45.0,inf,8/255,10000,1,false")
    assert [f.id for f in typed(tmp_path, *rows)] == ["autoattack-above-pgd"]


def test_a_budget_that_we_cannot_try_is_noted_and_judged(tmp_path: Path) -> None:
    def found(norm: str) -> list[tuple[str, str]]:
        rows = (f"PGD,40.0,{norm},12,10000,1,false", f"AutoAttack,45.0,{norm},12,10000,1,false")
        return [(f.id, f.severity) for f in typed(tmp_path, *rows)]

    above = ("autoattack-above-pgd", "error")
    assert found("L2") == [above]
    assert found("L1") == found("0") == [above, ("other-norm", "note")]
    assert found("") == [above, ("norm-unstated", "note")]


@pytest.mark.parametrize(
    ("rows", "severity"),
    [
        (("clean,0.878", "PGD,0.511"), "error"),  # a network that is right on 1 in 114 is none
        (("PGD,0.511", "MIM,0.6"), "note"),
        (("clean,1", "PGD,0.511"), "error"),
        (("clean,60.1", "PGD,0.5"), None),  # an undefended network
        (("PGD,0.00", "MIM,0"), None),
    ],
)
def test_figures_that_look_like_fractions_are_reported(
    tmp_path: Path, rows: tuple[str, ...], severity: str | None
) -> None:
    findings = typed(tmp_path, *(f"{row},inf,8/255,,1,false" for row in rows))
    listed = [f for f in findings if f.id == "fractions"]
    assert [f.severity for f in listed] == ([] if severity is None else [severity])
    assert all("percent" in f.why for f in listed)


def test_the_sound_randomized_table_passes_for_the_sake_of_its_aware_attacks(
    tmp_path: Path,
) -> None:
    path = ROOT / "src/redefense/audit/examples/sound_randomized_table.csv"
    assert audit(path) == []
    header, *lines = path.read_text().splitlines()
    assert all(line.startswith("invented example,") for line in lines)
    claims = read_csv(path)
    assert any(c.randomized for c in claims)
    unaware = [line for line, c in zip(lines, claims, strict=True) if not c.aware]
    (tmp_path / "table.csv").write_text("\n".join([header, *unaware]))
    assert [f.id for f in audit(tmp_path / "table.csv")] == ["unaware-only"]


def test_a_claim_file_is_distinguished_from_an_evaluation() -> None:
    files = sorted((ROOT / "claims").glob("*.json"))
    assert files
    for file in files:
        advice = f"is a claim file, not an evaluation: check it with `redefense claim check {file}`"
        with pytest.raises(DataError, match=advice):
            audit(file)


def test_the_page_lists_the_names_that_count() -> None:
    page = (ROOT / "docs" / "audit.md").read_text()
    (row,) = re.findall(r"^\| knows of the draw[^|]*\|([^|]*)\|", page, re.MULTILINE)
    assert {attack_key(name) for name in re.findall(r"`([^`]+)`", row)} == AWARE


def errors(folder: Path, *rows: str) -> set[str]:
    return {f.id for f in typed(folder, *rows) if f.severity == "error"}


def test_a_headline_is_held_against_what_it_sums_up_alone(tmp_path: Path) -> None:
    clean = "clean,85.0,,,10000,1,false"
    figures = {"headline-unaware": 55.0, "ARC": 41.0, "PGD": 55.0, "headline-aware": 41.0}
    pair = [f"{name},{value},inf,8/255,10000,8,true" for name, value in figures.items()]
    assert errors(tmp_path, "clean,85.0,,,10000,8,true", *pair) == set()
    swept = ("AutoAttack,50.0,inf,8/255,10000,1,false", "worst case,50.0,inf,8/255,10000,1,false")
    assert errors(tmp_path, clean, *swept, "PGD,20.0,inf,16/255,10000,1,false") == set()
    assert errors(tmp_path, clean, *swept, "PGD,10.0,2,3,10000,1,false") == set()
    assert errors(tmp_path, clean, *swept, "PGD,49.0,inf,8/255,10000,1,false") == {
        "headline-above-attack", "autoattack-above-pgd",
    }  # fmt: skip


@pytest.mark.parametrize("eps", ["0.5/255", "0.001/255"])
def test_an_aware_attack_of_a_smaller_budget_excuses_no_other(tmp_path: Path, eps: str) -> None:
    rows = ("clean,85.0,,,10000,8,true", "PGD,65.0,inf,8/255,10000,8,true")
    assert errors(tmp_path, *rows, f"ARC,64.0,inf,{eps},10000,8,true") == {"unaware-only"}
    for enough in ("8/255", "16/255", ""):
        norm = "inf" if enough else ""
        assert errors(tmp_path, *rows, f"ARC,64.0,{norm},{enough},10000,8,true") == set()


@pytest.mark.parametrize(
    "name", ["Natural accuracy", "Standard accuracy", "Clean data", "Original"]
)
def test_clean_rows_by_their_usual_names(tmp_path: Path, name: str) -> None:
    assert attack_key(name) == "clean"
    assert errors(
        tmp_path, f"{name},87.8,,,,8,true", "PGD,51.1,,,,8,true", "FGSM,60.1,,,,8,true"
    ) == {"unaware-only"}


def test_fewer_steps_within_a_larger_budget_are_no_contradiction(tmp_path: Path) -> None:
    clean, short = "clean,85.0,,,10000,1,false", "PGD-3,46.0,inf,8/255,10000,1,false"
    found = typed(tmp_path, clean, "PGD-1000,44.0,inf,7/255,10000,1,false", short)
    assert [(f.id, f.severity) for f in found] == [("rises-with-eps", "note")]
    again = "PGD-3,44.0,inf,7/255,10000,1,false"
    assert errors(tmp_path, clean, again, short) == {"rises-with-eps"}
    bound = "C&W,84.8,inf,0.001,10000,1,false"
    assert errors(tmp_path, clean, bound) == set()
