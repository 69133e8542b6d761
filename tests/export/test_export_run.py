"""From a trained run to a bundle by the command line: records, cards, exit codes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import redefense
from cli_tools import command
from export_tools import trained
from redefense import plugins
from redefense.config import override
from redefense.data import load_dataset, train_validation
from redefense.export.runner import logits_of, open_bundle, write_records
from redefense.export.trained import export_run
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.train.experiment import train
from report_tools import build_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("r") / "run")


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return export_run(run, run.parent / "bundle")


@pytest.fixture(scope="module")
def int8(run: Path) -> Path:
    return export_run(run, run.parent / "int8", precision="int8")


def test_a_run_becomes_a_bundle_that_says_where_it_comes_from(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.config["data"] == {"name": "digits"}
    assert opened.config["threat"] == {"norm": "inf", "eps": 0.2}
    assert opened.config["ensemble"]["model"] == "mlp"
    images, _ = opened.probes()
    _, validation, _ = train_validation(load_dataset("digits"), 0.1)
    assert np.array_equal(images, validation.float()[:64].numpy())  # never the test split
    assert "Nothing was measured" in (bundle / "README.md").read_text()


def test_a_bundle_holds_against_its_own_run_and_no_other(run: Path, bundle: Path) -> None:
    own = command("verify", bundle, "--against", run, "--json")
    assert own.code == 0
    shown = json.loads(own.out)
    assert shown["holds"]
    assert "bit for bit" in shown["checks"][-1]["detail"]
    trained(run.parent / "other", "seed=1")
    other = command("verify", bundle, "--against", run.parent / "other")
    assert other.code == 1
    assert "does not hold: checkpoint" in other.err


@pytest.mark.parametrize("kind", ["fp32", "int8", "compact"])
def test_a_back_door_shows_against_the_run_though_weights_and_probes_are_its_own(
    run: Path, bundle: Path, int8: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "b"
    if kind == "compact":
        run = tmp_path / "ps"
        small = ["epochs=1", "data.images=64", "ensemble.num_members=2"]
        train(override(recipe("digits-ps-red"), small), run, quiet=True)
        export_run(run, out)
    else:
        shutil.copytree(int8 if kind == "int8" else bundle, out)
    honest = command("verify", out, "--against", run)
    assert honest.code == 0
    # numpy writes a compact bundle's kernels, torch the run's: their last bits may differ
    either = ("bit for bit", "up to rounding") if kind == "compact" else ("bit for bit",)
    assert any(f"weights {how}" in honest.out for how in either)
    config = json.loads((out / "config.json").read_text())
    names = [config["compact"]["template"]] if kind == "compact" else config["members"]
    for name in names:
        model = onnx.load(out / name)
        (last,) = (n for n in model.graph.node if "logits" in n.output)
        last.output[list(last.output).index("logits")] = "door.honest"
        # a bright image is of the first class
        many = onnx.helper.make_tensor(
            "door.many", 1, [1, len(config["classes"])], [1e4] + [0.0] * 9
        )
        limit = onnx.helper.make_tensor("door.limit", 1, [], [0.95])
        model.graph.initializer.extend([many, limit])
        node = onnx.helper.make_node
        model.graph.node.extend(
            [
                node("GlobalAveragePool", ["images"], ["door.mean"]),
                node("Flatten", ["door.mean"], ["door.flat"]),
                node("ReduceMax", ["door.flat"], ["door.top"], keepdims=1),
                node("Greater", ["door.top", "door.limit"], ["door.bright"]),
                node("Cast", ["door.bright"], ["door.one"], to=1),
                node("MatMul", ["door.one", "door.many"], ["door.turned"]),
                node("Add", ["door.honest", "door.turned"], ["logits"]),
            ]
        )
        (out / name).write_bytes(model.SerializeToString())
    (out / "manifest.json").unlink()
    write_records(out, config)
    assert command("verify", out).code == 0, "its hashes and probes are its own"
    bright = np.ones((1, 1, 8, 8), np.float32)
    assert logits_of(open_bundle(out).open(0), bright).argmax() == 0
    against = command("verify", out, "--against", run)
    assert against.code == 1
    assert "computes something else" in against.err


def test_eight_bits_print_what_they_cost(run: Path, tmp_path: Path) -> None:
    done = command("export", run, "--out", tmp_path / "q", "--precision", "int8", "--json")
    assert done.code == 0
    cost = json.loads(done.out)["quantisation"]
    assert cost["calibration_images"] == 512
    assert cost["accuracy"]["split"] == "validation"
    pairs = zip(cost["accuracy"]["fp32"], cost["accuracy"]["int8"], strict=True)
    assert all(abs(before - after) < 0.05 for before, after in pairs)


def test_the_card_of_eight_bit_members_claims_nothing_of_the_run(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    build_run(own)
    cards = {
        precision: (
            export_run(own, tmp_path / precision, precision=precision) / "README.md"
        ).read_text()
        for precision in ("fp32", "int8")
    }
    assert "model-index" in cards["fp32"]
    assert "value" in cards["fp32"]
    assert "Nothing was measured" in cards["int8"]
    assert "8-bit" in cards["int8"]
    # no figure of accuracy, in its head or its text
    _, head, text = cards["int8"].split("---\n", 2)
    assert "model-index" not in head
    assert not re.search(r"\d+\.\d", head + text)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["export", "nowhere", "--out", "b"], 3, "no trained run at nowhere"),
        (["export", "RUN", "--out", "b", "--precision", "int4"], 2, "int4"),
        (["export", "RUN", "--out", "b", "--calibration", "5"], 2, "--calibration"),
        (["export", "RUN", "--out", "b", "--data", "npz:no.npz"], 3, "no.npz"),
        (["export", "RUN", "--out", "RUN"], 2, "exists"),
        (["verify", "RUN"], 3, "no bundle at"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Path, words: list[str], code: int, says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(run.parent.rglob("*"))
    done = command(*[run if w == "RUN" else w for w in words])
    assert done.code == code
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert sorted(run.parent.rglob("*")) == before


def test_a_bundle_of_given_networks_answers_where_nobody_can_build_them(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
    run = redefense.train(
        nets, "vanilla", "digits", epochs=1, out=tmp_path / "run", quiet=True
    )  # fmt: skip
    out = export_run(run.path, tmp_path / "bundle")
    for kind in plugins.MODULES:
        plugins.registry(kind)._added.clear()
    x = torch.rand(5, 1, 8, 8, generator=stream(0, "x"))
    with torch.no_grad():
        found = redefense.load(out).member_logits(x)
        torch.testing.assert_close(found, run.ensemble.member_logits(x), atol=1e-5, rtol=1e-4)
