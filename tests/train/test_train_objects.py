"""`redefense.train` takes names and objects, and trains what the command trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import redefense
from plugin_example import Smoothed, flat, stripes
from redefense import plugins
from redefense.config import OptimConfig
from redefense.defences import Vanilla
from redefense.ensembles import Hyper
from redefense.ensembles.configs import IndependentConfig
from redefense.errors import ConfigError, DataError, InputError
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.threat import Threat
from redefense.train.experiment import train as train_run

BUDGET: dict[str, Any] = {"epochs": 1, "batch_size": 64, "quiet": True}


def networks() -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return [flat(2, (1, 8, 8)) for _ in range(2)]


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_recipe_trains_as_the_command_does(tmp_path: Path) -> None:
    changed = recipe("digits-vanilla").model_copy(update={"epochs": 1, "batch_size": 64})
    command = train_run(changed, tmp_path / "command", quiet=True)
    run = redefense.train("digits-vanilla", out=tmp_path / "python", **BUDGET)
    assert same(run.ensemble, command)
    again = redefense.train(
        IndependentConfig(model="digits-cnn"), Vanilla(), "digits", out=tmp_path / "objects",
        optim=OptimConfig(name="adam", lr=3e-3, weight_decay=0.0), threat=Threat(eps=0.2), **BUDGET,
    )  # fmt: skip
    assert same(again.ensemble, command)
    assert (again.config.recipe, run.config.recipe) == ("custom", "digits-vanilla")


def test_objects_are_trained_and_loaded(tmp_path: Path) -> None:
    nets = networks()
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    run = redefense.train(
        nets, Smoothed(smoothing=0.2), stripes(), out=tmp_path / "run", threat=Threat(eps=0.1),
        **BUDGET,
    )  # fmt: skip
    for net, kept in zip(nets, before, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())
    assert run.config.defence == {"name": "Smoothed", "smoothing": 0.2}
    assert run.config.plugins["defences.Smoothed"]["module"] == Smoothed.__module__
    assert same(redefense.load(run), run.ensemble)
    _, test = stripes()
    report = redefense.evaluate(run, test, "quick")
    assert report.threat == Threat(eps=0.1)
    assert report.clean.value == redefense.evaluate(run.ensemble, test, "quick").clean.value
    # the optimizer starts from the weights that were handed over: with a step of nearly no length
    still = redefense.train(
        nets, "vanilla", stripes(), out=tmp_path / "still", optim={"lr": 1e-12}, **BUDGET
    )
    x = test[0]
    for m, net in enumerate(nets):
        torch.testing.assert_close(still.ensemble.member(m)(x), net(x))


def test_a_run_needs_its_plugins_to_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = networks()
    run = redefense.train(nets, "vanilla", stripes(), out=tmp_path / "run", **BUDGET)
    name = run.config.ensemble["model"]
    monkeypatch.setattr(plugins.registry("models"), "_added", {})
    with pytest.raises(ConfigError, match=f"this needs '{name}' of the module torch"):
        redefense.load(run.path)
    redefense.register(models={name: flat})
    assert same(redefense.load(run.path), run.ensemble)


def failing() -> None:
    raise KeyError(7)


def test_torch_data_sets_are_read_as_their_tensors(tmp_path: Path) -> None:
    (x, y), (x_test, y_test) = stripes()
    sets = TensorDataset(x, y), DataLoader(TensorDataset(x_test, y_test), batch_size=7)
    one, other = (
        redefense.train(networks(), "vanilla", data, out=tmp_path / name, **BUDGET)
        for name, data in (("tensors", ((x, y), (x_test, y_test))), ("sets", sets))
    )
    assert same(one.ensemble, other.ensemble)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    convolutions = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3))
    scripted = torch.jit.script(nn.Flatten())  # type: ignore[no-untyped-call]  # untyped in torch
    redefense.register(models={"fails": lambda classes, shape: {}[7]}, datasets={"fails": failing})
    hyper = Hyper([convolutions], unit=16, embedding=4, hidden=4, rng=stream(0, "h"))
    for ensemble, defence, data, error, said in (
        (hyper, "vanilla", "digits", InputError, "give its settings"),
        (3, "vanilla", "digits", InputError, "must be a recipe"),
        ("absent", "vanilla", "digits", ConfigError, "neither a recipe nor a model"),
        ("linear", None, "digits", ConfigError, "needs defence"),
        ("linear", 3, "digits", ConfigError, "must be a name, settings or a Defence"),
        (scripted, "vanilla", "digits", InputError, "a scripted or traced network cannot be"),
        ("fails", "vanilla", "digits", ConfigError, r"model fails failed when called.*KeyError: 7"),
        ("linear", "vanilla", "fails", DataError, "data set fails cannot be read: KeyError: 7"),
    ):
        with pytest.raises(error, match=said):
            redefense.train(ensemble, defence, data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
