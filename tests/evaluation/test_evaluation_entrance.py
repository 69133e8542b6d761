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
from redefense.checks.answers import check_outputs
from redefense.config import ThreatConfig, override
from redefense.ensembles import Independent
from redefense.errors import ConfigError, InputError
from redefense.evaluation.report_object import Report
from redefense.evaluation.suite import SUITES, CellSpec, Suite
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.train.experiment import train

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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"suite": [redefense.attacks.APGDT()]}, "needs at least 4 classes"),
        ({"stochastic": "on", "precision": "bf16"}, "remove precision bf16"),
    ],
    ids=["classes", "precision"],
)
def test_a_refused_evaluation_writes_nothing(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        redefense.evaluate(Linear(2), (IMAGES, LABELS % 2), out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_cell_takes_the_threat_that_attacks_take() -> None:
    given: Any = redefense.Threat(norm="l2", eps="8/255")
    cell = CellSpec(attack="fgsm", view="sampled", threat=given)
    assert cell.threat == ThreatConfig(norm="2", eps=8 / 255)
    assert CellSpec.model_validate(cell.model_dump(mode="json")) == cell


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"attack": "fgsm"}, "view Field required"),
        ({"attack": "fgsm", "view": "seen"}, "'averaged', 'members' or 'protocol', got 'seen'"),
        ({"attack": "fgsm", "view": "sampled", "threat": {"norm": "l7"}}, "norm must be .* 'l7'"),
    ],
)
def test_a_wrong_cell_is_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^CellSpec: .*{says}"):
        CellSpec(**fields)
    cells: Any = (fields,)
    with pytest.raises(ConfigError, match=f"^Suite: cells.0.*{says}"):
        Suite(name="own", cells=cells)


def test_a_draw_inside_a_forward_pass_is_refused() -> None:
    rng = np.random.default_rng(0)
    noisy = Linear(3, change=lambda z: z + 0.1 * torch.from_numpy(rng.normal(size=z.shape)))
    for model in (Secret([Linear(3, 0), Linear(3, 1)]), noisy, [Linear(3), noisy]):
        with pytest.raises(InputError, match=r"different outputs.*as a list"):
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
        with pytest.raises(InputError, match="different outputs"):
            check_outputs(Independent([Linear(3, change=change)]), IMAGES, LABELS)


def test_outputs_that_are_no_logits_of_equal_classes_are_one_line() -> None:
    for model, said in (
        (Linear(1), r"two classes or more, got \(\d+, 1\)"),
        ([Linear(3), Linear(5)], r"equal numbers of classes, got \[3, 5\]"),
        (Linear(2), r"labels must lie in \[0, 2\)"),
    ):
        with pytest.raises(InputError, match=said):
            evaluate(model)


# what is evaluated, as Python writes it, and what the one line says of it
REFUSED = {
    # data
    "evaluate(net, DataLoader(TensorDataset(x, y), shuffle=True))": "shuffle=False",
    "evaluate(net, (x,))": "got tuple of 1",
    "evaluate(net, (x, y, y))": "got tuple of 3",
    "evaluate(net, None)": "got NoneType",
    "evaluate(net, (x.numpy().astype(str), y))": "images must be a torch.Tensor, got ndarray",
    "evaluate(net, (x, list('abcabc')))": "labels must be a vector of integers, got list",
    "evaluate(net, (x[:0], y[:0]))": "got (0, 1, 4, 4)",
    "evaluate(net, (x[0], y[:1]))": "got (1, 4, 4)",
    "evaluate(net, (x.flatten(1), y))": "got (6, 16)",
    "evaluate(net, ((x * 255).byte(), y))": "got dtype torch.uint8",
    "evaluate(net, (x.to(torch.float8_e4m3fn), y))": "got dtype torch.float8_e4m3fn",
    "evaluate(net, (x + 1j, y))": "got dtype torch.complex64",
    "evaluate(net, (x + 254, y))": "lie in [0, 1], found the value 25",
    "evaluate(net, (x - 1, y))": "lie in [0, 1], found the value -",
    "evaluate(net, (x * math.nan, y))": "found the value nan",
    "evaluate(net, (x / 0, y))": "found the value inf",
    "evaluate(net, (x.to_sparse(), y))": "must be dense",
    "evaluate(net, (x.to('meta'), y))": "on meta",
    "evaluate(net, (torch.rand(6, 8, 9, 3), y))": "(6, 8, 9, 3), which looks like (B, H, W,",
    "evaluate(net, (torch.rand(6, 8, 8, 1), y))": "(6, 8, 8, 1), which looks like (B, H, W,",
    "evaluate(net, (torch.rand(6, 8, 9, 1), y))": "images are (channels, H, W): permute them",
    "evaluate(net, (x, y.float()))": "got shape (6,) of torch.float32",
    "evaluate(net, (x, y > 0))": "of torch.bool",
    "evaluate(net, (x, F.one_hot(y)))": "got shape (6, 3) of torch.int64",
    "evaluate(net, (x, y[:4]))": "got 4 labels for 6 images",
    "evaluate(net, (x, y - 1))": "labels must lie in [0, ...), found -1",
    "evaluate(net, (x, y + 2**62))": "labels must lie in [0, 3), found 4611686018427387906",
    "evaluate(net, 'digit')": "unknown data set 'digit'",
    "evaluate(net, 'npz:/nowhere.npz')": "/nowhere.npz: no such file",
    # networks
    "evaluate(None, (x, y))": "got NoneType",
    "evaluate(Linear, (x, y))": "got the class Linear: create an instance of it",
    "evaluate(lambda x: x, (x, y))": "members must give (B, C) logits",
    "evaluate([], (x, y))": "got an empty list",
    "evaluate([net, None], (x, y))": "got NoneType as element 1",
    "evaluate(net.state_dict(), (x, y))": "got OrderedDict",
    "evaluate(nn.ModuleDict({'a': net}), (x, y))": 'missing the required "forward" function',
    "evaluate([net, Linear(classes=4)], (x, y))": "equal numbers of classes, got [3, 4]",
    "evaluate(Linear(classes=1), (x, y))": "two classes or more, got (",
    "evaluate(Linear(classes=0), (x, y))": "two classes or more, got (",
    "evaluate(Linear(lambda z: {'logits': z}), (x, y))": "got a dict for B = ",
    "evaluate(Linear(lambda z: (z, z)), (x, y))": "got a tuple for B = ",
    "evaluate(Linear(lambda z: z.detach().numpy()), (x, y))": "got a ndarray for B = ",
    "evaluate(Linear(lambda z: z[0]), (x, y))": "got (3,) for B = ",
    "evaluate(net.to('meta'), (x, y))": "the weight members.0.head.weight has no values",
    "evaluate(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), (x, y))": "has no values",
    # attacks and ensembles of their own
    "attack(None)": "got NoneType",
    "attack(lambda x: x)": "members must give (B, C) logits",
    "attack(Linear(lambda z: {'logits': z}))": "got a dict for B = 6",
    "attack(net, threat=None)": "threat must be a redefense.Threat",
    "attack(net, y=y.float())": "of torch.float32",
    "attack(net, y=y + 1)": "labels must lie in [0, 3), found 3",
    "attack(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))": "has no values",
    "PGD(steps=1.5)": "steps must be a whole number, got 1.5",
    "PGD(restarts='2')": "restarts must be a whole number, got '2'",
    "Square(p_init='all')": "p_init must be a number, got 'all'",
    "Independent(nn.Sequential(net, net))": "got Sequential where a list was expected",
    "Independent(None)": "got NoneType",
    "Independent(['net'])": "got str as element 0",
    "Independent([])": "at least one member",
    "Independent([Linear(lambda z: (z,))])(x)": "got a tuple for B = 6",
    "Independent([net])(x.numpy())": "got ndarray",
    # settings
    "evaluate(net, (x, y), suite='quik')": "unknown suite 'quik' (did you mean quick?)",
    "evaluate(net, (x, y), suite='mine.json')": "mine.json",
    "evaluate(net, (x, y), seed=-1)": "seed must be a whole number of at least 0, got -1",
    "evaluate(net, (x, y), seed=1.5)": "got 1.5",
    "evaluate(net, (x, y), seed=None)": "got None",
    "evaluate(net, (x, y), seeds=0)": "seeds must be a whole number of at least 1, got 0",
    "evaluate(net, (x, y), images=0)": "images must be a whole number of at least 1, got 0",
    "evaluate(net, (x, y), images=2.0)": "got 2.0",
    "evaluate(net, (x, y), images=True)": "got True",
    "evaluate(net, (x, y), images=7)": "must lie in [1, 6], got 7",
    "evaluate(net, (x, y), checks='none')": "checks must be quick or full, got 'none'",
    "evaluate(net, (x, y), threat=('inf', 0.1))": "threat must be a redefense.Threat",
    "evaluate(net, (x, y), mixture=[1.0])": "mixture requires a list of networks",
    "evaluate([net, net], (x, y), mixture=[1.0])": "for each of 2 members, got shape (1,)",
    "evaluate([net, net], (x, y), mixture=[0.5, 0.6])": "sum to 1, got [0.5, 0.6]",
    "evaluate([net, net], (x, y), mixture=[-1, 2])": "sum to 1, got [-1.0, 2.0]",
    "evaluate([net, net], (x, y), mixture=[math.nan, 1])": "sum to 1, got [nan, 1.0]",
    "evaluate([net, net], (x, y), mixture=[None, 1])": "got [None, 1]",
    "evaluate([net, net], (x, y), mixture='ab')": "got 'ab'",
    "evaluate([net, net], (x, y), mixture=torch.ones(2, device='meta'))": "list of probabilities",
    "Stochastic(net, draws=0)": "draws must be a whole number of at least 1, got 0",
    "Stochastic(net, draws=2.5)": "got 2.5",
    "Stochastic(net, draws='4')": "got '4'",
    "Stochastic(net, seed=None)": "seed must be a whole number of at least 0, got None",
    "GaussianNoise(net, sigma='x')": "sigma must be a number >= 0, and finite, got 'x'",
    "NoiseLayers(net, inner=math.nan)": "got nan",
    "ResizeAndPad(net, largest=math.inf)": "got inf",
    "Threat(eps=-0.1)": "not negative, got -0.1",
    "Threat(eps=math.nan)": "finite number, or a fraction such as 8/255, got nan",
    "Threat(eps=None)": "got None",
    "Threat(eps=True)": "got True",
    "Threat(eps='8/0')": "got '8/0'",
    "Threat(norm=3)": "threat norm must be 'inf' or '2' (or 'linf', 'l2'), got 3",
    "Threat(norm=None)": "got None",
    # export
    "export(net, out, about)": "such as Independent([network]), got Linear",
    "export(Independent([net]), out, About(shape=(4, 4), classes=['a']))": "got (4, 4)",
    "export(Independent([net]), out, About(shape=(1, 4, 4), classes='abc'))": "got 'abc'",
    "export(Independent([net]), out, about, probes=x.numpy())": "got ndarray",
    "export(Independent([Linear(classes=4)]), out, about)": "shape (64, 4) for 64 images",
    "export(Independent([Linear(lambda z: z.log())]), out, about)": "not all finite",
}

SCRIPT = """
import json, math, sys, tempfile, redefense, torch
import torch.nn.functional as F
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from redefense import Independent, Threat, evaluate
from redefense.attacks import PGD, Square
from redefense.export import About, export
from redefense.stochastic import GaussianNoise, NoiseLayers, ResizeAndPad, Stochastic

class Linear(nn.Module):
    def __init__(self, change=lambda z: z, classes=3):
        super().__init__()
        self.head, self.change = nn.Linear(16, classes), change
    def forward(self, x):
        return self.change(self.head(x.flatten(1)))

def attack(victim, **changes):
    given = {"x": x, "y": y, "threat": Threat(), **changes}
    return PGD()(victim, **given, rng=torch.Generator())

x, y, found = torch.rand(6, 1, 4, 4), torch.arange(6) % 3, []
about, out = About(shape=(1, 4, 4), classes=["a", "b", "c"]), Path(tempfile.mkdtemp()) / "bundle"
for expression in json.load(sys.stdin):
    net = Linear()
    try:
        eval(expression)
    except redefense.RedefenseError as error:
        found.append([error.code, str(error)])
    else:
        found.append([0, "was taken"])
    assert not out.exists()
json.dump(found, sys.stdout)
"""


MASKED = """
from torch import nn
class Masked(nn.Module):
    def forward(self, x):
        return x.flatten(1).detach()
x = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
evaluate(Masked(), (x, torch.arange(8) % 4))
"""


@pytest.fixture(scope="module")
def unchecked() -> subprocess.CompletedProcess[str]:
    """Both programs in a process of its own, without the type checks of this test run."""
    warned = (
        f"import warnings; warnings.resetwarnings(); exec(compile({MASKED!r}, 'my.py', 'exec'))"
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT + warned],
        input=json.dumps(list(REFUSED)), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_types_would_forbid_is_one_line_for_those_who_check_none(
    unchecked: subprocess.CompletedProcess[str],
) -> None:
    assert unchecked.returncode == 0, unchecked.stderr
    for (expression, says), (code, line) in zip(
        REFUSED.items(), json.loads(unchecked.stdout), strict=True
    ):
        assert says in line, expression
        assert code in (2, 3), expression
        assert "\n" not in line, expression


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
    assert isinstance(warning := caught[-1].message, redefense.RedCheckWarning)
    assert warning.report is not None  # whoever raises warnings keeps the measurement
    assert warning.report.headline == report.headline


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


def test_a_warning_points_at_the_line_that_asked(
    unchecked: subprocess.CompletedProcess[str],
) -> None:
    assert "my.py:7: RedCheckWarning: S22" in unchecked.stderr
