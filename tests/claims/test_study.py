"""The workflow of a study: its configurations, its jobs, and the hours that stand in them."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import redefense
from redefense.config import Run, override
from redefense.evaluation.suite import suite_named
from redefense.recipes import recipe
from redefense.train.cost import passes_per_image, predict_run
from redefense.train.loading import resolve

STUDY = Path(redefense.__file__).parents[2] / "study"
STUDIES = sorted(STUDY.glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def run_of(row: dict[str, Any]) -> Run:
    return override(recipe(row["recipe"]), row.get("set", []))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_row_is_a_run_and_every_evaluation_a_suite(path: Path) -> None:
    study = read(path)
    for row in study["runs"].values():
        run, _, _ = resolve(run_of(row))
        assert run.data.spec.partition(":")[0] == row["data"]
        assert {*row["evaluations"], *row.get("once", [])} <= study["evaluations"].keys()
    for evaluation in study["evaluations"].values():
        name = evaluation["suite"]
        suite_named(str(STUDY / name) if name.endswith(".json") else name)


def test_the_small_suite_has_the_attacks_of_the_whole_one() -> None:
    small = suite_named(str(STUDY / "suites" / "aware-small.json"))
    (auto,) = (cell for cell in small.cells if cell.attack == "autoattack")
    assert auto.settings == {"steps": 50, "queries": 500}
    whole = {(cell.attack, cell.view) for cell in suite_named("aware").cells}
    assert {(cell.attack, cell.view) for cell in small.cells} == whole


def test_hours_are_those_that_are_predicted() -> None:
    study = read(STUDY / "digits.yaml")
    for name, row in study["runs"].items():
        run, _, _ = resolve(run_of(row))
        predicted = predict_run(row["recipe"], run, study["accelerator"])["hours"]["one device"]
        assert row["hours"] == pytest.approx(predicted, rel=0.1), name


def test_long_runs_cost_the_same() -> None:
    rows = [row for name, row in read(STUDY / "mini.yaml")["runs"].items() if "long-" in name]
    runs = [run_of(row) for row in rows]
    costs = [passes_per_image(run) * run.epochs * run.ensemble["num_members"] for run in runs]
    assert len(costs) == 4
    assert max(costs) < 1.03 * min(costs)


def snakemake(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "-s", str(STUDY / "Snakefile"), *words],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_dry_run_lists_what_is_left(tmp_path: Path) -> None:
    study = read(STUDY / "digits.yaml")
    rows = study["runs"].values()
    runs = sum(len(row["seeds"]) for row in rows)
    evaluations = sum(len(row["seeds"]) * len(row["evaluations"]) for row in rows)
    profile = str(STUDY / "profiles" / "local")
    words = ("--configfile", str(STUDY / "digits.yaml"), "--profile", profile, "-n", "-p")
    done = tmp_path / study["out"] / "runs" / "digits-red-0"
    for file in (done / "final" / "manifest.json", done / "evaluation" / "quick.json"):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    said = snakemake(tmp_path, *words)
    assert said.returncode == 0, said.stderr
    listed = Counter(re.findall(r"^rule (\w+):$", said.stdout, re.MULTILINE))
    assert listed == {
        "train": runs - 1, "evaluate": evaluations - 1, "claim": runs, "leaderboard": 1, "all": 1
    }  # fmt: skip
    assert "redefense train digits-vanilla --data digits  --seed 0 --device cpu" in said.stdout
    assert not any(tmp_path.rglob("claims"))


def test_a_study_that_lacks_something_is_refused_in_a_line(tmp_path: Path) -> None:
    nothing = snakemake(tmp_path, "-n")
    assert nothing.returncode != 0
    assert "the study lacks accelerator, data, evaluations, out, runs" in nothing.stdout
    (tmp_path / "study.yaml").write_text(
        (STUDY / "digits.yaml").read_text().replace("data: digits,", "data: digit,")
    )
    wrong = snakemake(tmp_path, "-n", "--configfile", "study.yaml")
    assert wrong.returncode != 0
    assert "has data 'digit'; there are digits" in wrong.stdout
