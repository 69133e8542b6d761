"""Bundles: what is written is what was trained, and needs neither torch nor onnx to run."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import numpy_helper
from torch import Tensor, nn

import redefense
from export_tools import (
    ABOUT,
    SHAPE,
    bundle,
    hyper,
    network,
    plain,
    set_config,
    spoil,
    torch_logits,
)
from redefense.config import settings_of
from redefense.ensembles import Independent
from redefense.ensembles.configs import ENSEMBLES, HyperConfig, IndependentConfig
from redefense.errors import CheckpointError, ConfigError, DataError, InputError
from redefense.export import export, runner
from redefense.export.compact import layout, stored
from redefense.export.draws import ALARM, chi_square_p
from redefense.export.graph import member_graph
from redefense.export.quantise import Int8, quantised
from redefense.export.rules import graph_faults
from redefense.export.runner import BundleError, open_bundle, open_session, sessions
from redefense.export.write import synthetic

MIXTURE = [0.7, 0.3]


@pytest.fixture(scope="module")
def mlps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = IndependentConfig(model="mlp", width=16, num_members=2)
    about = dataclasses.replace(ABOUT, settings=settings_of(ENSEMBLES, kind))
    return export(plain(2, mixture=MIXTURE), tmp_path_factory.mktemp("e") / "mlps", about)


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = HyperConfig(model="resnet8", width=16, num_members=2, unit=16, embedding=4, hidden=3)
    about = dataclasses.replace(ABOUT, settings=settings_of(ENSEMBLES, kind))
    return export(hyper(2), tmp_path_factory.mktemp("e") / "compact", about)


@pytest.fixture(scope="module")
def graph() -> bytes:
    return member_graph(network(0, "digits-cnn"), SHAPE)


def test_a_file_holds_the_weights_of_its_network_bit_by_bit_and_no_trace_of_the_machine(
    graph: bytes,
) -> None:
    net = network(0, "digits-cnn").train()
    assert graph == member_graph(net, SHAPE)  # always in evaluation mode, always the same bytes
    stored = {t.name: t for t in onnx.load_from_string(graph).graph.initializer}
    for name, weight in net.state_dict().items():
        if weight.is_floating_point():
            assert np.array_equal(numpy_helper.to_array(stored[name]), weight.numpy())
    assert b".py" not in graph
    assert b"redefense" not in graph


@pytest.mark.parametrize("batch", [1, 3, 65])
def test_a_file_answers_batches_of_any_size_as_torch_does(graph: bytes, batch: int) -> None:
    x = synthetic(SHAPE, batch)
    with torch.no_grad():
        wanted = network(0, "digits-cnn")(x).numpy()
    found = runner.logits_of(open_session(graph), x.numpy())
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_exporting_leaves_the_ensemble_and_the_global_generator_as_they_were(
    tmp_path: Path,
) -> None:
    ensemble = plain(1).train().double()
    before, state = copy.deepcopy(ensemble.state_dict()), torch.get_rng_state()
    bundle(ensemble, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in ensemble.state_dict().items())
    assert all(module.training for module in ensemble.modules())


def test_a_bundle_says_what_it_is(mlps: Path) -> None:
    config = json.loads((mlps / "config.json").read_text())
    assert config["input"]["shape"] == list(SHAPE)
    assert config["mixture"] == pytest.approx(MIXTURE)
    assert config["classes"] == list(ABOUT.classes)
    opened = open_bundle(mlps)
    assert set(opened.files) == {
        str(p.relative_to(mlps)) for p in mlps.rglob("*") if p.is_file()
    } - {"manifest.json"}
    images, logits = opened.probes()
    assert np.array_equal(logits, torch_logits(plain(2), images))
    assert runner.check(opened) == []
    assert "Nothing was measured" in (mlps / "README.md").read_text()


class Unknown(nn.Module):
    """A network whose answer hangs on the values of its input, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1:
            return self.linear(x.flatten(1))  # type: ignore[no-any-return]  # torch modules return Any
        return -self.linear(x.flatten(1))  # type: ignore[no-any-return]  # as above


class Noisy(nn.Module):
    """A network that draws inside: exactly what an export would freeze or make guessable."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1) + torch.rand_like(x.flatten(1)))  # type: ignore[no-any-return]  # as above


@pytest.mark.parametrize(("net", "says"), [(Unknown(), "Unknown"), (Noisy(), "RandomUniform")])
def test_what_cannot_be_a_fixed_graph_is_refused_and_leaves_nothing(
    net: nn.Module, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        bundle(Independent([net]), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="exists"):
        bundle(plain(1), tmp_path)
    assert [place.name for place in tmp_path.iterdir()] == ["mine"]


def test_probes_and_classes_must_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        export(plain(1), tmp_path / "b", ABOUT, probes=torch.full((2, *SHAPE), 2.0))
    with pytest.raises(ConfigError, match="probes"):
        export(plain(1), tmp_path / "b", ABOUT, probes=torch.zeros(2, 1, 9, 9))


# --- compact bundles ---


@pytest.mark.parametrize(("taps", "shared"), [("mean", False), ("max", True), ("sum", False)])
def test_numpy_writes_the_kernels_that_torch_writes(taps: str, shared: bool) -> None:
    ensemble = hyper(2, taps, shared=shared)
    for m in range(2):
        state = ensemble.member(m).state_dict()
        tensors = runner.written(stored(ensemble), layout(ensemble), m)
        wanted = {k: v.numpy() for k, v in state.items() if v.is_floating_point()}
        assert set(tensors) == set(wanted)
        for name, tensor in tensors.items():
            assert tensor.shape == wanted[name].shape
            assert np.abs(tensor - wanted[name]).max() <= 1e-6 * max(1, np.abs(tensor).max())


def test_a_compact_bundle_stores_what_the_ensemble_stores(compact: Path) -> None:
    ensemble = hyper(2)
    parameters = sum(p.numel() for p in ensemble.parameters())
    statistics = sum(v.numel() for n, v in ensemble.state_dict().items() if "running" in n)
    arrays = open_bundle(compact).weights()
    normalise = 4  # a mean and a deviation of one channel, in each of two members
    assert sum(a.size for a in arrays.values()) == parameters + statistics + normalise


def test_a_compact_bundle_written_out_is_a_plain_one_with_the_same_answers(
    compact: Path, tmp_path: Path
) -> None:
    runner.materialise(open_bundle(compact), tmp_path / "plain")
    written = open_bundle(tmp_path / "plain")
    assert written.config["kind"] == "plain"
    images, _ = written.probes()
    for m in range(2):
        found = runner.logits_of(written.open(m), images)
        assert np.array_equal(found, runner.logits_of(open_bundle(compact).open(m), images))
    onnx.checker.check_model(onnx.load_from_string(written.member(0)), full_check=True)
    with pytest.raises(BundleError, match="plain already"):
        runner.materialise(written, tmp_path / "again")
    with pytest.raises(BundleError, match="exists"):
        runner.materialise(open_bundle(compact), tmp_path / "plain")


@settings(max_examples=20)
@given(
    st.dictionaries(
        st.text("abc.xyz", min_size=1, max_size=200),
        arrays(np.float32, array_shapes(max_dims=4, max_side=20)),
        max_size=4,
    )
)
def test_hand_encoded_weights_are_those_that_onnx_reads(
    tensors: dict[str, runner.Floats],
) -> None:
    read = onnx.load_from_string(runner.initialisers(tensors)).graph.initializer
    assert [t.name for t in read] == list(tensors)
    for tensor in read:
        assert np.array_equal(numpy_helper.to_array(tensor), tensors[tensor.name], equal_nan=True)


# --- 8 bits ---


def test_eight_bit_members_are_smaller_and_answer_almost_alike(graph: bytes) -> None:
    images = synthetic(SHAPE, 256)
    small = quantised(graph, images)
    wanted = runner.logits_of(open_session(graph), images.numpy())
    found = runner.logits_of(open_session(small), images.numpy())
    assert runner.deviation(found, wanted)[0] < 0.1
    alone = runner.logits_of(open_session(small), images[:1].numpy())
    assert np.allclose(alone, found[:1], atol=1e-6)  # fixed ranges: no batch mates
    assert len(small) < 0.5 * len(graph)
    assert graph_faults(small, SHAPE, 10) == []
    assert (
        runner.deviation(
            runner.logits_of(open_session(quantised(graph, None)), images.numpy()), wanted
        )[0]
        < 0.1
    )


def test_eight_bits_are_for_plain_members(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="redefense materialise"):
        bundle(hyper(1), tmp_path / "b", int8=Int8())
    assert list(tmp_path.iterdir()) == []


# --- the runner ---


def test_each_image_is_answered_by_the_member_drawn_for_it(mlps: Path) -> None:
    nets, opened = [network(m) for m in (0, 1, 0)], open_bundle(mlps)
    sessions = [opened.open(m) for m in (0, 1, 0)]
    x = synthetic(SHAPE, 9)
    drawn = np.array([1, 0, 1, 1, 0, 0, 1, 0, 0])  # the third answers nobody
    found = runner.classify(sessions, x.numpy(), drawn)
    with torch.no_grad():
        wanted = torch.stack([nets[m](x[b : b + 1])[0] for b, m in enumerate(drawn)]).numpy()
    assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("mixture", [[1.0], [1 / 3] * 3, [1 / 7] * 7, [0.7, 0.0, 0.3], [0.0, 1.0]])
def test_draws_meet_the_mixture_and_never_choose_a_member_without_a_share(
    mixture: list[float],
) -> None:
    probs = np.array(mixture)
    drawn = runner.draw_members(probs, 30_000)
    counts = np.bincount(drawn, minlength=len(probs))
    assert (counts[probs == 0] == 0).all()
    assert chi_square_p(counts, probs) >= ALARM


def test_draws_are_the_operating_systems_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2**64 - 1 is refused by rejection for three members, as 2**64 mod 3 = 1
    numbers = iter([[2**64 - 1, 5], [7]])
    monkeypatch.setattr(sessions, "_entropy", lambda n: np.array(next(numbers), np.uint64))
    assert runner.draw_members(np.full(3, 1 / 3), 2).tolist() == [2, 1]
    edge = iter([[0, 2**63 - 1, 2**63, 2**64 - 1]])
    monkeypatch.setattr(sessions, "_entropy", lambda n: np.array(next(edge), np.uint64))
    assert runner.draw_members(np.array([0.5, 0.25, 0.25]), 4).tolist() == [0, 0, 1, 2]


ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("code", end.code)
print(sorted({"torch", "onnx", "redefense", "PIL"} & set(sys.modules)))
"""


def alone(folder: Path, *words: str) -> list[str]:
    command = [sys.executable, "-I", "-c", ALONE, str(folder / "run.py"), *words]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    return (done.stdout + done.stderr).splitlines()


def test_the_runner_needs_numpy_and_onnxruntime_alone(compact: Path, tmp_path: Path) -> None:
    images = synthetic(SHAPE, 2)
    np.save(tmp_path / "x.npy", images.numpy())
    assert alone(compact, "--check") == ["all members give their recorded outputs", "code 0", "[]"]
    *lines, code, modules = alone(compact, "--scores", str(tmp_path / "x.npy"))
    assert (len(lines), code, modules) == (2, "code 0", "[]")
    place, label, *scores = lines[0].split("\t")
    assert place == str(tmp_path / "x.npy")
    odds = torch_logits(hyper(2), images.numpy()).astype(np.float64)[:, 0]
    odds = np.exp(odds) / np.exp(odds).sum(-1, keepdims=True)
    printed = np.array([float(score.split("=")[1]) for score in scores])
    assert np.abs(odds - printed).max(1).min() < 2e-4  # one of the members answered
    assert label == ABOUT.classes[int(printed.argmax())]
    out = tmp_path / "plain"
    assert alone(compact, "materialise", str(out)) == [f"wrote {out}", "code 0", "[]"]
    code, modules, error = alone(compact, str(tmp_path / "no.npy"))
    assert (code, modules) == ("code 3", "[]")
    assert "no.npy" in error


def test_pictures_and_arrays_become_the_same_images(tmp_path: Path) -> None:
    from PIL import Image

    raw = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(raw).save(tmp_path / "x.png")
    np.save(tmp_path / "bytes.npy", raw.transpose(2, 0, 1))
    np.save(tmp_path / "floats.npy", (raw.transpose(2, 0, 1) / 255)[None])
    found = [
        runner.read_image(tmp_path / name, (3, 8, 8))
        for name in ("x.png", "bytes.npy", "floats.npy")
    ]
    assert all(np.allclose(found[0], other, atol=1e-6) for other in found)
    assert found[0].shape == (1, 3, 8, 8)


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "large.npy", np.full(SHAPE, 2.0))
    np.save(tmp_path / "nan.npy", np.full(SHAPE, np.nan))
    np.save(tmp_path / "shape.npy", np.zeros((1, 9, 9)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "nan.npy").read_bytes()[:-9])
    for place in tmp_path.iterdir():
        with pytest.raises(BundleError, match=place.name):
            runner.read_image(place, SHAPE)


# --- records ---


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"schema": 2}, "schema must be 1"),
        ({"kind": "frozen"}, "kind"),
        ({"mixture": [0.5, 0.3, 0.2]}, "2 probabilities"),
        ({"mixture": [1.1, -0.1]}, "mixture"),
        ({"num_members": True}, "num_members"),
        ({"members": ["members/0.onnx", "../1.onnx"]}, "members"),
        ({"members": ["/etc/passwd"] * 2}, "members"),
        ({"input": {"name": "images", "shape": [1, 0, 8]}}, "input"),
        ({"input": "images"}, "input"),
        ({"kind": "compact"}, "compact"),
        ({"kind": "compact", "compact": {"template": "../x", "weights": "y"}}, "compact"),
        ({"classes": 10}, "classes"),
    ],
)
def test_a_config_that_breaks_the_format_is_refused_by_key(
    mlps: Path, values: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=says):
        open_bundle(spoil(mlps, tmp_path / "b", lambda b: set_config(b, **values)))


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../b", ".hidden", "a\\b", "a//b"])
def test_a_manifest_that_leads_out_of_the_bundle_is_refused(
    mlps: Path, name: str, tmp_path: Path
) -> None:
    bad = spoil(mlps, tmp_path / "b", lambda b: None)
    manifest = json.loads((bad / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["run.py"]
    (bad / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no file inside"):
        open_bundle(bad)


# --- back to torch ---


def test_loading_gives_back_the_weights_that_were_exported(mlps: Path, compact: Path) -> None:
    for folder, ensemble in ((mlps, plain(2, mixture=MIXTURE)), (compact, hyper(2))):
        loaded = redefense.load(folder)
        assert type(loaded) is type(ensemble)
        for name, value in ensemble.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert not loaded.training


def test_what_redefense_did_not_build_answers_through_the_runtime(
    mlps: Path, tmp_path: Path
) -> None:
    foreign = spoil(mlps, tmp_path / "b", lambda b: set_config(b, ensemble=None))
    loaded, x = redefense.load(foreign), synthetic(SHAPE, 5)
    with pytest.raises(InputError, match=r"images must be .* as in training, got \(1, 5, 5\)"):
        loaded(torch.rand(2, 1, 5, 5))
    with torch.no_grad():
        wanted = plain(2).member_logits(x)
    assert torch.allclose(loaded.member_logits(x), wanted, atol=1e-5)
    assert loaded.mixture.tolist() == pytest.approx(MIXTURE)
    with pytest.raises(InputError, match="no gradients"):
        loaded.logits_of(0, x.requires_grad_())


def test_a_damaged_bundle_is_refused_by_name(mlps: Path, tmp_path: Path) -> None:
    bad = spoil(mlps, tmp_path / "b", lambda b: None)
    (bad / "members/1.onnx").write_bytes(b"x" * (bad / "members/1.onnx").stat().st_size)
    with pytest.raises(DataError, match=r"members/1\.onnx has another SHA-256"):
        redefense.load(bad)
    with pytest.raises(CheckpointError, match="no trained run"):
        redefense.load(tmp_path)
