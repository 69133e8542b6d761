"""Training: the same bits after any interruption, and a stop before harm is done."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from redefense.config import OptimConfig, Run, override
from redefense.data import Dataset, Split, load_dataset
from redefense.defences import Stage
from redefense.defences.vanilla import Vanilla
from redefense.ensembles import Ensemble, Independent
from redefense.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from redefense.models import build
from redefense.recipes import recipe
from redefense.rng import stream
from redefense.train import experiment as run_module
from redefense.train import session as session_module
from redefense.train.checkpoint import latest
from redefense.train.experiment import train
from redefense.train.loading import load
from redefense.train.loop import Position, StepDone, fit
from redefense.train.optim import learning_rate
from redefense.train.session import accuracy, member_accuracies, warn_degenerate
from redefense.types import Batch, Loss


def tiny(method: str, *changes: str) -> Run:
    return override(
        recipe(f"digits-{method}"),
        ["epochs=2", "batch_size=256", "ensemble.model=mlp", "ensemble.width=16", *changes],
    )


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load(path).state_dict())


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.fixture
def whole(trained: Callable[[Run, Path], Path], tmp_path: Path) -> Path:
    """A finished run of the smallest kind."""
    return trained(tiny("vanilla"), tmp_path / "whole")


class StopAt:
    """Pretends that a signal arrives after a number of optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step, self.taken = step, 0

    def __bool__(self) -> bool:
        self.taken += 1
        return self.taken >= self.step

    def __getitem__(self, index: int) -> int:
        return int(signal.SIGTERM)


@pytest.mark.parametrize(("stop", "optimizer"), [(1, "adam"), (3, "sgd"), (5, "adam"), (7, "sgd")])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Callable[[Run, Path], Path],
    capsys: pytest.CaptureFixture[str],
    stop: int,
    optimizer: str,
) -> None:
    # five steps an epoch: within the first, at its end, and within the second
    run = tiny("red", f"optim.name={optimizer}", "optim.lr=0.01")
    trained(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "stop_signals", lambda: _Given(StopAt(stop)))
        with pytest.raises(Interrupted) as caught:
            train(run, tmp_path / "stopped", quiet=True)
        assert caught.value.code == 143
    train(run, tmp_path / "stopped", resume=True)
    assert_same_bits(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert f"resuming from step-{stop:09}" in capsys.readouterr().err


class _Given:
    def __init__(self, stopping: StopAt) -> None:
        self.stopping = stopping

    def __enter__(self) -> StopAt:
        return self.stopping

    def __exit__(self, *error: object) -> None:
        return None


def test_resuming_a_folder_without_a_checkpoint_starts_over(whole: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text((whole / "run.json").read_text())
    train(tiny("vanilla"), begun, resume=True, quiet=True)
    assert_same_bits(weights(whole), weights(begun))


def test_resuming_a_finished_run_does_nothing(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    train(tiny("vanilla"), out, resume=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert "is finished; nothing to do" in capsys.readouterr().err
    train(tiny("vanilla"), out, resume=True, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_finished_run_keeps_its_last_checkpoints(whole: Path) -> None:
    out = whole
    last = latest(out / "checkpoints", pytest.fail)
    assert last is not None
    assert last.optimizer
    before = weights(out)
    shutil.rmtree(out / "final")
    train(tiny("vanilla"), out, resume=True, quiet=True)
    assert_same_bits(weights(out), before)


def test_a_folder_that_holds_something_else_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tiny("vanilla"), whole, quiet=True)
    with pytest.raises(ConfigError, match=r"another run .it differs in seed"):
        train(tiny("vanilla", "seed=1"), whole, resume=True, quiet=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run"):
        train(tiny("vanilla"), tmp_path / "other", quiet=True)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_resume_goes_on_from_any_folder_without_a_run(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("from the shell")
    train(tiny("vanilla"), tmp_path / "run", resume=True, quiet=True)
    assert_same_bits(weights(tmp_path / "run"), weights(whole))
    assert (tmp_path / "run" / "log.txt").read_text() == "from the shell"
    with pytest.raises(ConfigError, match=r"must name a folder, and .*log\.txt is a file"):
        train(tiny("vanilla"), tmp_path / "run" / "log.txt", quiet=True)


def test_a_damaged_end_is_made_again_from_the_last_checkpoint(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = whole
    before = weights(out)
    end = out / "final" / "weights.safetensors"
    end.write_bytes(end.read_bytes()[:-1])
    train(tiny("vanilla"), out, resume=True, quiet=True)
    printed = capsys.readouterr().err
    assert "is damaged" in printed
    assert "nothing to do" not in printed
    assert_same_bits(weights(out), before)
    end.write_bytes(end.read_bytes()[:-1])
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(CheckpointError, match="final is damaged"):
        train(tiny("vanilla"), out, resume=True, quiet=True)


def test_other_data_are_another_run_and_the_same_elsewhere_are_not(tmp_path: Path) -> None:
    digits = load_dataset("digits")
    for name, turned in (("same", False), ("other", True)):
        arrays: dict[str, np.ndarray] = {}
        for split in ("train", "test"):
            part = getattr(digits, split)
            x = part.take(torch.arange(len(part))).numpy().transpose(0, 2, 3, 1)
            arrays |= {f"x_{split}": x[:, ::-1] if turned else x, f"y_{split}": part.labels.numpy()}
        np.savez(tmp_path / f"{name}.npz", allow_pickle=False, **arrays)
    here, there, other = (tmp_path / name for name in ("same.npz", "moved.npz", "other.npz"))
    shutil.copy(here, there)
    out, begun = tmp_path / "run", tmp_path / "begun"
    train(tiny("vanilla", f"data.spec=npz:{here}"), out, quiet=True)
    elsewhere = tiny("vanilla", f"data.spec=npz:{there}")
    wrong = tiny("vanilla", f"data.spec=npz:{other}")
    train(elsewhere, out, resume=True, quiet=True)
    begun.mkdir()
    shutil.copy(out / "run.json", begun)  # killed before its first checkpoint
    for folder in (out, begun):
        with pytest.raises(ConfigError, match="holds another run"):
            train(wrong, folder, resume=True, quiet=True)
    shutil.rmtree(out / "final")
    with pytest.raises(ConfigError, match="holds another run"):
        train(wrong, out, resume=True, quiet=True)
    train(elsewhere, out, resume=True, quiet=True)
    assert (out / "final").is_dir()


def test_training_never_reads_the_test_split(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_test(spec: str, *, download: bool, progress: bool) -> Dataset:
        dataset = load_dataset(spec, download=download, progress=progress)
        dataset.checksum()  # which covers both splits, and is remembered
        dataset.test.store[dataset.test.rows if dataset.test.rows is not None else slice(None)] = 0
        return dataset

    monkeypatch.setattr(run_module, "load_dataset", without_test)
    train(tiny("vanilla"), tmp_path / "blind", quiet=True)
    assert_same_bits(weights(whole), weights(tmp_path / "blind"))


class OneBatch:
    def __len__(self) -> int:
        return 2

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step in range(start_step, 2):
            x = torch.rand(4, 1, 2, 2, generator=stream(epoch, step))
            yield Batch(x, torch.tensor([0, 1, 0, 1]), torch.arange(4))


def run_stage(ensemble: Independent, stage: Stage) -> list[Position]:
    events = fit(ensemble, [stage], OneBatch(), optim=OptimConfig())
    return [event.position for event in events if isinstance(event, StepDone)]


def two_nets() -> Independent:
    nets = [
        build("linear", num_classes=2, shape=(1, 2, 2), generator=stream(0, m)) for m in range(2)
    ]
    return Independent(nets)


def test_only_the_members_of_the_stage_learn() -> None:
    ensemble = two_nets()
    before = {n: p.clone() for n, p in ensemble.named_parameters()}
    stage = Stage(name="second", epochs=1, members=(1,), loss=only_member(1))
    assert len(run_stage(ensemble, stage)) == 2
    moved = {n for n, p in ensemble.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith("members.1.")}


def only_member(m: int):  # type: ignore[no-untyped-def]  # a LossFn, whose name would say no more
    def loss(ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        yield Loss(ensemble.logits_of(m, batch.x).square().mean())

    return loss


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    def broken(ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        total = ensemble.member_logits(batch.x).mean() * math.nan
        yield Loss(total, {"total": total.detach()})

    ensemble = two_nets()
    before = {n: p.clone() for n, p in ensemble.named_parameters()}
    with pytest.raises(TrainingError, match="non-finite loss in stage 'bad' at step 1"):
        run_stage(ensemble, Stage(name="bad", epochs=1, members=(0, 1), loss=broken))
    assert all(torch.equal(p, before[n]) for n, p in ensemble.named_parameters())


def test_a_member_without_a_gradient_is_named() -> None:
    stage = Stage(name="both", epochs=1, members=(0, 1), loss=only_member(0))
    with pytest.raises(TrainingError, match=r"no gradient in stage 'both' .* members\.1\."):
        run_stage(two_nets(), stage)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_lowers_the_loss(tmp_path: Path, precision: str) -> None:
    run = tiny("vanilla", "epochs=12", "batch_size=64", f"precision={precision}")
    train(run, tmp_path / "run", quiet=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[-1]["ce"] < 0.2 * records[0]["ce"]
    assert records[-1]["validation_accuracy"] > 0.8
    for record in records:
        mean = sum(record["validation_members"]) / run.ensemble["num_members"]
        assert record["validation_accuracy"] == pytest.approx(mean, abs=1e-12)


def test_a_member_that_answers_alike_whatever_it_sees_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(10) * 20
    split = Split(images, torch.arange(10))

    class Reader(nn.Module):  # the label is the brightness of one pixel
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            label = (x[:, 0, 0, 0] * 255 / 20).round().long()
            return torch.nn.functional.one_hot(label, 10).float()

    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[3].expand(len(x), 10)

    ensemble = Independent([Reader(), Silent()], mixture=[0.75, 0.25])
    each = member_accuracies(ensemble, split, batch_size=4)
    assert each.tolist() == [1.0, 0.1]
    assert accuracy(ensemble, split, batch_size=4) == pytest.approx(0.775)
    warn_degenerate(ensemble, each)
    assert "member 1 is right on 10.0 % of the validation images, the best member on 100.0 %" in (
        capsys.readouterr().err
    )
    warn_degenerate(Independent([Reader(), Silent()], mixture=[1.0, 0.0]), each)  # never drawn
    warn_degenerate(ensemble, torch.tensor([1.0, 0.5]))
    assert capsys.readouterr().err == ""


def test_vanilla_is_each_members_own_cross_entropy() -> None:
    ensemble, (batch, *_) = two_nets(), list(OneBatch().epoch(0))
    for part in Vanilla().loss(ensemble, batch, stream(0)):
        part.total.backward()
    for m in range(2):
        loss = torch.nn.functional.cross_entropy(ensemble.logits_of(m, batch.x), batch.y)
        grads = torch.autograd.grad(loss, list(ensemble.member(m).parameters()))
        for p, grad in zip(ensemble.member(m).parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad)


def test_schedules_are_what_their_names_say() -> None:
    def rates(**settings: object) -> list[float]:
        config = OptimConfig.model_validate({"lr": 1.0, **settings})
        return [learning_rate(config, step, 100) for step in range(100)]

    assert set(rates(schedule="constant")) == {1.0}
    steps = rates(schedule="steps", milestones=(0.5, 0.75), gamma=0.1)
    assert [steps[0], steps[60], steps[90]] == pytest.approx([1, 0.1, 0.01])
    cycle = rates(schedule="one-cycle", warmup=0.3)
    assert cycle.index(max(cycle)) in (29, 30)
    assert cycle[-1] == pytest.approx(0.005 / 0.7)
    cosine = rates(schedule="cosine")
    assert cosine[50] == pytest.approx(0.5, abs=0.01)
    assert cosine == sorted(cosine, reverse=True)
