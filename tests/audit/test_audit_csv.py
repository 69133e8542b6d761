"""Tables as people type them: how cells are read, and what contradicts itself."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from redefense.audit.attack_names import squeezed, steps_of
from redefense.audit.audit import Finding, audit
from redefense.audit.csv_table import COLUMNS, read_csv
from redefense.errors import DataError

HEADER = ",".join(COLUMNS)


def write(folder: Path, rows: Sequence[str], header: str = HEADER) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def found(folder: Path, *rows: str, randomized: str = "false") -> dict[str, str]:
    """Severity by id of findings about rows `attack,accuracy[,eps[,method]]` on 1000 images."""
    lines = []
    for row in rows:
        attack, accuracy, eps, method, *_ = [*row.split(","), "", ""]
        budget = f"inf,{eps or '8/255'}" if attack != "clean" else ","
        lines.append(f"1,C,{method or 'ours'},{attack},{accuracy},{budget},1000,1,{randomized}")
    return {f.id: f.severity for f in audit(write(folder, lines))}


@pytest.mark.parametrize(
    ("written", "accuracy", "spread"),
    [
        ("878/1000", 87.8, None), ("0/1000", 0.0, None), ("1000 / 1000", 100.0, None),
        ("87.8", 87.8, None), ("87.8%", 87.8, None), ("87.8 \\%", 87.8, None),
        ("87.8\u00b10.3", 87.8, 0.3), ("87.8 +- 0.3", 87.8, 0.3), ("87.8 +/- 0.3 %", 87.8, 0.3),
        ("$87.8 \\pm 0.3$", 87.8, 0.3), ("87.8% \u00b1 0.3%", 87.8, 0.3), ("0.5/1", None, None),
        ("1001/1000", None, None), ("3/0", None, None), ("87.8\u00b1", None, None),
        ("87.8\u00b10.3\u00b10.1", None, None), ("87.8\u00b1-1", None, None), ("-1/10", None, None),
        ("87.8.1", None, None), ("nan", None, None), ("inf", None, None),
        ("878/1000\u00b11", None, None), ("87.8 (\u00b10.3)", 87.8, 0.3),
        ("$87.8_{\\pm 0.3}$", 87.8, 0.3), ("87.8 (0.3)", None, None),
    ],
)  # fmt: skip
def test_an_accuracy_is_read_as_what_it_says_or_refused_by_line(
    tmp_path: Path, written: str, accuracy: float | None, spread: float | None
) -> None:
    path = write(tmp_path, [f"1,C,ours,clean,{written},,,1000,1,false"])
    if accuracy is None:
        with pytest.raises(DataError, match="line 2: accuracy must"):
            read_csv(path)
        return
    (claim,) = read_csv(path)
    assert claim.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert claim.spread == spread


@pytest.mark.parametrize("column", ["num_images", "members"])
def test_only_accuracies_are_counts_and_only_budgets_fractions(tmp_path: Path, column: str) -> None:
    values = {**dict.fromkeys(COLUMNS, ""), "method": "m", "attack": "PGD", "accuracy": "50"}
    rows = [",".join({**values, column: value}.values()) for value in ("20/2", "20")]
    with pytest.raises(DataError, match=f"line 2: {column} must be a number"):
        read_csv(write(tmp_path, rows))
    (claim,) = read_csv(write(tmp_path, [rows[1]]))
    assert getattr(claim, column) == 20


def test_a_count_says_how_many_images_and_contradicts_another_number(tmp_path: Path) -> None:
    (claim,) = read_csv(write(tmp_path, ["1,C,ours,clean,878/1000,,,,1,false"]))
    assert claim.num_images == 1000
    with pytest.raises(DataError, match=r"line 2: accuracy counts 1000 images, .* is 10000"):
        read_csv(write(tmp_path, ["1,C,ours,clean,878/1000,,,10000,1,false"]))


def test_counts_are_ranked_as_percentages_are(tmp_path: Path) -> None:
    assert found(tmp_path, "clean,878/1000", "PGD,511/1000", "AutoAttack,500/1000") == {}
    worse = found(tmp_path, "clean,878/1000", "PGD,51.1", "AutoAttack,650/1000")
    assert worse == {"autoattack-above-pgd": "error"}


def test_every_line_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = "1,C,ours,clean,87.8,,,1000,1,false"
    rows = [good, "1,C,ours,PGD,many,inf,8/255,1000,1,false", "", good,
            "1,C,ours,PGD,50,inf,8,1000,1,false", ",,,,,,,,,",
            "1,C,ours,PGD,50,inf,8/255,10.5,1,false"]  # fmt: skip
    with pytest.raises(DataError) as refused:
        read_csv(write(tmp_path, rows))
    first, *lines = str(refused.value).splitlines()
    assert first.endswith("table.csv: 3 lines cannot be read")
    assert [line.split(":")[0].strip() for line in lines] == ["line 3", "line 6", "line 8"]
    assert all(part in line for part, line in zip(("'many'", "8/255?", "10.5"), lines, strict=True))


def test_tabs_and_headers_in_other_letters_are_read_and_semicolons_refused(tmp_path: Path) -> None:
    rows = ["1,C,ours,clean,87.8,,,1000,1,false", "1,C,ours,PGD,51.1\u00b10.2,inf,8/255,1000,1,no"]
    claims = read_csv(write(tmp_path, rows))
    spaced = HEADER.title().replace(",", " , ")
    assert read_csv(write(tmp_path, ["", *rows], spaced)) != claims  # other line numbers alone
    assert read_csv(write(tmp_path, rows, spaced)) == claims
    tabs = write(tmp_path, [row.replace(",", "\t") for row in rows], HEADER.replace(",", "\t"))
    assert read_csv(tabs) == claims
    marks = write(tmp_path, [row.replace(",", ";") for row in rows], HEADER.replace(",", ";"))
    with pytest.raises(DataError, match="separates columns by semicolons"):
        read_csv(marks)
    with pytest.raises(DataError, match=r"line 2: accuracy .* '87,8' \(write 87.8\)"):
        read_csv(write(tmp_path, ['1,C,ours,clean,"87,8",,,1000,1,false']))
    with pytest.raises(DataError, match="more than one column eps"):
        read_csv(write(tmp_path, [row + ",8/255" for row in rows], f"{HEADER},eps"))


@pytest.mark.parametrize("first", ["0.03", "0.031", "8/255", "0.0314", "7.9/255"])
@pytest.mark.parametrize("second", ["0.03", "0.031", "8/255", "0.0314", "7.9/255"])
def test_budgets_that_mean_the_same_are_compared(tmp_path: Path, first: str, second: str) -> None:
    rows = (f"PGD,51.1,{first}", f"AutoAttack,65.3,{second}")
    assert found(tmp_path, *rows)["autoattack-above-pgd"] == "error"


@pytest.mark.parametrize(
    ("weaker", "stronger", "rule"),
    [
        ("PGD,50.0", "AutoAttack,60.0", "autoattack-above-pgd"),
        ("APGD,50.0", "AutoAttack,60.0", "autoattack-above-apgd"),
        ("FGSM,50.0", "PGD,60.0", "iterative-above-single-step"),
        ("Square,50.0", "PGD,60.0", "black-box-below-white-box"),
    ],
)
def test_a_stronger_attack_with_more_budget_leaves_no_more(
    tmp_path: Path, weaker: str, stronger: str, rule: str
) -> None:
    assert found(tmp_path, f"{weaker},4/255", f"{stronger},8/255") == {rule: "error"}
    assert found(tmp_path, f"{weaker},8/255", f"{stronger},4/255") == {}


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0c", "\x1c"])
def test_only_newlines_end_a_row(tmp_path: Path, mark: str) -> None:
    (claim,) = read_csv(write(tmp_path, [f"1,C,ours{mark}net,PGD,50.0,inf,8/255,1000,1,false"]))
    assert (claim.method, claim.accuracy, claim.where) == (f"ours{mark}net", 50.0, "line 2")


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"cannot read .*deep\.json"):
        audit(tmp_path / "deep.json")


def test_what_a_slightly_smaller_budget_explains_is_no_error(tmp_path: Path) -> None:
    # 0.03 is 4.4 % less than 8/255: worth at most 4.3 points of the 49 that are lost
    assert found(tmp_path, "PGD,51.1,8/255", "AutoAttack,53.0,0.03") == {}
    assert "autoattack-above-pgd" in found(tmp_path, "PGD,51.1,8/255", "AutoAttack,56.0,0.03")
    assert "autoattack-above-pgd" in found(tmp_path, "PGD,51.1,0.03", "AutoAttack,53.0,8/255")
    assert found(tmp_path, "PGD,51.1,8/255", "AutoAttack,56.0,7/255") == {}
    assert found(tmp_path, "PGD,51.1,0.031", "worst case,51.1,8/255") == {}
    assert "headline-above-attack" in found(tmp_path, "PGD,51.1,0.031", "worst case,60,8/255")


def test_spreads_are_added_to_what_chance_explains(tmp_path: Path) -> None:
    assert found(tmp_path, "PGD,51.10", "AutoAttack,52.90")["autoattack-above-pgd"] == "error"
    assert found(tmp_path, "PGD,51.10\u00b10.7", "AutoAttack,52.90\u00b10.7") == {}
    assert "autoattack-above-pgd" in found(
        tmp_path, "PGD,51.1\u00b10.2", "AutoAttack,52.9\u00b10.2"
    )
    # 51.07 % of 1000 images is no count, but may be a mean
    assert found(tmp_path, "PGD,51.07")["impossible-share"] == "error"
    assert found(tmp_path, "PGD,51.07 +- 0.00") == {}


@pytest.mark.parametrize(
    ("rows", "severity"),
    [
        (("PGD,51.1", "PGD,55.3"), "error"),
        (("PGD,51.1", "pgd,51.3"), "note"),
        (("PGD-20,51.1", "PGD 20,55.3"), "error"),
        (("clean,87.8", "natural,80.0"), "error"),
        (("PGD,51.1", "PGD,51"), None),  # rounded
        (("PGD,51.1", "PGD,51.1"), None),
        (("PGD-20,51.1", "PGD-10,55.3"), None),  # other attacks
        (("PGD,51.1,8/255", "PGD,55.3,4/255"), None),
        (("PGD,20.0,0.0314", "PGD,50.0,8/255"), "error"),  # one budget, written twice
        (("PGD,20.0,0.031", "PGD,50.0,0.03"), "error"),
        (("PGD,51.1,0.031", "PGD,51.5,0.03"), None),
        (("PGD,51.1\u00b12.5", "PGD,55.3\u00b12.5"), "note"),
        (("PGD,51.1,8/255,ours", "PGD,55.3,8/255,theirs"), None),
        (("PGD (10 restarts),51.1", "PGD (1 restart),55.3"), None),
    ],
)
def test_one_measurement_has_one_figure(
    tmp_path: Path, rows: tuple[str, ...], severity: str | None
) -> None:
    assert found(tmp_path, *rows).get("duplicates-differ") == severity


@pytest.mark.parametrize(
    ("rows", "severity"),
    [
        (("PGD-10,50.0", "PGD-100,55.0"), "error"),
        (("PGD (10 steps),50.0", "PGD100,55.0"), "error"),
        (("PGD-10,50.0", "PGD-100,50.8"), None),  # chance
        (("PGD-10,55.0", "PGD-100,50.0"), None),
        (("PGD-10,50.0,8/255", "PGD-100,55.0,4/255"), None),
        (("EOT-PGD-10,50.0", "EOT-PGD-20,55.0"), None),  # draws, it may be
        (("PGD-10,50.0", "BIM-100,55.0"), None),
        (("Square (1000 queries),50.0", "Square (5000 queries),55.0"), "error"),
        (("10-step PGD,50.0", "100-step PGD,55.0"), "error"),
        (("PGD$_{10}$,50.0", "PGD$_{100}$,55.0"), "error"),
        (("PGD-10,50.0,4/255", "PGD-100,55.0,8/255"), "error"),
    ],
)
def test_more_steps_leave_no_more(
    tmp_path: Path, rows: tuple[str, ...], severity: str | None
) -> None:
    assert found(tmp_path, *rows).get("rises-with-steps") == severity


@pytest.mark.parametrize(
    ("name", "steps"),
    [("PGD-20", 20), ("PGD20", 20), ("PGD (20 steps)", 20), ("PGD^{20}", 20), ("PGD\u201120", 20),
     ("PGD (20)", 20), ("APGD-CE-100", 100), ("PGD", None), ("DI2-FGSM", None), ("PGD-L2", None),
     ("20-step PGD", 20), ("PGD$_{20}$", 20), ("1000 queries Square", 1000),
     ("PGD-EoT20", None), ("APGD (EoT-20)", None), ("PGD (eps 8/255)", None)],
)  # fmt: skip
def test_steps_are_read_from_a_name(name: str, steps: int | None) -> None:
    assert steps_of(name) == steps


@pytest.mark.parametrize(
    ("first", "second"),
    [("RED", "red"), ("PS-RED", "ps red"), ("RED", " RED "), ("M\u00fcller", "Mu\u0308ller"),
     ("PS-RED", "PS\u2013RED"), ("RED", "\uff32\uff25\uff24"), ("AT\u00a0big", "AT big")],
)  # fmt: skip
def test_names_of_one_method_in_several_spellings_are_one_with_a_note(
    tmp_path: Path, first: str, second: str
) -> None:
    severities = found(tmp_path, f"PGD,51.1,,{first}", f"AutoAttack,65.3,,{second}")
    if first.strip() == second.strip():  # cells have no outer spaces
        assert severities == {"autoattack-above-pgd": "error"}
    else:
        assert severities == {"autoattack-above-pgd": "error", "spelling": "note"}


def test_names_that_differ_in_more_are_several_methods(tmp_path: Path) -> None:
    assert len({squeezed(name) for name in ("AT", "AT+", "AT*", "AT2", "\u00c4T")}) == 5
    findings: list[Finding] = audit(
        write(tmp_path, [f"1,C,{name},PGD,50,inf,8/255,1000,1,false" for name in ("AT", "AT+")])
    )
    assert findings == []
