"""`redefense.train` takes names and objects, and trains what the command trains."""

from dataclasses import dataclass
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
from redefense.defences import Defence, Vanilla
from redefense.ensembles import Ensemble, Hyper, Independent
from redefense.ensembles.configs import IndependentConfig
from redefense.errors import ConfigError, DataError, InputError, ModelError
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.threat import Threat
from redefense.train.experiment import train as train_run
from redefense.train.loading import checked_path
from redefense.types import Batch

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


@dataclass(frozen=True, kw_only=True)
class Wrong(Defence):
    """A loss that is a tensor, where parts must be yielded."""

    yields: bool = False

    def loss(self, ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Any:
        total = torch.zeros((), requires_grad=True)
        return iter([total]) if self.yields else total


@pytest.mark.parametrize("yields", [True, False])
def test_a_loss_that_yields_no_parts_is_refused(yields: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stage 'joint' must yield .*Loss, got a Tensor"):
        redefense.train(networks(), Wrong(yields=yields), stripes(), out=tmp_path / "run", **BUDGET)


def failing(*_: object, **__: object) -> None:
    raise KeyError(7)


def test_a_run_on_networks_given_is_resumed_with_equal_ones_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data = tmp_path / "run", stripes()
    first = redefense.train(networks(), "vanilla", data, out=out, **BUDGET)
    # in another process the networks of the first call are not known
    monkeypatch.setattr(plugins.registry("models"), "_added", {})
    others = [flat(2, (1, 8, 8)) for _ in range(2)]
    with pytest.raises(ConfigError, match="models that were given as objects: pass equal ones"):
        redefense.train(others, "vanilla", data, out=out, resume=True, **BUDGET)
    again = redefense.train(networks(), "vanilla", data, out=out, resume=True, **BUDGET)
    assert same(again.ensemble, first.ensemble)


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
    scripted = torch.jit.script(nn.Flatten())
    redefense.register(models={"fails": failing}, datasets={"fails": failing})
    hyper = Hyper([convolutions], unit=16, embedding=4, hidden=4, rng=stream(0, "h"))
    for ensemble, defence, data, error, said in (
        (hyper, "vanilla", "digits", InputError, "give its settings"),
        (3, "vanilla", "digits", InputError, "must be a recipe"),
        ("absent", "vanilla", "digits", ConfigError, "neither a recipe nor a model"),
        ("linear", None, "digits", ConfigError, "needs defence"),
        ("linear", 3, "digits", ConfigError, "must be a name, settings or a Defence"),
        (nn.LazyLinear(2), "vanilla", "digits", InputError, "load or initialise the network"),
        (scripted, "vanilla", "digits", InputError, "a scripted or traced network cannot be"),
        ("fails", "vanilla", "digits", ConfigError, r"model fails failed when called.*KeyError: 7"),
        ("linear", "vanilla", "fails", DataError, "data set fails cannot be read: KeyError: 7"),
    ):
        with pytest.raises(error, match=said):
            redefense.train(ensemble, defence, data, out=tmp_path / "run")
    flat_to = [nn.Sequential(nn.Flatten(), nn.Linear(*sizes)) for sizes in ((64, 10), (64, 11))]
    small = nn.Sequential(nn.Flatten(), nn.Linear(15, 10))
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
    for members, said in (
        (small, "cannot take images"),
        (frozen, "no parameter that requires a gradient"),
        (flat_to, "member 1 has outputs for 11 classes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "member 0 has outputs for 3 classes"),
    ):
        with pytest.raises(ModelError, match=said):
            redefense.train(members, "vanilla", "digits", out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("defence", "said"),
    [
        ("adp", "adp needs fewer members than classes, got 2 members for 2 classes"),
        ("dverge", "dverge needs networks with feature taps, Sequential has none"),
        *((name, "starts member 2 as a copy of member 1, but their tensors have other shapes")
          for name in ({"name": "mrboost", "persistent": True}, "barre", "fork", "snapshots")),
    ],
)  # fmt: skip
def test_members_that_a_method_cannot_train_are_refused_before_anything_is_written(
    defence: Any, said: str, tmp_path: Path
) -> None:
    x, y = torch.rand(40, 1, 2, 2, generator=stream(0, "images")), torch.arange(40) % 2
    members = [
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)),
    ]
    with pytest.raises(ConfigError, match=said):
        redefense.train(
            members, defence, ((x, y), (x, y)), out=tmp_path / "run", epochs=2, quiet=True
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [None, 3, b"run", ["run"]], ids=repr)
def test_what_is_no_path_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="expected the path of a folder"):
        checked_path(value)


def test_settings_of_the_optimizer_change_those_of_a_recipe_alone(tmp_path: Path) -> None:
    for number, (given, changed) in enumerate([({}, {}), ({"lr": 0.05}, {"lr": 0.05})]):
        run = redefense.train("digits-vanilla", optim=given, out=tmp_path / str(number), **BUDGET)
        base = recipe("digits-vanilla").optim
        assert run.config.optim == base.model_copy(update=changed)


def test_a_mixture_is_not_dropped_without_a_word(tmp_path: Path) -> None:
    nets = networks()
    with pytest.raises(InputError, match=r"equal probabilities, got the mixture \[0\.9"):
        redefense.train(
            Independent(nets, [0.9, 0.1]), "vanilla", stripes(), out=tmp_path / "run", **BUDGET
        )
    assert not (tmp_path / "run").exists()
    even = redefense.train(Independent(nets), "vanilla", stripes(), out=tmp_path / "run", **BUDGET)
    assert even.ensemble.shares() == [0.5, 0.5]
