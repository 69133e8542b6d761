"""Starting from the members of another run: the fit of hypernetworks, and the runs."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from redefense.cli import app
from redefense.config import DataConfig, OptimConfig, Run, StartConfig, read_run
from redefense.ensembles import Hyper, Independent
from redefense.ensembles.configs import HyperConfig, IndependentConfig
from redefense.errors import CheckpointError, ConfigError, DataError, Interrupted, RedefenseError
from redefense.models import fitting, hyper
from redefense.models.fitting import Target, fit
from redefense.rng import stream
from redefense.train import loop
from redefense.train.experiment import train
from redefense.train.init_from import adopt, measure_moments
from redefense.train.loading import load
from redefense.types import Batch

TapsName = Literal["mean", "max", "sum"]
SHAPE = (3, 8, 8)
# no 1x1 kernel, and one
CNN = HyperConfig(model="digits-cnn", num_members=2, embedding=4, hidden=4, unit=16)
RESNET = HyperConfig(model="resnet8", num_members=2, embedding=6, hidden=6, unit=16)


def compact(kind: HyperConfig, seed: int = 0) -> Hyper:
    ensemble = kind.build(num_classes=4, shape=SHAPE, seed=seed).double()
    assert isinstance(ensemble, Hyper)
    return ensemble


def plain(kind: HyperConfig, seed: int = 1) -> list[nn.Module]:
    built = kind.plain().build(num_classes=4, shape=SHAPE, seed=seed).double()
    return [built.member(m) for m in range(built.num_members)]


def images(size: int = 5) -> Tensor:
    return torch.rand(size, *SHAPE, dtype=torch.float64, generator=stream(0, "x"))


def random_target(units: int, n: int = 4) -> Target:
    """Units of no structure, all of one kernel's weight but the first."""
    weight = torch.ones(units, dtype=torch.float64)
    weight[0] = 3.0
    return Target(
        units=torch.randn(units, n, 9 * n, dtype=torch.float64, generator=stream(0, "units")),
        weight=weight,
        free=torch.zeros(units, dtype=torch.bool),
    )


def squared_error(target: Target, found: fitting.Fit) -> float:
    """Of the units as a hypernetwork writes them, slice by slice."""
    inner = torch.einsum("sje,ue->usj", found.first, found.z) + found.first_bias
    units = inner @ found.second.T + found.second_bias
    return float(((units - target.units) * target.weight[:, None, None]).square().sum())


def tails(target: Target, embedding: int, hidden: int) -> tuple[float, float]:
    """What cutting along the units alone, and along the taps alone, costs at least."""
    x = target.units * target.weight[:, None, None]
    one = target.weight / target.weight.norm()
    base = torch.einsum("u,ust->st", one, x)
    along_units = (x - torch.einsum("u,st->ust", one, base)).flatten(1)
    along_taps = (x - torch.einsum("u,t->ut", one, base.mean(0))[:, None]).flatten(0, 1)
    return (
        float(torch.linalg.svdvals(along_units)[embedding:].square().sum()),
        float(torch.linalg.svdvals(along_taps)[hidden:].square().sum()),
    )


# --- the fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_untile_is_the_inverse_of_tile(size: int) -> None:
    kernel = torch.randn(48, 32, size, size, generator=stream(0))
    units = hyper.untile(kernel, 3, 2)
    assert torch.equal(units[3], kernel[16:32, 16:])
    if size == 3:
        assert torch.equal(hyper.tile(units, 3, 2), kernel)


@pytest.mark.parametrize("shared", [False, True])
def test_kernels_that_can_be_written_are_fitted_to_rounding(shared: bool) -> None:
    kind = replace(CNN, shared=shared)
    source, x = compact(kind, seed=1), images()
    with torch.no_grad():
        for p in source.writers.parameters():  # biases too
            p.normal_(generator=stream(2))
    nets = [source.member(m).eval() for m in range(2)]
    ensemble = compact(kind)
    assert max(adopt(ensemble, nets)) < 1e-6
    torch.testing.assert_close(
        ensemble.eval().member_logits(x),
        torch.stack([net(x) for net in nets]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("cut", [(3, 5), (10, 2), (1, 20), (11, 36), (11, 7), (4, 36), (40, 99)])
def test_the_fit_lies_between_the_bounds_of_the_two_truncations(cut: tuple[int, int]) -> None:
    target = random_target(12)
    along_units, along_taps = tails(target, *cut)
    first, last = (squared_error(target, fit(target, *cut, rounds=n)) for n in (1, 50))
    slack = 1e-9
    assert last <= first + slack
    assert max(along_units, along_taps) - slack <= last
    assert first <= along_units + along_taps + slack
    if cut[0] >= 11 or cut[1] >= 36:  # one of them cuts nothing off: the optimum
        assert first == pytest.approx(max(along_units, along_taps), abs=slack)


@pytest.mark.parametrize("units", [1, 2])
def test_one_unit_is_written_by_biases(units: int) -> None:
    target = random_target(units)
    along_units, along_taps = tails(target, 3, 4)
    found = fit(target, 3, 4)
    assert found.z.shape == (units, units - 1)
    assert squared_error(target, found) <= along_units + along_taps + 1e-9


@pytest.mark.parametrize(("taps", "shared"), [("mean", False), ("sum", True)])
def test_no_small_change_of_a_source_betters_the_fit(
    taps: TapsName, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "ENOUGH", 1e-13)
    monkeypatch.setattr(fitting, "fit", partial(fit, rounds=500))
    ensemble = compact(replace(RESNET, taps=taps, shared=shared))
    nets = plain(RESNET)

    def loss() -> Tensor:
        total = []
        for m, net in enumerate(nets):
            made = hyper.write(ensemble.grids[m], taps, ensemble._sources(m))
            for grid, kernel in zip(ensemble.grids[m], made, strict=True):
                wanted = net.get_parameter(f"{grid.name}.weight").detach()
                total.append((kernel - wanted).square().sum() / wanted.square().sum())
        return torch.stack(total).sum()

    sources = [*ensemble.embeddings, *ensemble.writers.parameters()]
    begun = torch.autograd.grad(loss(), sources)
    errors = adopt(ensemble, nets)
    value = loss()
    # the errors that are reported are those of the kernels
    total = sum(error**2 for error in errors) * len(ensemble.grids[0])
    assert value.item() == pytest.approx(total, rel=1e-9)
    for grad, before in zip(torch.autograd.grad(value, sources), begun, strict=True):
        assert float(grad.norm()) < 5e-3 * float(before.norm())


@pytest.mark.parametrize("taps", ["mean", "max", "sum"])
def test_hypernetworks_that_are_large_enough_write_any_kernel(taps: TapsName) -> None:
    kind = replace(RESNET, embedding=50, hidden=150, taps=taps)
    ensemble, nets, x = compact(kind), plain(kind), images()
    assert max(adopt(ensemble, nets)) < 1e-6
    ensemble.eval()
    for m, net in enumerate(nets):
        torch.testing.assert_close(ensemble.logits_of(m, x), net.eval()(x), rtol=1e-4, atol=1e-5)
    # what the fit has no use for can still learn
    ensemble.logits_of(0, x).square().sum().backward()
    for p in (*ensemble.writers[0].parameters(), ensemble.embeddings[0]):
        assert p.grad is not None
    assert bool((ensemble.writers[0].get_parameter("first.weight").grad != 0).any(0).all())  # type: ignore[union-attr]  # checked above


@pytest.mark.parametrize("taps", ["mean", "max", "sum"])
def test_larger_hypernetworks_fit_better_and_the_size_of_a_kernel_does_not_matter(
    taps: TapsName,
) -> None:
    nets = plain(RESNET)
    errors = [
        adopt(compact(replace(RESNET, taps=taps, embedding=e, hidden=d)), nets)
        for e, d in ((2, 2), (6, 6), (20, 20))
    ]
    for smaller, larger in pairwise(errors):
        assert all(a > b > 0 for a, b in zip(smaller, larger, strict=True))
    assert max(errors[0]) < 1.0
    for net in nets:
        net.get_parameter("blocks.1.conv2.weight").data *= 100.0
    again = adopt(compact(replace(RESNET, taps=taps)), nets)
    assert again == pytest.approx(errors[1], rel=1e-3)


def test_a_kernel_of_zeros_harms_no_other() -> None:
    ensemble, nets = compact(CNN), plain(CNN)
    nets[0].get_parameter(f"{ensemble.grids[0][0].name}.weight").data.zero_()
    adopt(ensemble, nets)
    assert all(bool(p.isfinite().all()) for p in ensemble.parameters())


def test_fitting_keeps_the_sources_near_the_sizes_that_training_starts_from() -> None:
    ensemble, fresh = compact(RESNET), compact(RESNET)
    adopt(ensemble, plain(RESNET))
    for got, usual in (
        (ensemble.embeddings[0], fresh.embeddings[0]),
        (ensemble.writers[0].get_parameter("second.weight"),
         fresh.writers[0].get_parameter("second.weight")),
    ):  # fmt: skip
        assert 0.5 < (got.square().mean() / usual.square().mean()).item() < 2


def test_moments_are_those_of_the_images_and_settings_are_put_back() -> None:
    ensemble = compact(CNN).eval()
    batches = [Batch(images(8), torch.arange(8) % 4, torch.arange(8))] * 3
    measure_moments(ensemble, batches)
    assert not any(module.training for module in ensemble.modules())
    net = copy.deepcopy(ensemble.member(1)).train()
    norm = next(c for c in net.modules() if isinstance(c, nn.BatchNorm2d))
    assert norm.momentum == 0.1
    before = norm.get_buffer("running_mean").clone()
    norm.momentum = 1.0
    net(batches[0].x)
    torch.testing.assert_close(norm.get_buffer("running_mean"), before)


# --- runs -------------------------------------------------------------------------------------

PLAIN = Run(
    data=DataConfig(spec="digits", images=128),
    ensemble={"name": "independent", "model": "digits-cnn", "num_members": 2},
    defence={"name": "vanilla"},
    optim=OptimConfig(name="adam", lr=3e-3, weight_decay=0.0),
    epochs=20,
    batch_size=32,
)
WRITTEN = {
    "name": "hyper", "model": "digits-cnn", "num_members": 2, "unit": 16, "embedding": 8,
    "hidden": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("warm") / "plain"
    train(PLAIN, out, quiet=True)
    return out


def starting(source: Path, **changes: Any) -> Run:
    run = {"ensemble": WRITTEN, "epochs": 2, "start": StartConfig(path=str(source)), **changes}
    return PLAIN.model_copy(update=run)


def test_a_run_tells_what_it_started_from(source: Path, tmp_path: Path) -> None:
    train(starting(source), tmp_path / "run", quiet=True)
    stored = json.loads((tmp_path / "run" / "start.json").read_text())
    manifest = json.loads((source / "final" / "manifest.json").read_text())["sha256"]
    recorded = read_run(tmp_path / "run" / "run.json").start
    assert recorded is not None
    assert recorded.sha256 == stored["sha256"] == manifest["weights.safetensors"]
    assert all(0 < error < 1 for error in stored["kernel_error"])
    accuracies = stored["validation_accuracy"]
    assert accuracies["source"] > accuracies["start"] > 0.3


def test_plain_members_start_as_copies_and_written_ones_can_be_a_source(
    source: Path, tmp_path: Path
) -> None:
    train(starting(source, ensemble=PLAIN.ensemble), tmp_path / "copied", quiet=True)
    stored = json.loads((tmp_path / "copied" / "start.json").read_text())
    assert stored["kernel_error"] == [0.0, 0.0]
    assert stored["validation_accuracy"]["source"] == stored["validation_accuracy"]["start"]
    train(starting(source), tmp_path / "written", quiet=True)
    again = starting(tmp_path / "written")
    train(again, tmp_path / "again", quiet=True)
    stored = json.loads((tmp_path / "again" / "start.json").read_text())
    assert max(stored["kernel_error"]) < 1e-3  # what hypernetworks wrote they can write


def test_a_stopped_run_goes_on_to_the_same_bits_without_its_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    source_copy = place / "plain"
    source_copy.parent.mkdir()
    shutil.copytree(source, source_copy)
    whole = train(starting(source), tmp_path / "whole", quiet=True)
    step = loop.take_step

    def stopping(*args: Any, **settings: Any) -> dict[str, float]:
        if settings["total"] == 5:
            raise Interrupted("stop", 15)
        terms: dict[str, float] = step(*args, **settings)
        return terms

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        with pytest.raises(Interrupted):
            train(starting(source_copy), tmp_path / "parts", quiet=True)
    with pytest.raises(ConfigError, match="differs in start"):
        train(starting(source, start=None), tmp_path / "parts", quiet=True, resume=True)
    # the same weights, at another place, and then nowhere
    place.rename(tmp_path / "elsewhere")
    train(starting(source), tmp_path / "parts", quiet=True, resume=True)
    parts = train(starting(source_copy), tmp_path / "parts", quiet=True, resume=True)
    expected = whole.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in parts.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet8"}, "model is digits-cnn there, the run needs resnet8"),
        ({"activation": "leaky"}, "activation is relu there, the run needs leaky"),
        ({"width": 32}, r"weight is \(16, 1, 3, 3\) there, the run needs \(32, 1, 3, 3\)"),
    ],
)
def test_members_that_are_not_alike_are_refused(
    changes: dict[str, Any], says: str, source: Path, tmp_path: Path
) -> None:
    run = starting(source, ensemble={**WRITTEN, **changes})
    with pytest.raises(ConfigError, match=says):
        train(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["run", "file"])
def test_any_number_of_networks_starts_the_members_in_turn(
    kind: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source if kind == "run" else source / "final" / "weights.safetensors"
    plain = {**PLAIN.ensemble, "num_members": 3}
    run = starting(path, ensemble=plain, optim=OptimConfig(lr=1e-12), epochs=1)
    found = train(run, tmp_path / "run")
    nets = load(source)
    for m in range(3):
        for a, b in zip(found.parameters_of(m), nets.parameters_of(m % 2), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-8)
    printed = capsys.readouterr().err
    assert "members 0, 2 start alike (2 networks for 3 members)" in printed
    assert "not used" not in printed
    assert "stay as initialised" not in printed
    assert ("normalised by mean 0.5 and deviation 0.25, as the file states" in printed) == (
        kind == "file"
    )
    record = json.loads((tmp_path / "run" / "start.json").read_text())
    assert record["from"] == [0, 1, 0]
    with pytest.raises(DataError, match="not those that this run"):
        train(run.model_copy(update={"start": StartConfig(path=str(path), sha256="0" * 64)}),
              tmp_path / "other", quiet=True)  # fmt: skip


def test_a_file_of_another_network_is_refused(source: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(2, 2)}, tmp_path / "net.pt")
    with pytest.raises(DataError, match=r"nothing in .*net\.pt fits a digits-cnn: .* conv1"):
        train(starting(tmp_path / "net.pt"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_missing_or_changed_source_is_refused(source: Path, tmp_path: Path) -> None:
    cases: list[tuple[StartConfig, type[RedefenseError], str]] = [
        (StartConfig(path=str(tmp_path / "none")), CheckpointError, "no trained run"),
        (StartConfig(path=str(source), sha256="0" * 64), DataError, "not those that this run"),
    ]
    for start, error, says in cases:
        with pytest.raises(error, match=says):
            train(starting(source, start=start), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mrboost", "barre"])
def test_a_shared_hypernetwork_is_not_trained_for_one_member_alone(
    name: str, tmp_path: Path
) -> None:
    run = starting(
        tmp_path, start=None, ensemble={**WRITTEN, "shared": True}, defence={"name": name}
    )
    with pytest.raises(ConfigError, match="stage 'member 1' trains 1 of 2 members"):
        train(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_a_start(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(
        json.dumps(starting(source, start=None, epochs=1).model_dump(mode="json"))
    )
    for number, how in enumerate((["--start", str(source)], ["--set", f"start.path={source}"])):
        out = tmp_path / str(number)
        done = CliRunner().invoke(
            app, ["train", str(tmp_path / "run.json"), *how, "--out", str(out), "--quiet"]
        )
        assert done.exit_code == 0, done.output
        assert (out / "start.json").is_file()
    a, b = (load(tmp_path / name).state_dict() for name in "01")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_both_kinds_know_their_plain_form() -> None:
    plain_kind = IndependentConfig(model="resnet8", num_members=2)
    assert plain_kind.plain() == plain_kind == RESNET.plain()
    assert isinstance(plain_kind.build(num_classes=4, shape=SHAPE, seed=0), Independent)
