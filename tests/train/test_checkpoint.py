"""Checkpoints: whole or refused, and the good one before is used."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from redefense.errors import CheckpointError, TrainingError, WriteError
from redefense.recipes import recipe
from redefense.runtime.files import sha256_of
from redefense.train import checkpoint
from redefense.train.checkpoint import latest, prune, read, restore_optimizer, save, step_folder

RUN = recipe("digits-vanilla")
DATA = {"name": "some", "classes": ["0", "1"], "shape": [1, 2, 2], "checksum": "0"}


def store(folder: Path, step: int) -> Path:
    target = step_folder(folder, step)
    save(
        target,
        run=RUN,
        weights={"w": torch.full((2, 3), float(step)), "n": torch.tensor(step)},
        optimizer={"momentum_buffer/w": torch.ones(2, 3)},
        state={"position": {"total": step}, "data": DATA},
    )
    return target


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    found = read(store(tmp_path, 7))
    assert torch.equal(found.weights["w"], torch.full((2, 3), 7.0))
    assert torch.equal(found.optimizer["momentum_buffer/w"], torch.ones(2, 3))
    assert found.run == RUN
    assert found.state["position"] == {"total": 7}


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


FILES = ["weights.safetensors", "optimizer.safetensors", "run.json", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, name: str, damage) -> None:  # type: ignore[no-untyped-def]  # three ways to break a file
    store(tmp_path, 1)
    damage(store(tmp_path, 2) / name)
    said: list[str] = []
    found = latest(tmp_path, said.append)
    assert found is not None
    assert found.state["position"]["total"] == 1
    assert len(said) == 1
    assert "step-000000002" in said[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": 0}, "data should be an object, got 0"),
        ({"data": DATA | {"shape": [True, 2, 2]}}, "data.shape.0 should be a valid integer"),
        ({"data": {}}, "data.name Field required"),
        ({"position": {"total": "x"}}, "position.total should be a valid integer, got 'x'"),
    ],
)
def test_a_state_that_its_manifest_confirms_is_checked(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = store(tmp_path, 1)
    state, manifest = path / "state.json", path / "manifest.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    hashes = json.loads(manifest.read_text())["sha256"] | {"state.json": sha256_of(state)}
    manifest.write_text(json.dumps({"sha256": hashes}))
    with pytest.raises(CheckpointError, match=rf"step-000000001 is damaged: state.json: .*{said}"):
        read(path)


def test_no_sound_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere", print) is None
    truncate(store(tmp_path, 1) / "state.json")
    assert latest(tmp_path, lambda _: None) is None


def test_a_save_killed_halfway_leaves_the_one_before(tmp_path: Path) -> None:
    store(tmp_path, 1)
    aside = tmp_path / ".saving-step-000000002-1"
    aside.mkdir()
    (aside / "weights.safetensors").write_bytes(b"half")
    found = latest(tmp_path, pytest.fail)
    assert found is not None
    assert found.path.name == "step-000000001"
    prune(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_a_full_disk_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 1)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(WriteError, match="No space left") as refused:
        store(tmp_path, 2)
    assert refused.value.code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_saving_again_replaces_and_only_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 3):
        store(tmp_path, step)
    prune(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]


def test_what_a_kill_left_of_a_replacement_is_in_nobodys_way(tmp_path: Path) -> None:
    # in a container every process may have the same number
    store(tmp_path, 3)
    left = tmp_path / f"{checkpoint.REPLACED}step-000000003-{os.getpid()}"
    left.mkdir()
    (left / "run.json").write_text("{}")
    store(tmp_path, 3)
    prune(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


def test_each_process_takes_back_the_optimizer_of_its_own_parameters() -> None:
    mine = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([mine], fused=True)
    stored = {"step/a": torch.tensor(3.0), "exp_avg/a": torch.ones(2), "exp_avg/b": torch.ones(5)}
    restore_optimizer(optimizer, stored, {mine: "a"})
    assert {k: v.tolist() for k, v in optimizer.state[mine].items()} == {
        "step": 3.0,
        "exp_avg": [1.0, 1.0],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_numbers_that_are_not_finite_are_never_saved(
    tmp_path: Path, where: str, value: float
) -> None:
    kept = store(tmp_path, 1)
    broken = {"n": torch.tensor(7), "bn.running_var": torch.tensor([1.0, value])}
    tensors = {"weights": {"w": torch.ones(2)}, "optimizer": {"step/w": torch.tensor(3.0)}}
    tensors[where] |= broken
    with pytest.raises(TrainingError, match=r"^bn.running_var is not finite.* lower optim.lr"):
        save(step_folder(tmp_path, 2), run=RUN, state={}, **tensors)
    assert list(tmp_path.iterdir()) == [kept]


def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "final"
    with monkeypatch.context() as patch:  # as an older version saved them
        patch.setattr(checkpoint, "_non_finite", lambda tensors: None)
        save(target, run=RUN, weights={"w": torch.tensor([1.0, math.nan])}, state={"data": DATA})
    with pytest.raises(CheckpointError, match="non-finite numbers in w"):
        read(target)


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    target = store(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99"):
        read(target)
