"""The script for a GPU, rehearsed on the tape: sections stand alone, and figures are kept."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "device.py"


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("device_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    # one of many: all of them would take most of a minute
    monkeypatch.setattr(script, "ATTACKED", {"pgd": ("averaged", {"steps": 3})})
    monkeypatch.setattr(script, "METHODS", ["vanilla"])
    return script.Check("cpu", 1000.0, tmp_path / "device.json", None)


def test_a_section_that_fails_ends_alone_and_says_why(
    check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str) -> None:
        raise ValueError("no such thing\nsecond line")

    check.section("broken", fails, 0)
    check.section("late", fails, 5000)
    check.bits("bits", ["vanilla"], 0)
    shown = capsys.readouterr().out
    assert "broken: FAILED: ValueError: no such thing\n" in shown
    assert "late: left out: 1000 s are left" in shown or "late: left out: 999 s are left" in shown
    kept = json.loads(check.out.read_text())
    assert list(kept) == ["broken", "late", "bits"]
    (found,) = kept["bits"]
    assert (found["same"], found["counts"]["replayed"]) == (True, 3)


def test_no_step_is_taken_once_the_time_is_used_up(check: Any) -> None:
    check.bits("bits", ["vanilla"], 10_000)
    (message,) = check.found["bits"]
    assert message.startswith("stopped before vanilla: ")


@pytest.mark.parametrize("section", ["machine", "steps", "memory", "attacks", "recipes"])
def test_every_section_is_rehearsed(
    section: str, check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("linear", [2], 4) if section == "steps" else ()
    check.section(section, lambda name: getattr(check, section)(name, *more), 0)
    assert "FAILED" not in capsys.readouterr().out
    figures = check.found[section]
    assert all(isinstance(row, dict) for row in figures)
    if section == "attacks":
        assert [(row["same"], row["counted"]) for row in figures] == [(True, True)]
