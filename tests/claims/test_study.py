"""The queue of the study, on jobs of seconds."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import study

from redefense.config import override
from redefense.evaluation.suite import suite_named
from redefense.recipes import recipe
from redefense.train.cost import passes_per_image
from redefense.train.loading import resolve

SMALL = {"tiny": study.Evaluation(suite="quick", images=20, wave=1, minutes=0.1)}
ROW = study.Row(
    name="digits", recipe="digits-vanilla", changes=("epochs=1",), evaluations=("tiny",)
)


def test_every_row_is_a_run_that_can_be_resolved() -> None:
    for row in study.ROWS:
        resolve(override(recipe(row.recipe), list(row.changes)))
        assert set(row.evaluations) <= set(study.EVALUATIONS)


def test_every_evaluation_names_a_suite_and_the_small_one_keeps_its_stated_budget() -> None:
    for evaluation in study.EVALUATIONS.values():
        name = evaluation.suite
        suite_named(str(study.HERE / name) if name.endswith(".json") else name)
    small = suite_named(str(study.HERE / "aware-small.json"))
    (auto,) = (cell for cell in small.cells if cell.attack == "autoattack")
    assert auto.settings == {"steps": 50, "queries": 500}
    whole = {(cell.attack, cell.view) for cell in suite_named("aware").cells}
    assert {(cell.attack, cell.view) for cell in small.cells} == whole


def test_no_job_is_listed_twice_and_none_comes_before_its_training() -> None:
    jobs = study.plan(study.ROWS, study.EVALUATIONS, Path("runs"))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        assert names.index(f"{job.run.name}/train") <= names.index(job.name)


def test_shipped_data_and_whole_test_splits_need_no_words() -> None:
    jobs = study.plan(study.ROWS, study.EVALUATIONS, Path("runs"))
    words = {job.name: job.command("cifar10:there", study.EVALUATIONS) for job in jobs}
    for name in ("digits-red-0/train", "digits-red-0/aware"):
        assert not {"--data", "--images"} & set(words[name])
    assert words["red-0/aware-500"][2:8] == [
        "--data", "cifar10:there", "--suite", "aware", "--images", "500"
    ]  # fmt: skip


def test_only_jobs_that_read_cifar_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["--only", "red"])
    assert "--data is needed" in capsys.readouterr().err


def test_long_runs_cost_the_same() -> None:
    rows = [row for row in study.ROWS if row.name.startswith("long-")]
    runs = [override(recipe(row.recipe), list(row.changes)) for row in rows]
    costs = [passes_per_image(run) * run.epochs * run.ensemble["num_members"] for run in runs]
    assert len(costs) == 4
    assert max(costs) < 1.03 * min(costs)


def test_words_choose_rows_runs_and_patterns_and_a_wrong_one_is_named() -> None:
    jobs = study.plan(study.ROWS, study.EVALUATIONS, Path("runs"))
    assert {job.run.name for job in study.chosen(jobs, ["red"])} == {"red-0", "red-1"}
    assert {job.run.name for job in study.chosen(jobs, ["red-1"])} == {"red-1"}
    assert {job.what for job in study.chosen(jobs, ["*/quick-1000"])} == {"quick-1000"}
    assert study.chosen(jobs, []) == jobs
    with pytest.raises(SystemExit, match="'rde' names no job"):
        study.chosen(jobs, ["rde"])


def test_the_queue_does_what_is_left_and_logs_one_line_a_job(tmp_path: Path) -> None:
    def run(rows: list[study.Row]) -> int:
        jobs = study.plan(rows, SMALL, tmp_path)
        return study.work(jobs, SMALL, data="digits", out=tmp_path, threads=1)

    broken = study.Row(name="broken", recipe="digits-rde", evaluations=("tiny",))
    assert run([broken, ROW]) == 1  # its evaluation waits, the others go on
    jobs = study.plan([ROW], SMALL, tmp_path)
    assert [job.state for job in jobs] == ["done", "done"]
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["job"], e["exit"]) for e in entries] == [
        ("broken-0/train", 2),
        ("digits-0/train", 0),
        ("digits-0/tiny", 0),
    ]
    assert "digits-rde" in (tmp_path / "broken-0.log").read_text()
    assert study.measured(tmp_path).keys() == {e["job"] for e in entries}
    jobs[1].done.unlink()
    assert [job.state for job in jobs] == ["done", "begun"]
    assert run([ROW]) == 0
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    with study.held(tmp_path / ".digits-0.lock") as lock:
        assert lock is not None
        jobs[1].done.unlink()
        assert run([ROW]) == 0
        assert not jobs[1].done.exists()  # the other queue's


def test_a_stopped_queue_stops_its_job_and_goes_on_later(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import study\n"
        "row = study.Row(name='d', recipe='digits-vanilla', changes=('epochs=500',),"
        " evaluations=())\n"
        "out = Path(sys.argv[1])\n"
        "study.work(study.plan([row], {}, out), {}, data=None, out=out, threads=1)\n"
    )
    queue = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=study.HERE, stdout=subprocess.PIPE
    )
    log = tmp_path / "d-0" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    queue.send_signal(signal.SIGTERM)
    try:
        said, _ = queue.communicate(timeout=60)
    finally:
        queue.kill()
    assert queue.returncode == 143
    assert b"exit 143" in said
    assert list((tmp_path / "d-0" / "checkpoints").iterdir())
    with study.held(tmp_path / ".d-0.lock") as lock:
        assert lock is not None
