"""What `evaluate` refuses or warns of, since its figures would be wrong and not look it."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import redefense
from redefense.config import override
from redefense.ensembles import Independent
from redefense.errors import ConfigError, InputError
from redefense.evaluation.answers import check_outputs
from redefense.evaluation.report_object import Report
from redefense.evaluation.suite import SUITES
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.train.run import train

IMAGES = torch.rand(12, 1, 4, 4, generator=stream(0, "entrance"))
LABELS = torch.arange(12) % 3


class Linear(nn.Module):
    """A linear network of so many classes, whose logits may be changed on their way out."""

    def __init__(
        self, classes: int, seed: int = 0, change: Callable[[Tensor], Any] = lambda z: z
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, classes, generator=stream(seed, "weight")))
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x.flatten(1) @ self.weight)


def evaluate(model: Any, **settings: Any) -> Report:
    return redefense.evaluate(model, (IMAGES, LABELS), threat=redefense.Threat(eps=0.1), **settings)


class Secret(nn.Module):
    """Draws a member inside its forward pass, from a generator that nobody watches."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members, self.rng = nn.ModuleList(members), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        drawn: Tensor = self.members[int(self.rng.integers(len(self.members)))](x)
        return drawn


def test_a_draw_inside_a_forward_pass_is_refused() -> None:
    rng = np.random.default_rng(0)
    noisy = Linear(3, change=lambda z: z + 0.1 * torch.from_numpy(rng.normal(size=z.shape)))
    for model in (Secret([Linear(3, 0), Linear(3, 1)]), noisy, [Linear(3), noisy]):
        with pytest.raises(InputError, match=r"in different ways.*as a list"):
            evaluate(model, stochastic="off")
    # rounding that differs from call to call, as on accelerators, is no draw
    evaluate(Linear(3, change=lambda z: z * (1 + 1e-6 * rng.random())))
    half = Linear(3, change=lambda z: (z * (1 + 0.008 * rng.random())).bfloat16())
    assert check_outputs(Independent([half]), IMAGES, LABELS) == 3
    # small logits, and a class that is never answered, hide no draw
    for change in (
        lambda z: 1e-6 * (z + 0.1 * float(rng.normal())) * torch.tensor([1.0, 2.0, 3.0]),
        lambda z: torch.cat(
            [z + 0.1 * torch.from_numpy(rng.normal(size=z.shape)), z * -torch.inf], 1
        ),
    ):
        with pytest.raises(InputError, match="in different ways"):
            check_outputs(Independent([Linear(3, change=change)]), IMAGES, LABELS)


def test_outputs_that_are_no_logits_of_equal_classes_are_one_line() -> None:
    for model, said in (
        (Linear(1), r"two classes or more, got \(1, 1\)"),
        ([Linear(3), Linear(5)], r"the same classes, got \[3, 5\]"),
        (Linear(2), r"labels must lie in \[0, 2\)"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate(model)


def test_what_types_would_forbid_is_one_line_for_those_who_check_none() -> None:
    # in a process of its own, without the type checks of this test run
    script = """
import redefense, torch
from torch.utils.data import DataLoader, TensorDataset
class Linear(torch.nn.Module):
    def __init__(self, change=lambda z: z):
        super().__init__()
        self.head, self.change = torch.nn.Linear(16, 3), change
    def forward(self, x):
        return self.change(self.head(x.flatten(1)))
x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
for model, data in (
    (Linear(), DataLoader(TensorDataset(x, y))),
    (Linear(), (x,)),
    (Linear(), (x.numpy(), y)),
    (Linear(lambda z: {"logits": z}), (x, y)),
    (Linear(lambda z: z[0]), (x, y)),
):
    try:
        redefense.evaluate(model, data)
    except redefense.errors.InputError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ends = ("got DataLoader", "got 1 of them", "got ndarray", "got a dict for B = 1", "for B = 1")
    lines = run.stdout.splitlines()
    assert len(lines) == len(ends)
    assert all(line.endswith(end) for line, end in zip(lines, ends, strict=True))


def test_labels_may_be_any_integers() -> None:
    reports = [
        redefense.evaluate(Linear(3), (IMAGES, LABELS.to(dtype))).headline
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.parametrize("suite", [name for name in SUITES if name not in ("quick", "aware")])
def test_a_suite_that_needs_more_classes_says_so_before_its_first_attack(suite: str) -> None:
    asked: list[int] = []

    def count(z: Tensor) -> Tensor:
        asked.append(len(z))
        return z

    data = (IMAGES, LABELS % 2)
    with pytest.raises(ConfigError, match=r"AutoAttack\(.*at least 4 classes, the model has 2"):
        redefense.evaluate(Linear(2, change=count), data, suite=suite)
    assert set(asked) <= {1, 3, 25, min(32, len(IMAGES))}, "images were attacked first"


def test_red_checks_of_the_measurement_are_warned_of() -> None:
    masked = Linear(3, change=lambda z: z.detach())
    with pytest.warns(redefense.RedCheckWarning, match="S22: 24 of 24 input gradients"):
        report = evaluate(masked)
    assert report.headline["aware"] == report.headline["unaware"]
    red = {c["id"] for c in report.data["checks"] if c["passed"] is False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(masked)
    said = {str(w.message).partition(":")[0] for w in caught}
    assert said == red - {"S36", "S38"}
    assert isinstance(told := caught[-1].message, redefense.RedCheckWarning)
    assert told.report is not None  # whoever raises warnings keeps the measurement
    assert told.report.headline == report.headline


def test_a_trained_run_is_measured_as_its_own_threat_and_method_say(tmp_path: Path) -> None:
    run = override(recipe("digits-gal"), ["epochs=1", "data.images=64"])
    ensemble = train(run, tmp_path / "run", quiet=True)
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"cells": [{"attack": "fgsm", "view": "protocol"}]}))
    (cell,) = redefense.evaluate(ensemble, "digits", suite=str(mine), images=4).data["cells"]
    assert (cell["threat"]["eps"], cell["view"]) == (0.2, "averaged")
    threat, members = redefense.Threat(eps=0.1), [ensemble.member(m) for m in range(3)]
    (cell,) = redefense.evaluate(members, "digits", str(mine), threat, images=4).data["cells"]
    assert (cell["threat"]["eps"], cell["view"]) == (0.1, "sampled")


def test_it_computes_without_denormal_numbers_and_repeatably_and_leaves_both_as_they_were() -> None:
    def modes() -> tuple[bool, bool]:
        return not bool(torch.tensor(1e-40) * 1.0), torch.backends.cudnn.deterministic

    class Watched(Linear):
        def forward(self, x: Tensor) -> Any:
            seen.append(modes())
            return super().forward(x)

    seen: list[tuple[bool, bool]] = []
    for before in ((True, False), (False, False)):
        torch.set_flush_denormal(before[0])
        evaluate(Watched(3))
        assert modes() == before
    assert set(seen) == {(True, True)}


def test_a_warning_points_at_the_line_that_asked() -> None:
    # in a process of its own: the shape checker of this test run stands between
    program = (
        "import torch, redefense; from torch import nn\n"
        "class Masked(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.flatten(1).detach()\n"
        "x = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))\n"
        "redefense.evaluate(Masked(), (x, torch.arange(8) % 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "<string>:6: RedCheckWarning: S22" in done.stderr
