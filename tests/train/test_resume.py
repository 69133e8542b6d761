"""No lost work: whatever stops a training, it goes on to the bits of one that nothing stopped."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from redefense.config import Run, override, read_run
from redefense.data import load_dataset
from redefense.defences import Stage, barre
from redefense.errors import ConfigError, Interrupted, RedefenseError, WriteError
from redefense.recipes import recipe
from redefense.runtime.files import locked
from redefense.train import checkpoint
from redefense.train import session as session_module
from redefense.train.checkpoint import latest
from redefense.train.cost import predict_run
from redefense.train.experiment import train
from redefense.train.loading import load

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format-1"


def tiny(method: str, *changes: str) -> Run:
    return override(
        recipe(f"digits-{method}"),
        ["epochs=4", "batch_size=64", "data.images=192", "ensemble.model=mlp", "ensemble.width=16",
         "ensemble.num_members=2", *changes],
    )  # fmt: skip


BARRE = tiny("barre", "defence.refit_images=64", "defence.refit_steps=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(BARRE, out, quiet=True)
    return out


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load(path).state_dict())


def assert_same_bits(a: Path, b: Path) -> None:
    found, expected = weights(a), weights(b)
    assert found.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


def test_a_checkpoint_of_format_1_still_answers_alike() -> None:
    known = json.loads((FIXTURES / "logits.json").read_text())["logits"]
    images = load_dataset("digits").test.float(torch.arange(4))
    with torch.no_grad():
        found = load(FIXTURES / "finished").member_logits(images)
    torch.testing.assert_close(found, torch.tensor(known), rtol=1e-4, atol=1e-4)


def test_a_run_of_format_1_still_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(FIXTURES / "stopped", out)
    train(read_run(out / "run.json"), out, resume=True, quiet=True)
    found, known = weights(out), weights(FIXTURES / "finished")
    for name, value in known.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=name)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8]


def test_what_is_written_today_says_its_format(tmp_path: Path) -> None:
    train(tiny("vanilla", "epochs=1"), tmp_path / "run", quiet=True)
    state = json.loads((tmp_path / "run" / "final" / "state.json").read_text())
    assert state["format"] == checkpoint.FORMAT


def test_renamed_data_keep_their_validation_split(tmp_path: Path) -> None:
    labels = np.arange(120) % 3
    images = np.random.default_rng(0).integers(0, 256, (120, 8, 8), dtype=np.uint8)
    own, moved = tmp_path / "own.npz", tmp_path / "moved.npz"
    np.savez(own, x_train=images, y_train=labels, x_test=images, y_test=labels)
    run = tiny("vanilla", f"data.spec=npz:{own}", "epochs=2", "data.images=null")
    train(run, tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "final")
    shutil.rmtree(max((tmp_path / "stopped" / "checkpoints").iterdir()))
    own.rename(moved)
    run = override(run, [f"data.spec=npz:{moved}"])
    train(run, tmp_path / "stopped", resume=True, quiet=True)
    assert_same_bits(tmp_path / "stopped", tmp_path / "whole")
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("stopped", "whole")]
    assert logs[0] == logs[1]
    # the size of the data is known once a run is trained, too
    assert predict_run(str(tmp_path / "whole"), run, "h100-sxm")["images"] == 108


@pytest.mark.parametrize("save", [1, 2, 4])
def test_a_disk_that_is_full_at_a_save_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, save: int
) -> None:
    count, write = 0, checkpoint._tensors

    def full(path: Path, tensors: dict[str, Tensor]) -> None:
        nonlocal count
        count += path.name == "weights.safetensors"
        if count >= save:
            path.write_bytes(b"as much as fits")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "_tensors", full)
    out = tmp_path / "full"
    with pytest.raises(WriteError, match=r"cannot write checkpoint .* No space left"):
        train(BARRE, out, quiet=True)
    monkeypatch.undo()
    kept = latest(out / "checkpoints", pytest.fail)
    assert (kept is not None) == (save > 1)
    (out / "final").mkdir()  # as a workflow engine does, for what it expects in there
    train(BARRE, out, resume=True, quiet=True)
    assert_same_bits(out, whole)


def child_trains(out: Path, prepare: Callable[[], object]) -> int:
    """The id of a new process that goes on with the run, and exits with its error's code."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what it says is not this test's
        torch.set_num_threads(1)
        prepare()
        train(BARRE, out, resume=True, quiet=True)
        code = 0
    except RedefenseError as error:
        code = error.code
    finally:
        os._exit(code)


def test_a_file_that_cannot_grow_costs_no_checkpoint(tmp_path: Path, whole: Path) -> None:
    """The operating system's own refusal, in the middle of a file."""
    limit = (whole / "final" / "weights.safetensors").stat().st_size // 2

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "limited"
    _, status = os.waitpid(child_trains(out, limited), 0)
    assert os.waitstatus_to_exitcode(status) == 1  # as for every disk that is full
    assert list((out / "checkpoints").iterdir()) == []
    train(BARRE, out, resume=True, quiet=True)
    assert_same_bits(out, whole)


def test_a_checkpoint_between_its_two_renames_is_put_back(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(FIXTURES / "stopped", out)
    folder = out / "checkpoints"
    (folder / "step-000000006").rename(folder / ".replaced-step-000000006-77")
    said: list[str] = []
    found = latest(folder, said.append)
    assert found is not None
    assert found.path.name == "step-000000006"
    assert len(said) == 1


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_stages_loses_their_work_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Path,
    moment: str,
    number: signal.Signals,
) -> None:
    stages = barre.BARRE.stages
    killed: list[str] = []

    def struck(self: barre.BARRE, num_members: int, epochs: int) -> tuple[Stage, ...]:
        found = list(stages(self, num_members, epochs))

        def strike(*args: object) -> None:
            if not killed:
                killed.append(moment)
                os.kill(os.getpid(), number)
            work = getattr(last, moment)
            work(*args)

        last = found[-1]
        found[-1] = replace(last, **{moment: strike})  # type: ignore[arg-type]  # before or after
        return tuple(found)

    monkeypatch.setattr(barre.BARRE, "stages", struck)
    with pytest.raises(Interrupted, match=f"stopped {moment} stage 'member 2'") as caught:
        train(BARRE, tmp_path / "stopped", quiet=True)
    assert caught.value.code == 128 + number
    found = latest(tmp_path / "stopped" / "checkpoints", pytest.fail)
    assert found is not None
    # six steps a stage: at the end of the first, or of all
    assert found.state["position"]["total"] == (6 if moment == "before" else 12)
    train(BARRE, tmp_path / "stopped", resume=True, quiet=True)
    assert_same_bits(tmp_path / "stopped", whole)


def test_kills_at_any_moment_lead_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    """A smaller `benchmarks/kills.py`: one process forks children that die at random moments."""
    rng, deaths = random.Random(0), 0
    # a quick machine may finish a run between two kills: then another one is started
    for number in range(20):
        out = tmp_path / f"killed-{number}"
        for _ in range(60):
            # a save at each step, so that kills fall into saves
            child = child_trains(out, lambda: setattr(session_module, "SAVE_INTERVAL", 0.0))
            time.sleep(rng.uniform(0.0, 0.4))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            deaths += os.WIFSIGNALED(status)
            if (out / "final").is_dir():
                break
        train(BARRE, out, resume=True, quiet=True)
        assert_same_bits(out, whole)
        if deaths >= 3:
            break
    assert deaths >= 3


def test_checkpoints_without_a_record_of_their_run_are_refused(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    for resume in (True, False):
        with pytest.raises(ConfigError, match=r"has checkpoints but no run\.json"):
            train(BARRE, out, resume=resume, quiet=True)


def test_two_trainings_do_not_write_to_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out / ".lock", wait=False) as free:
        assert free
        with pytest.raises(ConfigError, match="another process is training in"):
            train(BARRE, out, quiet=True)
    assert not out.exists()
    # what a killed process left does not count
    out.mkdir()
    (out / ".lock").touch()
    train(tiny("vanilla", "epochs=1"), out, quiet=True)
    assert not (out / ".lock").exists()
