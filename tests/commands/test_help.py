"""What every command offers: examples that it understands, --json and --quiet."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from redefense import cli
from redefense.commands.helping import EXAMPLES, HEADINGS, INSTEAD, SETTINGS
from redefense.config import override
from redefense.recipes import recipe
from redefense.train.loading import resolve
from report_tools import build_run


def commands(group: object = None, above: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """Every command by its name below the program's."""
    found = typer.main.get_command(cli.app) if group is None else group
    for name, command in sorted(getattr(found, "commands", {}).items()):
        if hasattr(command, "commands"):
            yield from commands(command, (*above, name))
        else:
            yield " ".join((*above, name)), command


NAMES = [name for name, _ in commands()]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_examples_that_it_understands(name: str) -> None:
    command = dict(commands())[name]
    known = {option for param in command.params for option in param.opts}  # type: ignore[attr-defined]  # of typer's own click
    assert {"--json", "--quiet"} <= known
    assert EXAMPLES[name]
    for line in EXAMPLES[name]:
        assert line.startswith(f"redefense {name} ")
        assert {word for word in line.split() if word.startswith("--")} <= known


def test_headings_name_parameters_that_exist() -> None:
    known = {p.name for _, command in commands() for p in command.params}  # type: ignore[attr-defined]  # of typer's own click
    listed = [name for names in HEADINGS.values() for name in names]
    assert set(listed) <= known
    assert len(listed) == len(set(listed))


def test_hints_at_settings_are_settings_and_hints_at_commands_are_about_unknown_options() -> None:
    run = recipe("digits-at")
    for setting in SETTINGS.values():
        resolve(override(run, [setting]))
    for name, hints in INSTEAD.items():
        known = {option for param in dict(commands())[name].params for option in param.opts}  # type: ignore[attr-defined]  # of typer's own click
        assert not known & {f"--{option}" for option in hints}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            "train digits-red --eps 8/255",
            "--eps: it is a setting of the run: use --set threat.eps=",
        ),
        ("show digits-red --epoch=3", "--epoch: it is a setting of the run: use --set epochs="),
        ("train digits-red --suite aware", "--suite: it is an option of redefense evaluate"),
        ("evaluate runs/red --set threat.eps=0.1", "--set: a trained run keeps its settings"),
        ("evaluate --recipe digits-red", "--recipe: give the directory of a trained run"),
        ("claim table red.json --strict", "--strict: it is an option of redefense evaluate"),
        ("train digits-red --resum", "--resum (Possible options: --mesh, --resume)"),
    ],
)
def test_an_unknown_option_is_refused_with_what_to_use_instead(
    words: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["redefense", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("redefense: No such option: ")
    assert hint in line
    assert line.count("\n") == 1


def test_help_groups_options_and_shows_examples_without_torch_or_rich() -> None:
    code = (
        "import sys; sys.argv = ['redefense', 'evaluate', '--help']\n"
        "from redefense.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'rich', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[-1] == "set()"
    order = [lines.index(f"{heading}:") for heading in ("Arguments", "Data", "Attacks", "Output")]
    assert order == sorted(order)
    assert any(line.startswith("  --eps") for line in lines[order[2] : order[3]])
    examples = lines[lines.index("Examples:") + 1 :]
    assert examples[: len(EXAMPLES["evaluate"])] == [f"  {e}" for e in EXAMPLES["evaluate"]]


def test_json_of_a_report_holds_its_figures_and_quiet_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["redefense", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    build_run(tmp_path / "red")
    page = ("--out", str(tmp_path / "page.html"))
    found = json.loads(run("report", str(tmp_path), *page, "--json"))
    assert [Path(name).suffix for name in found["files"]] == [".html", ".md", ".csv", ".json"]
    assert found["results"][0]["run"] == "red"
    assert run("report", str(tmp_path), *page, "--quiet") == ""
    assert json.loads(run("card", str(tmp_path / "red"), "--json"))["file"].endswith("README.md")
    assert run("show", "digits-red", "--quiet") == ""
    names = run("list", "suites", "--quiet").split()
    assert names == [e["name"] for e in json.loads(run("list", "suites", "--json"))]
