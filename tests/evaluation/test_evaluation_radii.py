"""Several radii give one curve; what an evaluation in Python has done is kept and gone on with."""

import json
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import redefense
from redefense.attacks import FGSM, PGD
from redefense.config import ThreatConfig
from redefense.errors import ConfigError, Interrupted, RedCheckWarning
from redefense.evaluation.api import evaluate_run
from redefense.evaluation.inputs.radii import over, read_radii
from redefense.evaluation.suite import SUITES, CellSpec, Suite
from redefense.rng import stream
from redefense.threat import Threat


def linear(seed: int = 0) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=stream(seed, "linear"))
    return net.eval()


def images(count: int = 40) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 1, 8, 8, generator=stream(0, "x"))
    return x, linear()(x).argmax(1)


def test_a_curve_is_the_evaluations_at_its_radii() -> None:
    report = redefense.evaluate(linear(), images(), [FGSM(), PGD()], eps=["8/255", 2 / 255, 0.02])
    assert [point["eps"] for point in report.curve] == [2 / 255, 0.02, 8 / 255]
    for point in report.curve:
        alone = redefense.evaluate(linear(), images(), [FGSM(), PGD()], Threat(eps=point["eps"]))
        assert (point["aware"], point["aware_interval"]) == (
            alone.aware.value, [alone.aware.low, alone.aware.high],
        )  # fmt: skip
    assert report.threat == Threat(eps=8 / 255)
    assert report.headline["aware"] == report.curve[-1]["aware"]
    matplotlib.use("Agg")
    axes = report.plot()
    (line,) = (it for it in axes.get_lines() if it.get_marker() == "o")
    drawn = np.asarray(line.get_ydata(), dtype=float)
    np.testing.assert_allclose(drawn, [100 * point["aware"] for point in report.curve])
    plt.close(axes.figure)


def test_the_stored_evaluation_has_the_curve(tmp_path: Path) -> None:
    report = redefense.evaluate(linear(), images(), [FGSM()], eps=[0.01, 0.02], out=tmp_path)
    stored = json.loads((tmp_path / "evaluation" / "custom.json").read_text())
    assert stored == report.data
    assert [point["eps"] for point in stored["eps_curve"]] == [0.01, 0.02]


@pytest.mark.parametrize(
    "asked", [{"eps": 0.01}, {"eps": [0.01, 0.02]}, {"threat": Threat(eps=0.01)}], ids=str
)
def test_a_suite_with_a_threat_for_each_attack_takes_no_other(asked: dict[str, Any]) -> None:
    cell = CellSpec(attack="fgsm", view="sampled", threat=ThreatConfig(eps=0.05))
    suite = Suite(name="fixed", cells=(cell,))
    with pytest.raises(ConfigError, match="has a threat for each attack: omit eps and threat"):
        redefense.evaluate(linear(), images(), suite, **asked)


def test_a_curve_never_rises_and_weak_attacks_at_a_larger_radius_are_told() -> None:
    def idle(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        return PGD()(model, x, y, threat, rng=stream(0, "a")) if threat.eps < 0.02 else x

    with pytest.warns(RedCheckWarning, match=r"at eps 0\.03 and .* at 0\.01: .* not converged"):
        report = redefense.evaluate(linear(), images(), idle, eps=[0.01, 0.03])
    small, large = report.curve
    assert small["aware"] < 1
    assert large["aware"] == small["aware"]
    assert report.aware.value == 1


@pytest.mark.parametrize(
    ("eps", "found"),
    [("2/255,8/255", [2 / 255, 8 / 255]), (0.03, [0.03]), ([0.2, "0.1"], [0.1, 0.2]), (None, [])],
    ids=["text", "number", "list", "none"],
)
def test_radii_are_read_as_people_write_them(eps: Any, found: list[float]) -> None:
    assert read_radii(eps) == found


@pytest.mark.parametrize("eps", [[], "8/255,8/255", "8/255,", "one", object()])
def test_what_is_no_radius_is_refused(eps: Any) -> None:
    with pytest.raises(ConfigError, match="eps"):
        read_radii(eps)


def test_a_stopped_evaluation_says_what_is_kept_and_goes_on(tmp_path: Path) -> None:
    calls: list[str] = []
    stopping = [True]

    def first(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        calls.append("first")
        return PGD(steps=2)(model, x, y, Threat(eps=eps), rng=stream(0, "first"))

    def second(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append("second")
        if stopping:
            signal.raise_signal(signal.SIGINT)
        return x

    def measured(**settings: Any) -> Any:
        suite = [first, second]
        return redefense.evaluate(linear(), images(), suite, Threat(eps=0.02), **settings).data

    out = tmp_path / "kept"
    # shells let processes in the background ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(Interrupted, match=f"are saved in {out}/evaluation/custom") as stopped:
        measured(out=out)
    signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    stopping.clear()
    done = measured(out=out)
    assert calls == ["first", "second", "second"]
    assert json.loads((out / "evaluation" / "custom.json").read_text()) == done
    again = measured(out=out)
    assert calls == ["first", "second", "second"]
    assert again["headline"] == done["headline"] == measured()["headline"]
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        measured(out=out, seed=1)


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    redefense.evaluate(linear(), images(), [FGSM()], progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cell 1/1 fgsm-averaged-linf-0.031373: ")


def test_a_trained_run_takes_several_radii(tmp_path: Path) -> None:
    run = redefense.train(
        "digits-vanilla", epochs=1, batch_size=128, out=tmp_path / "run", quiet=True
    )
    mine = tmp_path / "mine.json"
    hinge = {"attack": "hinge", "view": "members", "settings": {"steps": 3}}
    mine.write_text(json.dumps({"cells": [{"attack": "fgsm", "view": "protocol"}, hinge]}))
    report, place = evaluate_run(run.path, suite=str(mine), eps="1/255,0.1", images=20)
    stored = json.loads(place.read_text())
    assert [point["eps"] for point in stored["eps_curve"]] == [1 / 255, 0.1]
    assert stored["headline"] == report.headline
    small = json.loads((place.with_suffix("") / "eps-0.00392157.json").read_text())
    assert small["headline"]["aware"] == stored["eps_curve"][0]["aware"]
    assert sorted(path.name for path in place.parent.glob("*.json")) == ["mine.json"]


def test_the_reports_are_made_in_rising_order() -> None:
    asked: list[tuple[float, str]] = []

    def at(radius: float, name: str) -> Any:
        asked.append((radius, name))
        return redefense.evaluate(linear(), images(8), [FGSM()], Threat(eps=radius))

    over([0.01, 0.02], at)
    assert asked == [(0.01, "eps-0.01"), (0.02, "")]


class Step:
    """One step of PGD, or several: the same class with other settings."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        return PGD(steps=self.steps)(model, x, y, Threat(eps=eps), rng=stream(0, "step"))


def bound(steps: int) -> Any:
    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        return Step(steps)(model, x, y, eps)

    return attack


@pytest.mark.parametrize(
    "made",
    [Step, bound, lambda steps: partial(Step(steps)), lambda steps: partial(bound, steps)()],
    ids=["instance", "closure", "partial", "call"],
)
def test_saved_records_are_those_of_equal_attacks_alone(tmp_path: Path, made: Any) -> None:
    def measured(steps: int) -> Any:
        return redefense.evaluate(
            linear(), images(), made(steps), Threat(eps=0.02), out=tmp_path
        ).headline

    assert measured(1) == measured(1)
    with pytest.raises(ConfigError, match=r"other settings \(objects\)"):
        measured(40)


class Rounded(nn.Module):
    """Its number of bits is in no state dict."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.net = bits, linear()

    def forward(self, x: Tensor) -> Tensor:
        levels = 2**self.bits - 1
        answer: Tensor = self.net((x * levels).round() / levels)
        return answer


def test_saved_records_are_those_of_equal_models_alone(tmp_path: Path) -> None:
    x, y = images()

    def measured(bits: int) -> Any:
        return redefense.evaluate(Rounded(bits), (x, y), [FGSM()], Threat(eps=0.02), out=tmp_path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RedCheckWarning)  # rounding has no gradient
        assert measured(1).headline == measured(1).headline
        with pytest.raises(ConfigError, match=r"other settings \(attributes\)"):
            measured(8)


def test_a_suite_of_other_attacks_cannot_have_the_name_of_a_built_in_one() -> None:
    weak = Suite(name="aware", cells=(CellSpec(attack="fgsm", view="sampled"),))
    with pytest.raises(ConfigError, match="'aware' is a built-in suite with other attacks"):
        redefense.evaluate(linear(), images(), weak)
    same = SUITES["quick"].model_copy(update={"cascade": True})
    assert redefense.evaluate(linear(), images(8), same).data["suite"] == "quick"


def test_full_checks_of_a_model_in_its_own_precision_are_left_open() -> None:
    single = linear()

    def model(x: Tensor) -> Tensor:  # whose weights nobody else can convert
        answer: Tensor = single(x)
        return answer

    report = redefense.evaluate(model, images(24), [PGD()], Threat(eps=0.02), checks="full")
    found = {check["id"]: check["passed"] for check in report.data["checks"]}
    assert (found["S08"], found["S10"]) == (None, None)
