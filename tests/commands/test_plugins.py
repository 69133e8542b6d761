"""Names of the user's own: registered, in files, and as entry points of distributions."""

import json
import math
import shutil
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import redefense
from cli_tools import Result, command
from redefense import plugins
from redefense.attacks import ATTACKS, FGSM, PGD, foreign
from redefense.config import override
from redefense.conformance import check_file
from redefense.data import load_dataset
from redefense.errors import ConfigError, DataError, InputError, RedCheckWarning
from redefense.evaluation.inputs.objects import suite_of
from redefense.evaluation.suite import SUITES
from redefense.models import build
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.threat import Threat, norms
from redefense.train.loading import resolve

EXAMPLE = Path(__file__).parents[1] / "tools" / "plugin_example.py"
NAMES = {
    "attacks": ["one-step"], "defences": ["smoothed"], "models": ["flat"],
    "datasets": ["stripes"], "recipes": ["stripes-smoothed"], "suites": ["mine"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def installed_names_are_looked_up_again() -> Iterator[None]:
    """What a test makes of the installed plug-ins ends with it."""
    yield
    plugins._installed.cache_clear()


def anew(*words: str | Path) -> Result:
    """A command of a process that knows no plug-ins yet."""
    for kind in plugins.MODULES:
        plugins.registry(kind)._added.clear()
    plugins._loaded.clear()
    return command(*words)


def test_a_file_registers_names_of_every_kind_and_they_keep_their_contracts() -> None:
    assert plugins.load_file(EXAMPLE) == NAMES
    assert plugins.load_file(EXAMPLE) == NAMES  # not run a second time
    for kind, (name,) in NAMES.items():
        origin = plugins.registry(kind).origin(name)
        assert origin is not None
        assert origin["file"] == EXAMPLE.name
    assert [(it.name, it.passed) for it in check_file(EXAMPLE)] == [
        (f"{kind}.{name}", True) for kind, (name,) in NAMES.items()
    ]


def test_commands_take_a_plugin_and_records_name_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    plugin = ("--plugin", EXAMPLE)
    listed = anew("list", "attacks", "--json", *plugin)
    names = {entry["name"]: entry["summary"] for entry in json.loads(listed.out)}
    assert names["one-step"] == "One signed step (from the file plugin_example.py)"
    trained = anew("train", "stripes-smoothed", *plugin, "--out", run, "--quiet")
    assert trained.code == 0, trained.err
    record = json.loads((run / "run.json").read_text())
    named = {f"{kind}.{NAMES[kind][0]}" for kind in ("recipes", "datasets", "models", "defences")}
    assert record["plugins"].keys() == named
    refused = anew("evaluate", run)
    assert refused.code == 2
    assert "'flat' of the file plugin_example.py" in refused.err
    done = anew("evaluate", run, "--suite", "mine", *plugin, "--quiet")
    assert done.code == 0, done.err
    found = json.loads((run / "evaluation" / "mine.json").read_text())
    assert found["provenance"]["plugins"].keys() == {"suites.mine", "datasets.stripes"}
    assert [cell["attack"] for cell in found["cells"]] == ["pgd", "one_step"]
    assert anew("report", run, "--out", tmp_path / "report.html").code == 0
    again = f"--suite mine --eps 0.03 --norm inf --seed 0 --no-cascade --plugin {EXAMPLE.name}"
    assert again in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import redefense\n\nredefense.register(attacks={'pgd': print})", "redefense's own"),
        ("import redefense\nredefense.register(defences={'mine': 3})", "must be a Defence class"),
        ("x = 1\n1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("def f(:", "line 1: SyntaxError"),
        ("x = 1", "registers nothing"),
        ("import sys\nsys.exit(3)", "line 2: SystemExit: 3"),
        ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E", "line 3: E"),
    ],
    ids=["own", "no-class", "raises", "syntax", "empty", "exits", "no-text"],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(
    text: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        plugins.load_file(file)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="No such file"):
        plugins.load_file(tmp_path / "absent.py")


def test_what_a_plugin_prints_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import redefense\nprint('loaded')\n"
        "redefense.register(attacks={'still': lambda model, x, y: x})"
    )
    plugins.load_file(file)
    assert capsys.readouterr() == ("", "loaded\n")


def test_an_error_in_a_plugin_is_told_from_one_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import redefense\n\n\ndef model(classes, shape):\n    return shape.missing\n\n\n"
        "redefense.register(models={'broken': model})\n"
    )
    plugins.load_file(file)
    with pytest.raises(ConfigError, match="model broken failed when called") as refused:
        build("broken", num_classes=2, shape=(1, 8, 8), generator=stream(0))
    assert refused.value.__cause__ is not None
    assert plugins.raised_in(refused.value.__cause__) == "mine.py, line 5"
    with pytest.raises(ZeroDivisionError) as ours:
        _ = 1 / 0
    assert plugins.raised_in(ours.value) is None


def test_nothing_is_registered_unless_all_can_be() -> None:
    with pytest.raises(ConfigError, match="a name must begin with a letter or digit"):
        redefense.register(attacks={"fine": FGSM, "not fine": FGSM})
    assert "fine" not in ATTACKS
    with pytest.raises(ConfigError, match="unknown attack 'missing'"):
        redefense.register(attacks={"fine": FGSM}, suites={"mine": ["fine", "missing"]})
    assert "fine" not in ATTACKS
    assert "mine" not in SUITES


def test_a_suite_may_name_attacks_that_are_registered_with_it() -> None:
    redefense.register(suites={"mine": ["still"]}, attacks={"still": lambda model, x, y: x})
    (cell,) = SUITES["mine"].cells
    assert cell.attack == "still"


class _Installed(Distribution):
    """A distribution with one entry point."""

    def read_text(self, filename: str) -> str | None:
        return "Metadata-Version: 2.1\nName: others\nVersion: 1.2\n"

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


def test_entry_points_are_names_with_distribution_and_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = {"good": "redefense.attacks:BIM", "bad": "redefense.attacks:Absent"}
    points = [EntryPoint(name, value, "redefense.attacks") for name, value in target.items()]
    points = [point._for(_Installed()) for point in points]  # type: ignore[attr-defined]  # as importlib ties them to a distribution

    def installed(group: str) -> list[EntryPoint]:
        return points if group == "redefense.attacks" else []

    monkeypatch.setattr(plugins, "entry_points", installed)
    plugins._installed.cache_clear()
    assert ATTACKS["good"] is ATTACKS["bim"]
    assert ATTACKS.origin("good") == {"distribution": "others", "version": "1.2"}
    assert {"good", "bad"} < set(ATTACKS)
    with pytest.raises(ConfigError, match=r"'bad' of the plug-in others 1\.2 cannot be loaded"):
        ATTACKS["bad"]
    with pytest.raises(KeyError):
        ATTACKS["absent"]


def linear(seed: int) -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=stream(seed, "linear"))
    return net.eval()


def images(net: nn.Module) -> tuple[Tensor, Tensor]:
    x = 0.2 + 0.6 * torch.rand(40, 1, 8, 8, generator=stream(0, "x"))
    return x, net(x).argmax(1)


def signed(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    loss = torch.nn.functional.cross_entropy(model(x.requires_grad_()), y, reduction="sum")
    return x + eps * torch.autograd.grad(loss, x)[0].sign()


def test_a_suite_of_objects_measures_what_the_names_measure() -> None:
    net = linear(0)
    data, threat = images(net), Threat(eps=0.03)
    mine = redefense.evaluate(net, data, [FGSM(), signed, "pgd"], threat)
    ours, function, named = mine.data["cells"]
    assert function["accuracy"] == ours["accuracy"]  # the same point by other code
    assert 0 < function["accuracy"]["expected"] < 1
    assert named["repr"] == repr(PGD())
    # everybody who attacks one network knows it
    assert mine.headline["aware"] == min(c["accuracy"]["expected"] for c in mine.data["cells"])


def test_who_leaves_the_ball_is_judged_inside_it_and_that_is_said() -> None:
    net = linear(0)
    data, threat = images(net), Threat(eps=0.03)

    def far(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return signed(model, x, y, 0.06)

    with pytest.warns(RedCheckWarning, match="far left the ball on 40 images"):
        report = redefense.evaluate(net, data, {"far": far, "near": signed}, threat)
    outside, inside = report.data["cells"]
    assert outside["accuracy"] == inside["accuracy"]  # the nearest point is the shorter step
    assert outside["outside"] == {"images": 40, "furthest": pytest.approx(0.06)}
    assert "outside" not in inside
    assert (report.cells[outside["id"]].linf <= 0.03 + 1e-6).all()


def test_foreign_attacks_leave_the_global_generators_alone() -> None:
    net = linear(0)
    x, y = images(net)

    def noisy(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        return threat.project(x + torch.randn_like(x), x)

    state = torch.get_rng_state()
    attack = foreign(noisy, "noise of mine")()
    first, second, other = (
        attack(net, x, y, Threat(norm="l2", eps=1.0), rng=stream(s, "a")) for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert (norms(first - x, 2.0) <= 1 + 1e-5).all()
    with pytest.raises(InputError, match="must return floating-point images of shape"):
        foreign(lambda model, x, y: x[:1], "short")()(net, x, y, Threat())


@pytest.mark.parametrize("value", [[], 3, [3], [lambda x: x]], ids=["none", "int", "3", "one"])
def test_what_is_no_suite_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError):
        suite_of(value)


def test_a_suite_in_python_is_one_by_name() -> None:
    suite = SUITES["quick"]
    assert suite_of(suite) is suite
    assert suite_of("quick") is suite


def test_models_are_functions_or_networks_as_they_are() -> None:
    nets = [linear(0), linear(1)]
    redefense.register(models={"given": nets})
    x, _ = images(nets[0])
    for m, net in enumerate(nets):
        made = build("given", num_classes=3, shape=(1, 8, 8), generator=stream(0, "any"), member=m)
        assert made is not net
        assert torch.equal(made(x), net(x))


def test_data_of_ones_own_are_rounded_to_bytes_and_checked() -> None:
    def half() -> Any:
        x, y = torch.full((6, 1, 2, 2), 0.5), torch.arange(6) % 2
        return (x, y), (x[:2], y[:2])

    def wrong() -> Any:
        (x, y), test = half()
        return (x * math.inf, y), test

    def absent() -> Any:
        raise OSError("the store does not answer")

    redefense.register(datasets={"half": half, "wrong": wrong, "absent": absent})
    with pytest.raises(DataError, match="absent cannot be read: OSError: the store does not"):
        load_dataset("absent")
    data = load_dataset("half")
    assert data.train.images.unique().tolist() == [128]
    assert (data.name, data.num_classes, len(data.test)) == ("half", 2, 2)
    with pytest.raises(DataError, match=r"wrong: x_train: images as floats must lie in \[0, 1\]"):
        load_dataset("wrong")


def test_a_run_is_not_resumed_with_an_edited_plugin(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "mine.py"
    file.write_text(EXAMPLE.read_text())
    words = ("train", "stripes-smoothed", "--plugin", file, "--out", run, "--quiet")
    assert anew(*words).code == 0
    assert anew(*words, "--resume").code == 0
    shutil.rmtree(run / "final")
    file.write_text(file.read_text() + "\n# edited\n")
    refused = anew(*words, "--resume")
    assert refused.code == 2
    assert "holds another run (it differs in plugins)" in refused.err


def test_files_of_one_name_are_modules_of_their_own(tmp_path: Path) -> None:
    hinted = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import redefense
from redefense.defences import Vanilla
Weight = float
@dataclass(frozen=True, kw_only=True)
class Mine(Vanilla):
    summary: ClassVar[str] = "hints are looked up in the module"
    weight: Weight = 1.0
redefense.register(defences={"NAME": Mine})
"""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        text = hinted.replace("NAME", name)
        (tmp_path / name / "my.py").write_text(
            text if name == "one" else text.replace("Weight", "Other")
        )
        plugins.load_file(tmp_path / name / "my.py")
    for name in ("one", "two"):
        run = override(recipe("digits-vanilla"), [f"defence.name={name}", "defence.weight=2"])
        assert resolve(run)[0].defence["weight"] == 2.0
