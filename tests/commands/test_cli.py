"""The command line: exit codes, one-line errors, machine output."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import redefense
from cli_tools import command
from redefense.commands import looking
from redefense.config import Run, override
from redefense.evaluation import api
from redefense.recipes import RECIPES, recipe
from redefense.report.reproduce import commands
from redefense.results.join import join
from redefense.runtime.files import locked
from serve_tools import make_bundle

SMALL = ("epochs=1", "ensemble.model=mlp", "ensemble.num_members=2", "batch_size=256")
QUICK = [word for change in SMALL for word in ("--set", change)]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def v(trained: Callable[[Run, Path], Path]) -> Path:
    """A run of a second, in the folder "v"."""
    return trained(override(recipe("digits-vanilla"), SMALL), Path("v"))


def test_the_whole_path_trains_evaluates_and_reports() -> None:
    assert command("train", "digits-vanilla", "--out", "v", *QUICK, "--quiet").code == 0
    done = command("evaluate", "v", "--images", "20", "--json", "--quiet")
    assert done.code == 0
    stored = json.loads(Path("v/evaluation/quick.json").read_text())
    assert json.loads(done.out) == stored
    assert stored["data"].items() >= {"name": "digits", "split": "test", "num_images": 20}.items()
    assert stored["headline"]["aware"] <= stored["headline"]["unaware"]
    written = command("report", "v", "--out", "page.html", "--json")
    assert "page.html" in json.loads(written.out)["files"]
    assert "://" not in Path("page.html").read_text().replace("http://www.w3.org", "")


def test_commands_on_a_card_and_a_report_work_where_these_were_made() -> None:
    assert command("train", "digits-vanilla", "--out", "runs/v", *QUICK, "--quiet").code == 0
    for words in ([], ["--eps", str(8 / 255), "--out", "runs/v/evaluation/small.json"]):
        assert command("evaluate", "runs/v", "--images", "20", "--quiet", *words).code == 0
    command("report", "runs/v", "--out", "runs/page.html", "--quiet")
    command("card", "runs/v", "--quiet")
    card, page = (Path(name).read_text() for name in ("runs/v/README.md", "runs/page.md"))
    for text in (card, page):
        lines = re.findall(r"^    redefense (.*)$", text, re.MULTILINE)
        assert [line.split()[0] for line in lines] == ["evaluate", "evaluate", "report"]
        assert [command(*shlex.split(line)).code for line in lines] == [0, 0, 0]
    assert Path("runs/page.md").read_text() == page
    (path,) = re.findall(r"redefense\.load\((.*)\)", card)
    assert redefense.load(json.loads(path)).num_members == 2


@pytest.mark.usefixtures("v")
def test_a_cascade_can_be_left_out_and_the_command_on_the_report_says_so() -> None:
    cells = [{"attack": "hinge", "view": "members", "settings": {"steps": n}} for n in (3, 4)]
    Path("mine.json").write_text(json.dumps({"cells": cells, "cascade": True}))
    out = {"some": [], "all": ["--no-cascade", "--out", "v/evaluation/all.json"]}
    for words in out.values():
        done = command("evaluate", "v", "--images", "30", "--suite", "mine.json", "--quiet", *words)
        assert done.code == 0
    some, every = (
        json.loads(Path(f"v/evaluation/{name}.json").read_text()) for name in ("mine", "all")
    )
    assert some["cells"][1]["met"] < some["cells"][0]["met"] <= 30
    assert [cell["met"] for cell in every["cells"]] == [30, 30]
    command("report", "v", "--out", "page.html", "--quiet")
    lines = re.findall(r"^    redefense (evaluate .*)$", Path("page.md").read_text(), re.MULTILINE)
    assert sorted("--no-cascade" in line for line in lines) == [False, True]
    assert [command(*shlex.split(line)).code for line in lines] == [0, 0]


@pytest.mark.usefixtures("v")
def test_a_threat_may_be_written_as_people_do() -> None:
    for number, words in enumerate((["--eps", "8/255"], ["--norm", "l2", "--eps", "128/255"])):
        out = f"{number}.json"
        done = command("evaluate", "v", "--images", "4", "--out", out, *words)
        assert done.code == 0, done.err
        given = {cell["id"] for cell in json.loads(Path(out).read_text())["cells"]}
        assert all(("linf-0.031373" if number == 0 else "l2-0.501961") in name for name in given)
    for words, says in (
        (["--eps", "8/0"], "--eps must be a finite number, or a fraction such as 8/255, got '8/0'"),
        (["--norm", "l1", "--eps", "1"], "--norm must be 'inf' or '2' (or 'linf', 'l2'), got 'l1'"),
        (["--norm", "L2"], "--norm L2 needs --eps"),
        (["--norm", "L2", "--eps", "1000"], "eps must lie in [0, 100], got 1000"),
    ):
        refused = command("evaluate", "v", "--out", "no.json", *words)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert says in refused.err


@pytest.mark.usefixtures("v")
def test_a_bundle_given_in_place_of_its_run_is_one_line() -> None:
    make_bundle(Path("bundle"))
    for name in ("evaluate", "export", "landscape"):
        refused = command(name, "bundle", "--out", "new.svg")
        assert (refused.code, refused.err.count("\n")) == (3, 1)
        assert "bundle is a bundle or a folder for a model hub, not a run" in refused.err
    refused = command("verify", "v/final")
    assert (refused.code, refused.err.count("\n")) == (3, 1)
    assert "v/final is a checkpoint, not a bundle" in refused.err


@pytest.mark.usefixtures("v")
def test_an_evaluation_with_other_settings_needs_another_file() -> None:
    with locked(Path("v/evaluation/quick/.lock"), wait=False):
        refused = command("evaluate", "v", "--images", "20", "--quiet")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "another process is working on v/evaluation/quick.json" in refused.err
    assert not Path("v/evaluation").exists() or not list(Path("v/evaluation").iterdir())
    command("evaluate", "v", "--images", "20", "--quiet")
    assert not list(Path("v/evaluation").rglob(".lock"))
    refused = command("evaluate", "v", "--images", "21", "--quiet")
    assert refused.code == 2
    assert "images" in refused.err
    assert command("evaluate", "v", "--images", "21", "--out", "other.json", "--quiet").code == 0
    assert json.loads(Path("other.json").read_text())["data"]["num_images"] == 21


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train", "digits-rde"], 2, "did you mean digits-red"),
        (["train", "digits-red", "--set", "epoch=3"], 2, "did you mean epochs"),
        (["train", "digits-red", "--set", "epochs=x"], 2, "valid integer, got 'x'"),
        (["train", "digits-red", "--data", "digitz"], 3, "'digitz' (did you mean digits?)"),
        (["train", "digits-red", "--data", "no/where"], 3, "write folder:no/where"),
        (["train", "digits-red", "--data", "my.npz"], 3, "write npz:my.npz"),
        (["train", "digits-red", "--data", "."], 3, "write folder:."),
        (["train", "cifar10-mini-red", "--data", "cifar10:nowhere"], 3, "nowhere"),
        (["train", "digits-vanilla", "--device", "warp"], 2, "device 'warp'"),
        (["train", "digits-vanilla", "--device", "meta"], 2, "device 'meta'"),
        (["train", "missing.json"], 2, "missing.json"),
        (["evaluate", "nowhere"], 3, "no trained run at nowhere"),
        (["evaluate", "nowhere", "--suite", "quik"], 2, "did you mean quick"),
        (["evaluate", "nowhere", "--checks", "some"], 2, "quick or full"),
        (["report", "nowhere"], 3, "nowhere"),
        (["list", "colours"], 2, "cannot list 'colours'"),
        (["show", "digits-rde"], 2, "digits-red"),
        (["show", "."], 3, "there is no run at .: it has no run.json"),
        (["show", "no/where"], 3, "there is no run at no/where"),
        (["bench", "inference", "--model", "nope"], 2, "unknown model 'nope'"),
        (["bench", "attacks", "--attack", "nope"], 2, "no attack named nope"),
        (["bench", "attacks", "--model", "nope"], 2, "unknown model 'nope'"),
        (["bench", "attacks", "--images", "9999"], 2, "digits holds 287 images out, not 9999"),
        (["bench", "scaling", "cifar10-red"], 3, "cifar10"),
        (["bench", "scaling", "digits-red", "--processes", "7"], 2, "cannot split a batch of 64"),
        (["show", "digits-red", "--cost", "--parameters"], 2, "use one of them"),
        (["show", "x" * 300], 2, "xxx"),
        (["show", "digits-red", "--set", "defence.name=[1]"], 2, "unknown defence [1]"),
        (["train", "digits-red", "--set", "optim.lr=Infinity"], 2, "finite"),
        (["train", "digits-red", "--bogus"], 2, "--bogus"),
        (["train", "digits-red", "--set", "recipe=../../x"], 2, "recipe '../../x' cannot name"),
        (["train", "digits-red", "--set", "recipe="], 2, "recipe '' cannot name"),
        (["train", "digits-red", "--seed", "-1"], 2, "-1"),
        (["evaluate", "nowhere", "--images", "0"], 2, "--images"),
        (["trian", "digits-red"], 2, "trian"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words: list[str], code: int, says: str) -> None:
    result = command(*words)
    assert result.code == code
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert result.out == ""
    assert list(Path.cwd().iterdir()) == []


def test_a_quiet_audit_prints_errors_only() -> None:
    table = Path(redefense.__file__).parent / "audit" / "examples" / "red_table2.csv"
    full, quiet = (command("audit", table, *words).out.splitlines() for words in ((), ("--quiet",)))
    assert quiet == [line for line in full if line.startswith("error ")]
    assert 0 < len(quiet) < len(full)


def test_data_that_cannot_be_used_is_refused_with_its_faults() -> None:
    result = command("data", "check", "npz:nowhere.npz", "--json")
    assert result.code == 3
    assert "nowhere.npz" in json.loads(result.out)["problems"][0]
    assert len(result.err.strip().splitlines()) == 1
    assert command("data", "check", "digits").code == 0


@pytest.mark.usefixtures("v")
def test_a_refused_evaluation_leaves_no_claim_behind() -> None:
    Path("mine.json").write_text('{"cells": [{"attack": "pdg", "view": "sampled"}]}')
    Path("empty.json").write_text('{"cells": []}')
    for words in (["--images", "400"], ["--suite", "mine.json"], ["--suite", "empty.json"]):
        assert command("evaluate", "v", *words).code == 2
    assert not Path("v/evaluation").exists()


@pytest.mark.usefixtures("v")
def test_an_evaluation_names_every_machine_that_worked_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def provenance() -> dict[str, str]:
        command("evaluate", "v", "--images", "10")
        stored = json.loads(Path("v/evaluation/quick.json").read_text())
        found: dict[str, str] = stored["provenance"]
        return found

    here = provenance()
    file = Path("v/evaluation/quick.json")
    with monkeypatch.context() as patch:
        other = {"torch": "2.11.0+cu130", "machine": "another one, NVIDIA H100 80GB HBM3"}
        patch.setattr(api, "place_of", lambda device: other)
        assert provenance()["machine"] == here["machine"], "a finished one is read, not worked on"
        file.unlink()
        both = provenance()
    assert both["torch"] == f"{here['torch']}; 2.11.0+cu130"
    assert both["machine"] == (
        f"{here['machine']}, torch {here['torch']}; {other['machine']}, torch 2.11.0+cu130"
    )
    plan = Path("v/evaluation/quick/plan.json")
    old = json.loads(plan.read_text())
    del old["places"]  # as it was before places were written down
    plan.write_text(json.dumps(old))
    file.unlink()
    assert provenance()["machine"].startswith("not recorded, torch not recorded; ")


@pytest.mark.usefixtures("v")
def test_a_threat_is_said_as_it_is_and_one_that_a_suite_fixes_is_not_changed() -> None:
    fixed = {"attack": "fgsm", "view": "averaged", "threat": {"eps": 0.03}}
    Path("mine.json").write_text(json.dumps({"cells": [fixed]}))
    refused = command("evaluate", "v", "--suite", "mine.json", "--images", "10", "--eps", "0.3")
    assert (refused.code, len(refused.err.strip().splitlines())) == (2, 1)
    assert "fixes its threat" in refused.err
    alone = command("evaluate", "v", "--suite", "mine.json", "--images", "10")
    assert "L-inf eps 0.03\n" in alone.err
    # the printed command is accepted, and finds the evaluation that it repeats
    line, _ = commands(join([Path("v/evaluation/mine.json")]))
    assert command(*shlex.split(line)[1:]).code == 0
    Path("both.json").write_text(json.dumps({"cells": [fixed, {**fixed, "threat": None}]}))
    both = command("evaluate", "v", "--suite", "both.json", "--images", "10", "--eps", "0.3")
    assert "L-inf eps 0.03, L-inf eps 0.3\n" in both.err


def test_without_a_command_the_help_is_all_that_is_said() -> None:
    result = command()
    assert result.err.startswith("Usage: ")
    assert "\n  train " in result.err


def test_a_file_where_a_folder_should_be_is_refused() -> None:
    Path("file").write_text("")
    result = command("train", "digits-vanilla", "--out", "file", *QUICK, "--quiet")
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)


@pytest.mark.usefixtures("v")
def test_damaged_records_are_named_or_made_again() -> None:
    words = ("evaluate", "v", "--images", "20", "--quiet", "--json")
    whole = json.loads(command(*words).out)["headline"]
    cell = Path("v/evaluation/quick/pgd-sampled-linf-0.2.npz")
    for damaged in (cell, cell.with_name("baselines.npz")):
        damaged.write_bytes(damaged.read_bytes()[:-30])
    assert json.loads(command(*words).out)["headline"] == whole
    plan = cell.with_name("plan.json")
    begun = json.loads(plan.read_text())
    plan.write_text(json.dumps(begun | {"code": "0" * 64}))
    refused = command(*words)
    assert (refused.code, "another version of the code" in refused.err) == (2, True)
    plan.write_text("{")
    assert command(*words).code == 3
    Path("v/run.json").write_text("{")
    assert command("train", "digits-vanilla", "--out", "v", "--resume", *QUICK, "--quiet").code == 3


@pytest.mark.parametrize("kind", ["attacks", "defences", "models", "data", "recipes", "suites"])
def test_lists_are_names_with_summaries(kind: str) -> None:
    entries = json.loads(command("list", kind, "--json").out)
    assert entries
    assert all(set(entry) == {"name", "summary"} and entry["summary"] for entry in entries)


def test_no_two_recipes_read_the_same() -> None:
    entries = {
        e["name"]: e["summary"] for e in json.loads(command("list", "recipes", "--json").out)
    }
    assert len(set(entries.values())) == len(entries)
    assert entries["digits-red-printed"].startswith("red printed, 3 x digits-cnn, ")
    assert entries["digits-red-at"].startswith("red with adversarial training, 3 x digits-cnn, ")
    assert "digits-cnn written by a hypernetwork" in entries["digits-ps-red"]


def test_show_gives_the_resolved_run_that_can_be_trained() -> None:
    shown = command("show", "digits-red", "--set", "epochs=1").out
    Path("mine.json").write_text(shown)
    assert json.loads(shown)["epochs"] == 1
    assert json.loads(command("show", "mine.json").out) == json.loads(shown)


def test_a_defect_of_ours_keeps_its_traceback_and_exits_70(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(looking, "_entries", broken)
    result = command("list", "recipes")
    assert result.code == 70
    assert "ZeroDivisionError" in result.err
    assert "report" in result.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\n8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def too_large(*_: object) -> None:
        raise error

    monkeypatch.setattr(looking, "_entries", too_large)
    result = command("list", "recipes")
    assert result.code == 1
    assert result.err.startswith("redefense: memory does not suffice")
    assert len(result.err.splitlines()) == 1


@pytest.mark.usefixtures("v")
def test_a_corrupted_run_is_refused_by_name() -> None:
    target = Path("v/final/weights.safetensors")
    target.write_bytes(target.read_bytes()[:-1])
    result = command("evaluate", "v")
    assert result.code == 3
    assert "weights.safetensors" in result.err


@pytest.mark.usefixtures("v")
def test_strict_turns_a_red_check_into_a_failure() -> None:
    words = ("evaluate", "v", "--images", "20", "--quiet")
    red = [c for c in json.loads(command(*words, "--json").out)["checks"] if c["passed"] is False]
    assert command(*words, "--strict").code == (1 if red else 0)


def test_help_names_every_command_and_version_answers() -> None:
    for words in (["--help"], ["--version"]):
        command = [sys.executable, "-m", "redefense", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "NO_COLOR": "1"}
        )
        expected = ["train", "evaluate", "report", "list", "show", "data"]
        assert all(w in done.stdout for w in (expected if words == ["--help"] else ["0."]))


def test_every_recipe_has_the_name_it_is_found_by() -> None:
    assert all(name == name.lower() and " " not in name for name in RECIPES)
