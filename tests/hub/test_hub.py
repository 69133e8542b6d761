"""Folders as model hubs keep them, and ensembles as other libraries expect classifiers."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import redefense
from redefense.config import override
from redefense.ensembles import Ensemble, Hyper, Independent
from redefense.ensembles.configs import IndependentConfig
from redefense.errors import CheckpointError, ConfigError, DataError, InputError
from redefense.evaluation.api import evaluate_run
from redefense.hub import to_art, to_foolbox, to_robustbench
from redefense.hub.pretrained import save_pretrained
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.train.api import TrainedRun
from redefense.train.experiment import train

TINY = ["epochs=1", "data.images=64", "ensemble.width=16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "plain"
    train(override(recipe("digits-vanilla"), TINY), out, quiet=True)
    return out


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(4, 1, 8, 8, generator=stream(0, "images"))


def same(one: Ensemble, other: Ensemble, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one.member_logits(x), other.member_logits(x))


def test_saved_ensembles_are_loaded_with_bit_identical_weights(
    run: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    ensemble = redefense.load(run)
    ensemble.set_mixture([0.5, 0.3, 0.2])
    folder = ensemble.save_pretrained(tmp_path / "saved")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    back = redefense.from_pretrained(folder)
    assert same(ensemble, back, images)
    assert back.mixture.tolist() == ensemble.mixture.tolist()
    assert not back.training
    assert same(back, redefense.from_pretrained(back.save_pretrained(tmp_path / "again")), images)


def test_compact_ensembles_stay_compact_and_kinds_are_distinguished(
    run: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    changes = ["epochs=1", "data.images=64"]
    compact = train(override(recipe("digits-ps-red"), changes), tmp_path / "run", quiet=True)
    compact.save_pretrained(tmp_path / "compact")
    stored = load_file(tmp_path / "compact" / "model.safetensors")
    assert stored.keys() == compact.state_dict().keys()
    back = Hyper.from_pretrained(tmp_path / "compact")
    assert same(compact, back, images)
    with pytest.raises(InputError, match="of the kind Hyper, not Independent"):
        Independent.from_pretrained(tmp_path / "compact")


def test_no_path_of_this_machine_is_saved(run: Path, tmp_path: Path) -> None:
    ensemble = redefense.load(run)
    assert ensemble.origin is not None
    data = ensemble.origin.run.data.model_copy(update={"spec": "cifar10:/home/me/secret"})
    origin = ensemble.origin.run.model_copy(update={"data": data})
    ensemble.origin = type(ensemble.origin)(origin, ensemble.origin.data, ensemble.origin.path)
    ensemble.save_pretrained(tmp_path / "saved")
    for file in ("config.json", "README.md"):
        text = (tmp_path / "saved" / file).read_text()
        assert "secret" not in text
        assert str(run.parent) not in text


def test_the_card_quotes_the_evaluation_only_of_these_weights(run: Path, tmp_path: Path) -> None:
    ensemble = redefense.load(run)
    (run / "evaluation").mkdir()
    # a file manager's copy, which `report` skips, too
    (run / "evaluation" / "._quick.json").write_text("no evaluation")
    ensemble.save_pretrained(tmp_path / "before")
    assert "Nothing was measured" in (tmp_path / "before" / "README.md").read_text()
    report, _ = evaluate_run(run, images=20)
    ensemble.save_pretrained(tmp_path / "measured", name="me/robust")
    card = (tmp_path / "measured" / "README.md").read_text()
    assert 'redefense.from_pretrained("me/robust")' in card
    assert f"value: {round(100 * report.headline['aware'], 2)}" in card
    handed_on = redefense.from_pretrained(tmp_path / "measured").save_pretrained(tmp_path / "on")
    assert (handed_on / "README.md").read_text() == card
    with torch.no_grad():
        next(ensemble.parameters()).add_(0.1)
    ensemble.save_pretrained(tmp_path / "changed")
    assert "Nothing was measured" in (tmp_path / "changed" / "README.md").read_text()


def broken(folder: Path, source: Path, change: dict[str, Any]) -> Path:
    """A copy of a saved ensemble whose configuration is changed."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


def test_what_does_not_fit_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    saved = redefense.load(run).save_pretrained(tmp_path / "saved")
    settings = json.loads((saved / "config.json").read_text())["run"]

    def refused(folder: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            redefense.from_pretrained(folder)

    def ensemble(name: str, **changes: Any) -> Path:
        changed = {**settings, "ensemble": {**settings["ensemble"], **changes}}
        return broken(tmp_path / name, saved, {"run": changed})

    refused(broken(tmp_path / "a", saved, {"schema": 7}), "schema 7")
    refused(broken(tmp_path / "b", saved, {"format": "other"}), "does not describe")
    refused(broken(tmp_path / "c", saved, {"data": {}}), "describes no ensemble")
    refused(broken(tmp_path / "d", saved, {"run": {"_target_": "os.system"}}), "unknown setting")
    refused(ensemble("e", num_members=10**9), "more members than there are tensors")
    refused(ensemble("f", num_members=2), "does not fit its run")
    refused(ensemble("f2", num_members="many"), "describes no ensemble")
    refused(ensemble("g", width=32), "does not fit its run")
    with pytest.raises(ConfigError, match="unknown model"):
        redefense.from_pretrained(ensemble("h", model="os.system"))
    weights = load_file(saved / "model.safetensors")
    name = next(key for key, value in weights.items() if value.is_floating_point())
    damaged = broken(tmp_path / "i", saved, {})
    save_file(weights | {name: weights[name] * torch.nan}, damaged / "model.safetensors")
    refused(damaged, f"non-finite numbers in {name}")
    (damaged / "model.safetensors").write_bytes(b"\x00" * 20)
    refused(damaged, "cannot be read")
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    refused(damaged, "holds no model.safetensors; weights in any other format are not read")
    refused(tmp_path / "nowhere", "there is no folder")
    with pytest.raises(ConfigError, match="has no revision"):
        redefense.from_pretrained(saved, revision="main")


def test_a_trained_run_is_saved_as_its_ensemble(run: Path, tmp_path: Path) -> None:
    ensemble = redefense.load(run)
    assert ensemble.origin is not None
    trained = TrainedRun(ensemble, ensemble.origin.run, run)
    for name, it in (("run", trained), ("ensemble", ensemble)):
        save_pretrained(it, tmp_path / name, name="me/robust")
    for file in ("config.json", "README.md", "model.safetensors"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("run", "ensemble"))
        assert one == other


def test_networks_put_together_by_hand_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="put together by hand"):
        Independent([nn.Flatten()]).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_without_huggingface_hub_only_the_hub_cannot_be_used(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"me/red is no folder here; .*-e '\.\[hub\]'"):
        redefense.from_pretrained("me/red")
    with pytest.raises(ConfigError, match=r"-e '\.\[hub\]'"):
        redefense.load(run).push_to_hub("me/red")


def test_a_folder_is_uploaded_to_the_hub_and_downloaded(
    run: Path, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in that has the client's documented calls."""
    stored: dict[str, Any] = {}

    class HfApi:
        def __init__(self, token: str | None = None) -> None:
            stored["token"] = token

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            stored["repo"] = (repo_id, private, exist_ok)

        def upload_folder(
            self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str
        ) -> SimpleNamespace:
            target = tmp_path / "hub"
            target.mkdir()
            for path in folder_path.iterdir():
                (target / path.name).write_bytes(path.read_bytes())
            return SimpleNamespace(commit_url=f"hub/{repo_id}")

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if repo_id != "me/red":
            raise OSError(f"404: {repo_id}")
        stored["asked"] = (revision, allow_patterns)
        return str(tmp_path / "hub")

    client = ModuleType("huggingface_hub")
    vars(client).update(HfApi=HfApi, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    ensemble = redefense.load(run)
    assert ensemble.push_to_hub("me/red", private=True, token="t") == "hub/me/red"
    assert stored["repo"] == ("me/red", True, True)
    assert stored["token"] == "t"
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    assert same(ensemble, redefense.from_pretrained("me/red", revision="abc"), images)
    # nothing but these two is fetched, so no pickle and no code can come along
    assert stored["asked"] == ("abc", ["config.json", "model.safetensors"])
    with pytest.raises(DataError, match="cannot fetch me/none from the hub: 404"):
        redefense.from_pretrained("me/none")


def test_other_libraries_get_a_classifier_of_images_in_0_1(
    run: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins that take the documented arguments of both constructors."""

    class PyTorchModel:
        def __init__(
            self, model: nn.Module, bounds: tuple[float, float], device: Any = None
        ) -> None:
            self.model, self.bounds, self.device = model, bounds, device

    class PyTorchClassifier:
        def __init__(
            self, model: nn.Module, loss: nn.Module, input_shape: tuple[int, ...],
            nb_classes: int, *, clip_values: tuple[float, float], device_type: str = "gpu",
        ) -> None:  # fmt: skip
            self.model, self.clip_values, self.device_type = model, clip_values, device_type
            self.input_shape, self.nb_classes = input_shape, nb_classes

    foolbox = ModuleType("foolbox")
    vars(foolbox)["PyTorchModel"] = PyTorchModel
    art = ModuleType("art.estimators.classification")
    vars(art)["PyTorchClassifier"] = PyTorchClassifier
    for module in (foolbox, ModuleType("art"), ModuleType("art.estimators"), art):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ensemble = redefense.load(run)
    for view in (ensemble.member(0), ensemble.averaged()):
        assert to_foolbox(view).model is view
    box = to_foolbox(ensemble)
    assert box.bounds == (0, 1)
    assert box.device == torch.device("cpu")
    classifier = to_art(ensemble, shape=(1, 8, 8), num_classes=10)
    assert classifier.clip_values == (0.0, 1.0)
    assert (classifier.input_shape, classifier.nb_classes) == ((1, 8, 8), 10)
    assert classifier.device_type == "cpu"
    with torch.no_grad():
        every = ensemble.member_logits(images)
        # each image is answered by one of the members, never by a mixture of them
        for model in (box.model, classifier.model):
            nearest = (model(images) - every).abs().amax(-1).amin(0)
            assert bool((nearest < 1e-5).all())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    monkeypatch.setitem(sys.modules, "art", None)
    with pytest.raises(ConfigError, match="pip install foolbox"):
        to_foolbox(nn.Flatten())
    with pytest.raises(ConfigError, match="pip install adversarial-robustness-toolbox"):
        to_art(nn.Flatten(), shape=(1, 8, 8), num_classes=10)


def test_robustbench_gets_members_and_the_average_but_never_the_draw(
    run: Path, images: torch.Tensor
) -> None:
    ensemble = redefense.load(run)
    for m in range(ensemble.num_members):
        assert to_robustbench(ensemble.member(m), images) is ensemble.member(m)
    averaged = to_robustbench(ensemble.averaged(), images)
    np.testing.assert_allclose(averaged(images).exp().sum(1).tolist(), 1.0, rtol=1e-5)
    hidden = nn.Sequential(nn.Identity(), ensemble.sampled())
    for view in (ensemble, ensemble.sampled(), ensemble.sampled(per="image"), hidden):
        with pytest.raises(InputError, match="the sampled ensemble is not eligible"):
            to_robustbench(view, images)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) * torch.rand(1)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Noisy(), "deterministic"),
        (nn.Sequential(nn.Flatten(), nn.Softmax(-1)), "probabilities"),
        (nn.Sequential(nn.Flatten(), nn.Hardtanh(-2.0, -1.0)), "vanishes"),
        (nn.Identity(), "must give"),
    ],
)
def test_the_contract_names_the_rule_that_is_broken(
    model: nn.Module, match: str, images: torch.Tensor
) -> None:
    with pytest.raises(InputError, match=match):
        to_robustbench(model, images)


def test_published_weights_answer_as_where_they_come_from(tmp_path: Path) -> None:
    """An ensemble by the names of DVERGE's files: `model_0`, `model.conv1`, `normalizer.mean`."""
    kind = IndependentConfig(
        model="resnet8", num_members=2, width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1)
    )
    source = kind.build(num_classes=4, shape=(3, 8, 8), seed=3).eval()
    layers = {"stem": "conv1", "stem_bn": "bn1", "classifier": "fc", "normalise": "normaliser"}
    file: dict[str, dict[str, torch.Tensor]] = {}
    for m in range(2):
        state = source.member(m).state_dict()
        named = {}
        for key, value in state.items():
            part, _, rest = key.partition(".")
            if part == "blocks":
                number, _, rest = rest.partition(".")
                part = f"layer{int(number) + 1}.0"
            inner = f"{layers.get(part, part)}.{rest.replace('shortcut', 'downsample')}"
            named[inner if part == "normalise" else f"model.{inner}"] = value
        file[f"model_{m}"] = named
    torch.save(file, path := tmp_path / "members.pth")
    x = torch.rand(4, 3, 8, 8, generator=stream(0, "x"))
    asked: dict[str, Any] = {
        "model": {"model": "resnet8", "width": 4},
        "num_classes": 4,
        "shape": (3, 8, 8),
    }
    assert same(redefense.from_pretrained(path, **asked), source, x)
    # without a stored normalisation that of the settings is used, or said to be missing
    for state in file.values():
        mean, std = state.pop("normaliser.mean"), state.pop("normaliser.std")
    torch.save(file, path)
    with pytest.warns(UserWarning, match="states no normalisation of images"):
        assert not same(redefense.from_pretrained(path, **asked), source, x)
    own: dict[str, Any] = {
        "model": "resnet8",
        "width": 4,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    assert same(redefense.from_pretrained(path, **{**asked, "model": own}), source, x)


def test_published_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    net = IndependentConfig(num_members=1, width=4).build(num_classes=4, shape=(3, 8, 8), seed=0)
    save_file(dict(net.member(0).state_dict()), path := tmp_path / "net.safetensors")
    asked: dict[str, Any] = {"model": {"model": "resnet8", "width": 4}, "shape": (3, 8, 8)}
    with pytest.raises(ConfigError, match="name the model of its weights"):
        redefense.from_pretrained(path)
    with pytest.raises(DataError, match=r"classifier\.weight, classifier\.bias of member 0"):
        redefense.from_pretrained(path, **asked)
    with pytest.raises(ConfigError, match="unknown model 'resnet9'"):
        redefense.from_pretrained(path, model="resnet9")
    with pytest.raises(ConfigError, match="mean and std must be 3 numbers each"):
        redefense.from_pretrained(path, model={"model": "resnet8", "mean": [0.5]})
    with pytest.raises(DataError, match="cannot read weights"):
        redefense.from_pretrained(tmp_path / "none.pt", model="resnet8")
