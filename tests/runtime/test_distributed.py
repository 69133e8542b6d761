"""Several processes train what one would: the same gradients, the same bits where that can be."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mesh_tools
from mesh_tools import MESHES, STEPS, given_examples, one_step, step_ensemble, work
from redefense.bench.scaling import _unattacked, meshes, table
from redefense.config import override, read_run
from redefense.errors import ConfigError, WriteError
from redefense.recipes import RECIPES, recipe
from redefense.runtime.mesh import Mesh, parse_mesh, processes
from redefense.train.experiment import train
from redefense.train.loading import load, resolve

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format-1"


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    work(4, mesh_tools.steps, folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(FIXTURES / "stopped", folder / "resumed")  # what one process began
    work(2, mesh_tools.runs, folder)
    return folder


def found(steps: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    record = json.loads((steps / f"{name}.json").read_text())
    return load_file(steps / f"{name}.safetensors"), record


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference, as a share of the largest entry of each tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(1e-30)) for k in a)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_step_on_a_mesh_is_that_of_one_process(steps: Path, name: str) -> None:
    mesh = "2x2" if STEPS[name].spreads else "4x1"
    grads, record = found(steps, f"{mesh}-{name}-{torch.float64}")
    with given_examples():
        expected, terms = one_step(STEPS[name], Mesh(), torch.float64)
    assert differences(grads, expected) < 1e-9
    assert record["terms"] == pytest.approx(terms)


@pytest.mark.parametrize("mesh", MESHES)
def test_single_precision_agrees_to_five_digits(steps: Path, mesh: str) -> None:
    grads, _ = found(steps, f"{mesh}-red-{torch.float32}")
    with given_examples():
        expected, _ = one_step(STEPS["red"], Mesh(), torch.float32)
    assert differences(grads, expected) < 1e-5


def test_sharing_members_changes_no_bit(steps: Path) -> None:
    grads, _ = found(steps, "1x4-crafted")
    expected, _ = one_step(STEPS["red"], Mesh(), torch.float32)
    assert [k for k in expected if not torch.equal(grads[k], expected[k])] == []


def test_columns_exchange_no_weights_and_rows_no_images(steps: Path) -> None:
    columns = found(steps, f"1x4-red-{torch.float64}")[1]["traffic"]
    rows = found(steps, f"4x1-red-{torch.float64}")[1]["traffic"]
    assert set(columns) == {"members", "log"}
    assert set(rows) == {"gradients", "moments", "members", "log"}
    # float64: what a process hands over is its own member's gradients at 16 images of 16 pixels,
    assert columns["members"] == 8 * 16 * 16
    # or all weights' gradients once
    assert rows["gradients"] == sum(
        8 * p.numel() for p in step_ensemble(torch.float64).parameters()
    )


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load(path).state_dict())


def test_equal_processes_give_equal_bits(runs: Path) -> None:
    a, b = weights(runs / "rows"), weights(runs / "rows-again")
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("name", ["columns", "written"])
def test_whole_runs_that_share_members_have_the_bits_of_one_process(
    runs: Path, tmp_path: Path, name: str
) -> None:
    run = read_run(runs / name / "run.json")
    one = train(run, tmp_path / "one", quiet=True).state_dict()
    found = weights(runs / name)
    assert [k for k in found if not torch.equal(found[k], one[k])] == []


@pytest.mark.parametrize("name", ["rows", "barre", "dverge"])
def test_whole_runs_that_share_batches_come_near_to_one_process(
    runs: Path, tmp_path: Path, name: str
) -> None:
    train(read_run(runs / name / "run.json"), tmp_path / "one", quiet=True)
    found, one = (load(path) for path in (runs / name, tmp_path / "one"))
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = (found.averaged()(x) - one.averaged()(x)).abs().max()
    # dverge rolls within a share; a step of the adversary that rounding turns around is larger
    assert float(apart) < (0.5 if name == "dverge" else 0.05)
    torch.testing.assert_close(found.mixture, one.mixture, atol=0.02, rtol=0.0)


def test_another_number_of_processes_goes_on_with_a_run(runs: Path) -> None:
    found, known = weights(runs / "resumed"), weights(FIXTURES / "finished")
    assert differences(found, known) < 1e-3


REFUSED = {
    "dverge-columns": ("ConfigError", "--mesh 2x1"),
    "odd": ("ConfigError", "62 images"),
    "many": ("ConfigError", "needs 4 processes"),
    "few": ("ConfigError", "2 columns"),
    "shared": ("ConfigError", "share weights"),
    "elsewhere": ("DataError", "no data in the second process"),
    "sharded": ("ConfigError", "FSDP2"),
}


def test_what_cannot_be_is_refused_by_all_and_said_by_one(runs: Path) -> None:
    first, second = (json.loads((runs / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert first.keys() == second.keys() == REFUSED.keys()
    for name, (kind, words) in REFUSED.items():
        for rank, said in enumerate((first, second)):
            assert said[name][0] == kind
            assert words in said[name][1]
            assert said[name][2] == (rank > 0 and name != "sharded")
            assert not (runs / name).exists()


def test_what_a_mesh_returns_answers_with_the_weights_that_it_saved(runs: Path) -> None:
    for rank in (0, 1):
        said = json.loads((runs / f"said-{rank}.json").read_text())
        assert said.keys().isdisjoint({"rows", "columns", "written", "plain", "warm"})
    assert (runs / "warm" / "final").is_dir()


@pytest.mark.parametrize("full", [True, False])
def test_an_error_has_one_exit_code_in_all_processes(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = WriteError("no space left", full=full)
    gathered = list[object]()

    def gather(mesh: Mesh, value: object) -> list[object]:
        gathered.append(value)
        return gathered

    monkeypatch.setattr(Mesh, "gathered", gather)
    with pytest.raises(WriteError) as first, Mesh(shape=(2, 1)).agreed():
        raise error
    with pytest.raises(WriteError) as other, Mesh(shape=(2, 1), rank=1).agreed():
        pass  # it fails since the first process did
    found = [first.value, other.value]
    assert [(str(it), it.code, it.reported) for it in found] == [
        (str(error), error.code, False),
        (str(error), error.code, True),
    ]


def test_a_mesh_is_two_numbers_for_as_many_processes() -> None:
    assert parse_mesh(None, 6) == (6, 1)
    assert parse_mesh("2x3", 6) == (2, 3)
    for text in ("6", "0x6", "2x", "2 x 3"):
        with pytest.raises(ConfigError, match="DATAxMEMBER"):
            parse_mesh(text, 6)
    with pytest.raises(ConfigError, match="needs 4 processes"):
        parse_mesh("2x2", 6)


def test_members_are_split_into_runs_that_cover_all() -> None:
    ranges = [Mesh(shape=(1, 3), rank=rank).own(8) for rank in range(3)]
    assert [m for own in ranges for m in own] == list(range(8))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_every_mesh_that_the_members_fill_is_measured() -> None:
    assert meshes([1, 2, 4], 3) == ["1x1", "2x1", "1x2", "4x1", "2x2"]
    row = {"gradient": 1e-7, "weights": 0.5, "clean": 0.9, "robust": 0.25, "seconds": 0.1,
           "bytes": {"gradients": 4096}}  # fmt: skip
    result = {"recipe": "digits-red", "num_members": 3, "batch_size": 128, "cores": 2,
              "torch": "2", "meshes": {"2x1": row}}  # fmt: skip
    assert table(result).splitlines()[-1].split() == [
        "2x1", "1.0e-07", "5.0e-01", "90.0%", "25.0%", "0.100", "gradients", "4,096",
    ]  # fmt: skip


def test_a_world_that_cannot_be_joined_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ConfigError, match=r"cannot be joined: .*RANK expected"),
        processes(None, "cpu"),
    ):
        pass


@pytest.mark.parametrize("name", [n for n in RECIPES.own if n.startswith("digits-")])
def test_the_comparison_of_meshes_attacks_nothing_in_any_recipe(name: str) -> None:
    run = resolve(recipe(name))[0]
    defence = resolve(override(run, _unattacked(run)))[2]
    assert defence.stages(int(run.ensemble["num_members"]), run.epochs)
    if "adversary" in run.defence:
        assert vars(defence)["adversary"].eps == 0
