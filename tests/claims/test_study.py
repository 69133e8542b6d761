"""The workflow of a study: its configurations, its jobs, and the hours that stand in them."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
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


SEVERAL = """
import json, os, sys
from snakemake.cli import main

for number, words in enumerate(json.loads(sys.argv[1])):
    if not (child := os.fork()):
        os.dup2(os.open(f"{number}.txt", os.O_CREAT | os.O_WRONLY), 1)
        main(words)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def dry_runs(folder: Path, *several: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Exit codes and output of dry runs, forked from one process: to import snakemake is slow."""
    words = [["-s", str(STUDY / "Snakefile"), "-n", *more] for more in several]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, json.dumps(words)],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for number, code in enumerate(done.stdout.split()):
        yield int(code), (folder / f"{number}.txt").read_text()


def test_dry_runs_list_what_is_left_or_refuse_in_a_line_what_a_study_lacks(tmp_path: Path) -> None:
    study = read(STUDY / "digits.yaml")
    rows = study["runs"].values()
    runs = sum(len(row["seeds"]) for row in rows)
    evaluations = sum(len(row["seeds"]) * len(row["evaluations"]) for row in rows)
    done = tmp_path / study["out"] / "runs" / "digits-red-0"
    for file in (done / "final" / "manifest.json", done / "evaluation" / "quick.json"):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    (tmp_path / "study.yaml").write_text(
        (STUDY / "digits.yaml").read_text().replace("data: digits,", "data: digit,")
    )
    profile = str(STUDY / "profiles" / "local")
    begun, choice, nothing, wrong = dry_runs(
        tmp_path,
        ["--configfile", str(STUDY / "digits.yaml"), "--profile", profile, "-p"],
        ["--configfile", str(STUDY / "ingredients.yaml"), "-p"],
        [],
        ["--configfile", "study.yaml"],
    )
    code, said = begun
    assert code == 0, said
    listed = Counter(re.findall(r"^rule (\w+):$", said, re.MULTILINE))
    assert listed == {
        "train": runs - 1, "evaluate": evaluations - 1, "claim": runs, "leaderboard": 1, "all": 1
    }  # fmt: skip
    assert "redefense train digits-vanilla --data digits  --seed 0 --device cpu" in said
    assert not any(tmp_path.rglob("claims"))
    assert choice[0] == 0, choice[1]
    listed = Counter(re.findall(r"^rule (\w+):$", choice[1], re.MULTILINE))
    # validation images are compared in a report: there are no claims of them
    assert listed == {"train": 9, "evaluate": 9, "validation": 1, "all": 1}
    assert "--suite quick --images 1000 --split validation" in choice[1]
    assert nothing[0] != 0
    assert "the study lacks accelerator, data, evaluations, out, runs" in nothing[1]
    assert wrong[0] != 0
    assert "has data 'digit'; there are digits" in wrong[1]
