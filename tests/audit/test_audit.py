"""The audit: the paper's tables do not hold, a sound table does, and each rule says why."""

import dataclasses
import json
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from redefense.attacks import ATTACKS
from redefense.audit.attack_names import KNOWN, attack_key
from redefense.audit.audit import Finding, audit, exit_code
from redefense.audit.csv_table import COLUMNS, read_csv
from redefense.data import load_dataset
from redefense.errors import DataError
from redefense.rng import stream
from redefense.threat import Threat

EXAMPLES = Path(str(files("redefense.audit") / "examples"))
HEADER = ",".join(COLUMNS)


def table(folder: Path, *rows: str, randomized: str = "false", n: str = "10000") -> Path:
    """A CSV of `attack accuracy [eps]` rows about one method at linf 8/255."""
    lines = [HEADER]
    for row in rows:
        attack, accuracy, *eps = row.split()
        budget = "," if attack in ("clean", "CW", "DeepFool") else f"inf,{(eps or ['8/255'])[0]}"
        lines.append(f"1,CIFAR-10,ours,{attack},{accuracy},{budget},{n},1,{randomized}")
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def errors(findings: list[Finding]) -> set[str]:
    return {finding.id for finding in findings if finding.severity == "error"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red_table1", {"autoattack-above-pgd", "inert-attack", "above-clean", "unaware-only"}),
        ("red_table2", {"apgd-above-pgd", "unaware-only"}),
        ("red_table3", {"autoattack-above-pgd", "unaware-only"}),
    ],
)
def test_the_papers_tables_do_not_hold(name: str, expected: set[str]) -> None:
    findings = audit(EXAMPLES / f"{name}.csv")
    assert exit_code(findings) == 1
    assert errors(findings) == expected
    about_red = {f.id for f in findings if f.subject.startswith("CIFAR-10 RED")}
    assert expected <= about_red
    assert {"eps-unstated", "images-unstated"} <= {f.id for f in findings}


def test_the_papers_tables_contradict_each_other(tmp_path: Path) -> None:
    # the same models in two tables: what APGD broke in one, AutoAttack left in the other
    first = (EXAMPLES / "red_table1.csv").read_text()
    second = (EXAMPLES / "red_table2.csv").read_text().split("\n", 1)[1]
    (tmp_path / "both.csv").write_text(first + second)
    findings = audit(tmp_path / "both.csv")
    broken = {f.subject for f in findings if f.id == "autoattack-above-apgd"}
    assert broken == {"CIFAR-10 DVERGE", "CIFAR-10 RED", "CIFAR-10 PS-RED"}
    (adp,) = [f for f in findings if f.id == "eot-below-pgd" and "ADP" in f.subject]
    assert adp.severity == "note"  # whether that row is deterministic is not said
    assert adp.figures == {"PGD": 20.20, "EOT-PGD": 9.15}
    (red,) = [f for f in findings if f.id == "averaging-helps" and f.subject == "CIFAR-10 RED"]
    assert "6.9 points" in red.why


def test_the_shipped_tables_hold_the_papers_figures() -> None:
    claims = [c for i in (1, 2, 3) for c in read_csv(EXAMPLES / f"red_table{i}.csv")]
    assert len(claims) == 2 * 6 * 8 + 6 * 7 + 2 * 5
    found = {(c.dataset, c.method, c.key): c.accuracy for c in claims}
    assert found["CIFAR-10", "RED", "autoattack"] == 65.32
    assert found["TinyImageNet", "PS-RED", "deepfool"] == 33.72
    assert found["CIFAR-10", "PS-RED", "pixle"] == 54.23
    assert found["CIFAR-10", "RED (adversarial training)", "pgd"] == 61.12
    assert all(c.eps is None and c.num_images is None for c in claims)


def test_a_sound_table_passes_without_findings() -> None:
    assert audit(EXAMPLES / "sound_table.csv") == []
    assert exit_code([]) == 0


def test_the_sound_table_is_measured() -> None:
    data = load_dataset("digits")
    x, y = data.train.float().double(), data.train.labels.long()
    x_test, y_test = data.test.float().double(), data.test.labels.long()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, dtype=torch.float64))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=300, line_search_fn="strong_wolfe"
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 1e-3 * next(net[1].parameters()).square().sum()
        loss = F.cross_entropy(net(x), y) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    stated = {c.key: c.accuracy for c in read_csv(EXAMPLES / "sound_table.csv")}
    threat = Threat(norm=math.inf, eps=0.1)
    for name in stated.keys() - {"square", "autoattack"}:
        rng = stream(0, "sound", name)
        attacked = (
            x_test if name == "clean" else ATTACKS[name]()(net, x_test, y_test, threat, rng=rng)
        )
        right = (net(attacked).argmax(1) == y_test).double().mean().item()
        assert 100 * right == pytest.approx(stated[name], abs=1.0), name


GOOD = (
    "clean 87.14",
    "FGSM 61.06",
    "PGD-20 55.60",
    "APGD 54.90",
    "AutoAttack 51.50",
    "Square 60.12",
)


def test_a_table_as_published_for_a_deterministic_model_passes(tmp_path: Path) -> None:
    assert audit(table(tmp_path, *GOOD)) == []


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        (("clean 90.00", "APGD 40.00", "AutoAttack 45.00"), "autoattack-above-apgd"),
        (("clean 90.00", "PGD 40.00", "AutoAttack 45.00"), "autoattack-above-pgd"),
        (("clean 90.00", "PGD 40.00", "APGD 45.00"), "apgd-above-pgd"),
        (("clean 90.00", "FGSM 40.00", "PGD 45.00"), "iterative-above-single-step"),
        (("clean 90.00", "PGD 40.00", "Square 30.00"), "black-box-below-white-box"),
        (("clean 90.00", "PGD 40.00", "EOT-PGD 30.00"), "eot-below-pgd"),
        (("clean 90.00", "PGD 40.00", "CW 89.80"), "inert-attack"),
        (("clean 90.00", "PGD 91.00"), "above-clean"),
        (("clean 90.00", "PGD 40.00 4/255", "PGD 45.00 8/255"), "rises-with-eps"),
        (("clean 90.00", "PGD 40.00", "worst-case 41.00"), "headline-above-attack"),
        (("clean 90.00", "PGD 40.00", "CW 30.00", "headline 30.00"), "unbounded-in-headline"),
    ],
)
def test_each_impossible_order_is_found(tmp_path: Path, rows: tuple[str, ...], rule: str) -> None:
    findings = audit(table(tmp_path, *rows))
    assert rule in errors(findings)
    assert exit_code(findings) == 1
    (first, *_) = [f for f in findings if f.id == rule]
    assert first.subject == "CIFAR-10 ours"
    assert all(row.startswith("line ") for row in first.rows)
    assert first.why.endswith(".")


@pytest.mark.parametrize(
    "rows",
    [
        ("PGD 40.00", "AutoAttack 40.30"),  # a random start
        ("PGD 40.00 4/255", "AutoAttack 45.00 2/255"),  # another budget
        ("clean 90.00", "CW 5.00"),  # unbounded, but no headline
        ("clean 90.00", "PGD 40.00", "Pixle 1.00"),  # another kind of budget
    ],
)
def test_what_chance_or_another_budget_explains_is_no_error(
    tmp_path: Path, rows: tuple[str, ...]
) -> None:
    path = table(tmp_path, *rows)
    path.write_text(path.read_text().replace("Pixle,1.00,inf,8/255", "Pixle,1.00,,"))
    assert errors(audit(path)) == set()


def test_a_random_defence_needs_an_aware_attack(tmp_path: Path) -> None:
    unaware = audit(table(tmp_path, *GOOD, randomized="true"))
    assert errors(unaware) == {"unaware-only"}
    aware = audit(table(tmp_path, *GOOD, "arc 48.00", randomized="true"))
    assert errors(aware) == set()


def test_beside_a_harsher_aware_figure_a_filtered_one_is_a_note(tmp_path: Path) -> None:
    rows = ("clean 90.00", "PGD 50.00", "AutoAttack 65.00")
    alone = audit(table(tmp_path, *rows, randomized="true"))
    assert "autoattack-above-pgd" in errors(alone)
    beside = audit(table(tmp_path, *rows, "hinge 30.00", randomized="true"))
    assert errors(beside) == set()
    assert "autoattack-above-pgd" in {f.id for f in beside}


@pytest.mark.parametrize(
    ("row", "n", "severity"),
    [
        ("PGD 51.07", "10000", None),
        ("PGD 51.1", "1000", None),
        ("PGD 51.10", "1000", "note"),
        ("PGD 51.07", "100", "error"),
        ("PGD 51", "100", None),
    ],
)
def test_digits_finer_than_one_image(
    tmp_path: Path, row: str, n: str, severity: str | None
) -> None:
    findings = [f for f in audit(table(tmp_path, row, n=n)) if f.id == "too-few-images"]
    assert [f.severity for f in findings] == ([] if severity is None else [severity])


def test_a_share_that_no_count_gives_is_impossible_unless_answers_are_random(
    tmp_path: Path,
) -> None:
    assert "impossible-share" in errors(audit(table(tmp_path, "PGD 51.07", n="1000")))
    random = audit(table(tmp_path, "PGD 51.07", n="1000", randomized="true"))
    assert "impossible-share" not in errors(random)


@pytest.mark.parametrize(
    ("written", "key"),
    [("EOT-PGD", "eotpgd"), ("DI2-FGSM", "di2fgsm"), ("C&W", "cw"), ("PGD-20", "pgd"),
     ("PGD (20 steps)", "pgd"), ("AA", "autoattack"), ("Auto-Attack", "autoattack"),
     ("APGD-CE", "apgd"), ("PGD-L2", "pgd"), ("CW-Linf", "cw"), ("AA (standard)", "autoattack"),
     ("AutoAttack (rand)", "autoattackrand"), ("AutoAttack-rand", "autoattackrand"),
     ("AA (version rand, 8/255)", "autoattackrand"), ("PGD (random start)", "pgd"),
     ("PGD (EoT-20)", "eotpgd"), ("PGD (non-adaptive)", "pgd"), ("PGD-EoT20", "eotpgd"),
     ("white-box adaptive", "adaptive"), ("natural", "clean"), ("MI-FGSM", "mim"),
     ("PGD100", "pgd")],
)  # fmt: skip
def test_attacks_are_known_by_their_usual_names(written: str, key: str) -> None:
    assert attack_key(written) == key


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "has no columns table"),
        (HEADER, "has no figures"),
        (f"{HEADER}\n1,d,m,PGD,many,inf,0.03,10,1,false", "line 2: accuracy .* 'many'"),
        (f"{HEADER}\n1,d,m,PGD,120,inf,0.03,10,1,false", "from 0 to 100"),
        (f"{HEADER}\n1,d,m,PGD,12,inf,8/0,10,1,false", "eps"),
        (f"{HEADER}\n1,d,m,PGD,12,inf,1e99999,10,1,false", "eps"),
        (f"{HEADER}\n1,d,m,PGD,12,inf,0.03,1.5,1,false", "num_images must be a whole number"),
        (f"{HEADER}\n1,d,m,PGD,12,inf,0.03,10,1,maybe", "randomized"),
        (f"{HEADER}\n1,d,m,,12,inf,0.03,10,1,", "method, attack and accuracy"),
        (f"{HEADER}\n1,d,m,PGD,12,inf,0.03,10,1,,,", "more cells"),
        (f'{HEADER}\n1,d,m,"PGD,12', "line"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused_by_line(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=rule):
        audit(path)


def test_a_name_no_rule_knows_and_members_without_a_draw_are_noted(tmp_path: Path) -> None:
    (finding,) = audit(table(tmp_path, *GOOD, "MyAttack 52.00"))
    assert (finding.id, finding.severity) == ("unknown-attack", "note")
    assert list(finding.figures) == ["MyAttack"]
    path = table(tmp_path, *GOOD, randomized="no")
    path.write_text(path.read_text().replace(",1,no", ",8,no"))
    (finding,) = audit(path)
    assert (finding.id, finding.severity) == ("draw-denied", "note")
    assert finding.why.startswith("The 8 members are stated to answer without a draw")


def test_every_attack_of_ours_is_known_to_the_rules() -> None:
    assert {attack_key(name) for name in ATTACKS} <= KNOWN


def test_missing_files_and_empty_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        audit(tmp_path / "none.csv")
    with pytest.raises(DataError, match="holds no evaluation"):
        audit(tmp_path)


def evaluation(**changes: Any) -> dict[str, Any]:
    """A sound evaluation of a random ensemble of three."""

    def cell(name: str, *, aware: bool, expected: float, bounded: bool = True) -> dict[str, Any]:
        return {
            "id": name, "attack": name, "view": "members" if aware else "sampled",
            "aware": aware, "bounded": bounded, "threat": {"norm": "inf", "eps": 0.03},
            "accuracy": {"expected": expected, "worst_member": expected - 0.02,
                         "best_member": expected + 0.02, "any": expected + 0.1,
                         "all": expected - 0.1},
            "unchanged": 0.0,
        }  # fmt: skip

    document: dict[str, Any] = {
        "schema": 1, "suite": "quick", "run": {"name": "red"},
        "data": {"name": "digits", "split": "test", "num_images": 500},
        "clean": {"expected": 0.9, "per_member": [0.9, 0.9, 0.9]},
        "cells": [cell("pgd", aware=False, expected=0.5), cell("hinge", aware=True, expected=0.3),
                  cell("cw", aware=False, expected=0.15, bounded=False)],
        "headline": {"unaware": 0.5, "aware": 0.28},
        "checks": [{"id": "S01", "passed": True, "detail": "0"}],
    }  # fmt: skip
    return document | changes


def audit_of(folder: Path, document: dict[str, Any]) -> list[Finding]:
    path = folder / "red" / "evaluation" / "quick.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    findings = audit(path)
    assert findings == audit(folder / "red")
    return findings


def test_an_honest_evaluation_holds(tmp_path: Path) -> None:
    findings = audit_of(tmp_path, evaluation())
    assert errors(findings) == set()
    assert {f.id for f in findings} == {"unbounded-attack"}


def test_attacks_at_another_threat_than_that_of_the_headline_do_not_count(tmp_path: Path) -> None:
    document = evaluation()
    for radius, unaware in ((8 / 255, 0.46), (0.02, 0.26)):
        threat = {"norm": "inf", "eps": radius}
        accuracy = {"expected": unaware}
        cell = {**document["cells"][0], "id": str(radius), "threat": threat, "accuracy": accuracy}
        found = audit_of(tmp_path, {**document, "cells": [*document["cells"], cell]})
        # 8/255 counts as the 0.03 of the aware attack
        assert not errors(found) & {"headline-mismatch", "headline-above-attack", "unaware-only"}
    # without a stated threat it is that of the others
    unstated = {**cell, "threat": None}
    found = audit_of(tmp_path, {**document, "cells": [*document["cells"], unstated]})
    assert errors(found) == {"headline-mismatch", "headline-above-attack"}


def test_members_that_learnt_next_to_nothing_are_a_note(tmp_path: Path) -> None:
    def silent(**changes: Any) -> list[Finding]:
        clean = {"expected": 0.9, "per_member": [0.9, 0.1, 0.9]}
        found = audit_of(tmp_path, evaluation(clean=clean, **changes))
        return [f for f in found if f.id == "silent-member"]

    (finding,) = silent()
    assert finding.severity == "note"
    assert finding.figures == {"member": 10.0, "best": 90.0}
    assert "Member 1 has low clean accuracy" in finding.why
    assert silent(mixture=[0.5, 0.0, 0.5]) == []  # nobody meets it


@pytest.mark.parametrize(
    ("headline", "rule"),
    [
        ({"unaware": 0.5, "aware": 0.4}, "headline-above-attack"),
        ({"unaware": 0.25, "aware": 0.29}, "headlines-swapped"),
        ({"unaware": 0.15, "aware": 0.1}, "unbounded-in-headline"),
        ({"unaware": 0.45, "aware": 0.28}, "headline-mismatch"),
    ],
)
def test_a_headline_must_follow_from_its_cells(
    tmp_path: Path, headline: dict[str, float], rule: str
) -> None:
    assert rule in errors(audit_of(tmp_path, evaluation(headline=headline)))


def test_an_evaluation_without_aware_attack_claims_nothing(tmp_path: Path) -> None:
    document = evaluation(headline={"unaware": None, "aware": None})
    document["cells"] = document["cells"][:1]
    assert errors(audit_of(tmp_path, document)) == {"unaware-only"}
    document["headline"]["aware"] = 0.2
    assert "aware-without-attack" in errors(audit_of(tmp_path, document))


def test_impossible_orders_unchanged_images_and_red_checks_are_reported(tmp_path: Path) -> None:
    document = evaluation(checks=[{"id": "S34", "passed": False, "detail": "12 % unchanged"}])
    document["cells"][0]["accuracy"]["worst_member"] = 0.6
    document["cells"][0]["unchanged"] = 0.12
    found = {f.id: f.severity for f in audit_of(tmp_path, document)}
    assert found["impossible-order"] == "error"
    assert found["images-unchanged"] == "note"
    assert found["red-check"] == "note"


def test_records_that_contradict_their_summary_are_found(tmp_path: Path) -> None:
    document = evaluation()
    document["cells"][0]["per_image"] = "quick/pgd.npz"
    folder = tmp_path / "red" / "evaluation" / "quick"
    folder.mkdir(parents=True)
    np.savez(folder / "pgd.npz", correct=np.ones((3, 500), dtype=bool), index=np.arange(500))
    findings = audit_of(tmp_path, document)
    (finding,) = [f for f in findings if f.id == "records-contradict"]
    assert "per-image records give 1.0000" in finding.why


def test_findings_are_data_and_read_as_one_line(tmp_path: Path) -> None:
    (finding, *_) = audit(table(tmp_path, "clean 90.00", "PGD 40.00", "AutoAttack 45.00"))
    written = json.loads(json.dumps(dataclasses.asdict(finding)))
    assert written["id"] == "autoattack-above-pgd"
    assert written["figures"] == {"AutoAttack": 45.0, "PGD": 40.0}
    assert str(finding).startswith(
        "error autoattack-above-pgd: CIFAR-10 ours [line 4: AutoAttack 45.00, line 3: PGD 40.00]: "
    )


def test_the_audit_does_not_import_torch() -> None:
    code = "import redefense.audit.audit, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
