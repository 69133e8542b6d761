"""The profile: every second belongs to one phase, and nothing changes by looking."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from redefense.config import Run, override
from redefense.recipes import recipe
from redefense.runtime import phases
from redefense.runtime.phases import PHASES, each, phase, watched
from redefense.train.experiment import train
from redefense.train.loading import load
from redefense.train.profile import Profile


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by a second each time it is read."""
    ticks = itertools.count(0.0)
    monkeypatch.setattr("redefense.train.profile.time.perf_counter", lambda: next(ticks))


@pytest.mark.usefixtures("ticking")
def test_inner_phases_do_not_count_for_outer_ones() -> None:
    profile = Profile()
    with watched(profile), phase("member steps"), phase("penalty"), phase("data"):
        pass
    profile.charge()
    # seven readings: one second each on the way in and out, and before and after
    found = {name: seconds for name, seconds in profile.seconds.items() if seconds}
    assert found == {"other": 2.0, "member steps": 2.0, "penalty": 2.0, "data": 1.0}


@pytest.mark.usefixtures("ticking")
def test_making_items_is_charged_and_using_them_is_not() -> None:
    profile = Profile()
    with watched(profile):
        items = each("data", iter("ab"))
        assert list(items) == ["a", "b"]
    profile.charge()
    assert profile.seconds["data"] == 3.0  # two items, and that there is no third


@pytest.mark.usefixtures("ticking")
def test_shares_add_up_to_one_and_are_printed() -> None:
    profile = Profile()
    with watched(profile), phase("optimizer"):
        pass
    profile.charge()
    shown = profile.as_dict()
    assert sum(p["share"] for p in shown["phases"].values()) == pytest.approx(1.0)
    assert shown["seconds"] == 3.0
    lines = profile.table().splitlines()
    assert [line.split("  ")[0] for line in lines] == [*PHASES, "in all"]
    assert all(
        f"{100 * p['share']:.1f} %" in line
        for p, line in zip(shown["phases"].values(), lines[:-1], strict=True)
    )


@pytest.mark.usefixtures("ticking")
def test_a_phase_ends_with_an_error() -> None:
    profile = Profile()
    with watched(profile), pytest.raises(ZeroDivisionError), phase("penalty"):
        raise ZeroDivisionError
    profile.charge()
    assert profile.seconds["other"] == 2.0


def test_nobody_is_told_outside() -> None:
    assert phase("penalty") is phase("data")
    with watched(Profile()):
        assert phase("penalty") is not phase("data")
    assert phases._watcher is None


def _run(method: str) -> Run:
    return override(
        recipe(f"digits-{method}"),
        ["epochs=2", "batch_size=256", "ensemble.model=mlp", "ensemble.width=16"],
    )


def test_a_profiled_training_gives_the_same_bits_and_knows_every_phase(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = _run("red")
    train(run, tmp_path / "plain", quiet=True)
    train(run, tmp_path / "profiled", quiet=True, profile=True)
    a, b = (load(tmp_path / name).state_dict() for name in ("plain", "profiled"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not (tmp_path / "plain" / "profile.json").exists()
    stored = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert list(stored["phases"]) == list(PHASES)
    assert all(p["seconds"] > 0 for p in stored["phases"].values())
    assert sum(p["share"] for p in stored["phases"].values()) == pytest.approx(1.0)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "adversarial examples" in printed.err


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("vanilla", set()),
        ("at", {"adversarial examples"}),
        ("gal", {"input gradients", "penalty"}),
        ("adp", {"penalty"}),
        ("mrboost", {"adversarial examples"}),
        ("trs", {"adversarial examples", "input gradients", "penalty"}),
    ],
)
def test_methods_spend_time_where_they_should(
    tmp_path: Path, method: str, expected: set[str]
) -> None:
    train(
        override(_run(method), ["epochs=3", "data.images=256"]),
        tmp_path / "run", quiet=True, profile=True,
    )  # fmt: skip
    stored = json.loads((tmp_path / "run" / "profile.json").read_text())
    special = {"adversarial examples", "input gradients", "penalty"}
    assert {name for name in special if stored["phases"][name]["seconds"]} == expected
