"""The commands printed beside figures make these figures, wherever the report was written."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from redefense.errors import DataError
from redefense.evaluation.inputs.radii import read_radii
from redefense.report.reproduce import command, commands, shown
from redefense.results.join import join
from report_tools import build_run


def test_the_command_repeats_the_suite(tmp_path: Path) -> None:
    build_run(tmp_path / "my run")
    (result,) = join([tmp_path / "my run"])
    assert command(result.suites[0]) == (
        "redefense evaluate 'my run' --suite quick --images 360 --eps 0.2 --norm inf --seed 0"
    )


def test_the_command_repeats_an_evaluation_at_several_radii(tmp_path: Path) -> None:
    points = [{"eps": eps, "unaware": None, "aware": 0.5} for eps in (2 / 255, 0.2)]
    document = build_run(tmp_path / "red") | {"eps_curve": points}
    (tmp_path / "red" / "evaluation" / "quick.json").write_text(json.dumps(document))
    (result,) = join([tmp_path / "red"])
    line = command(result.suites[0])
    assert line is not None
    words = shlex.split(line)
    radii = read_radii(words[words.index("--eps") + 1])
    assert radii == [point["eps"] for point in points]


def stored_as(run: Path, file: str, suite: str = "quick", **plan: Any) -> None:
    """An evaluation under a name of its own, with the plan that made it."""
    document = build_run(run, suite=file) | {"suite": suite}
    (run / "evaluation" / f"{file}.json").write_text(json.dumps(document))
    plan = {"suite": {"name": suite}, "threat": {"norm": "inf", "eps": 8 / 255}} | plan
    (run / "evaluation" / file / "plan.json").write_text(json.dumps(plan))


def test_the_command_names_all_that_was_not_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/red")
    # all images, and a budget that six digits would round
    stored_as(run, "quick")
    stored_as(run, "wide", images=360, seed=3, seeds=2, checks="full", batch_size=8)
    stored_as(run, "mine", "mine")
    threat = f"--eps {8 / 255!r} --norm inf"
    expected = [
        f"redefense evaluate runs/red --suite mine.json {threat} --seed 0",
        f"redefense evaluate runs/red --suite quick {threat} --seed 0",
        f"redefense evaluate runs/red --suite quick --images 360 {threat} --seed 3 --seeds 2 "
        "--checks full --batch-size 8 --out runs/red/evaluation/wide.json",
    ]
    page = "redefense report runs/red"
    assert commands(join([run])) == [*expected, page]
    # an absolute path below the present directory says no more than a relative one
    assert commands(join([run.absolute()])) == [*expected, page]
    assert commands(join([run]), Path("runs/x.html"))[-1] == f"{page} --out runs/x.html"
    file = run / "evaluation" / "wide.json"
    assert commands(join([file])) == [expected[2], f"redefense report {file}"]
    monkeypatch.chdir(run / "evaluation")
    line, page = commands(join([Path("wide.json")]))
    assert line.startswith("redefense evaluate .. ")
    assert line.endswith("--out ../evaluation/wide.json")
    assert page == "redefense report wide.json"


def test_other_data_than_the_runs_own_are_named(tmp_path: Path) -> None:
    document = build_run(tmp_path / "red")
    for spec, said in (
        ("folder:../mine", "folder:../mine"),
        (f"npz:{tmp_path}/x.npz", "npz:x.npz"),
    ):
        document["provenance"]["data"] = spec
        (tmp_path / "red" / "evaluation" / "quick.json").write_text(json.dumps(document))
        line, _ = commands(join([tmp_path / "red"]))
        assert f" --suite quick --data {said} " in line


def test_no_command_tells_of_the_machine_or_of_a_run_that_never_was(tmp_path: Path) -> None:
    stored_as(tmp_path / "red", "wide")
    lines = commands(join([tmp_path / "red"]), tmp_path / "page.html")
    assert lines[0].endswith("--out red/evaluation/wide.json")
    assert lines[1] == "redefense report red --out page.html"
    assert str(tmp_path) not in " ".join(lines)
    assert shown(Path("../red")) == "../red"
    # evaluated in Python: no command makes the figures, and JSON has no place on disk
    document = build_run(tmp_path / "own") | {"run": {}}
    (tmp_path / "own.json").write_text(json.dumps(document))
    assert commands(join([tmp_path / "own.json"])) == ["redefense report own.json"]
    assert commands(join([document])) == []


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    stored_as(tmp_path / "red", "wide", seeds="two")
    with pytest.raises(DataError, match=r"wide/plan\.json is not a valid plan: seeds"):
        join([tmp_path / "red"])
