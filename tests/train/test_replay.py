"""Recorded training steps, on the tape that stands in for CUDA graphs: the bits of plain steps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from redefense.config import DataConfig, OptimConfig, Run, ThreatConfig
from redefense.defences import DEFENCES, Adversary, Defence, Stage
from redefense.ensembles import Ensemble, channels_last
from redefense.ensembles.configs import EnsembleConfig, HyperConfig, IndependentConfig
from redefense.errors import ConfigError, TrainingError
from redefense.rng import draw_seed, stream
from redefense.train import experiment as training
from redefense.train.loop import gradients, take_step
from redefense.train.optim import learning_rate, make_optimizer
from redefense.train.replay import RecordedSteps
from redefense.types import Batch, Loss, Progress
from tape import TapeRecorder

SHAPE, SIZE, EPOCH = (3, 8, 8), 4, 6
SGD = OptimConfig(name="sgd", lr=0.1, weight_decay=5e-4, schedule="one-cycle")
CLIPPED = SGD.model_copy(update={"clip": 1.0})
ADAM = SGD.model_copy(update={"name": "adam", "lr": 1e-3})
NORMED = IndependentConfig(model="resnet8", num_members=2, width=4)
LEAKY = replace(NORMED, activation="leaky")
PLAIN = IndependentConfig(model="digits-cnn", num_members=2, width=8)
WRITTEN = HyperConfig(model="digits-cnn", num_members=2, unit=16, embedding=3, hidden=3)
ADVERSARY = Adversary(steps=2, step_size=0.5)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how."""

    method: str = "red"
    settings: dict[str, Any] = field(default_factory=dict)
    kind: EnsembleConfig = NORMED
    precision: str = "fp32"
    optim: OptimConfig = SGD

    def defence(self) -> Defence:
        made = DEFENCES[self.method]
        known = made.__dataclass_fields__
        quick = {"adversary": ADVERSARY, "steps": 2}
        return made(**{**{k: v for k, v in quick.items() if k in known}, **self.settings})


ADVERSARIAL = {"adversarial_training": True}
SETTINGS = {
    "red bf16": Setting(precision="bf16"),
    "red fp32": Setting(),
    "red clipped": Setting(kind=PLAIN, precision="bf16", optim=CLIPPED),
    "red adam": Setting(kind=PLAIN, optim=ADAM),
    "red finite": Setting(settings={"differentiate": "finite"}, kind=PLAIN),
    "red printed": Setting(settings={"preset": "printed"}, kind=PLAIN),
    "red released": Setting(settings={"preset": "released"}, kind=PLAIN),
    "red at": Setting(settings=ADVERSARIAL, kind=PLAIN, precision="bf16"),
    "ps-red": Setting(kind=WRITTEN),
    "ps-red shared": Setting(kind=replace(WRITTEN, shared=True), optim=ADAM),
    "vanilla": Setting(method="vanilla", precision="bf16"),
    "at": Setting(method="at"),
    "at independent": Setting(method="at", settings={"variant": "independent"}, kind=PLAIN),
    "at joint": Setting(method="at", settings={"variant": "joint"}, kind=PLAIN),
    "gal": Setting(method="gal", kind=LEAKY, optim=ADAM),
    "gal dverge": Setting(method="gal", settings={"preset": "dverge"}, kind=PLAIN),
    "adp": Setting(method="adp", optim=ADAM),
    "adp at": Setting(method="adp", settings=ADVERSARIAL, kind=PLAIN, optim=ADAM),
    "dverge": Setting(method="dverge"),
    "dverge at": Setting(method="dverge", settings=ADVERSARIAL, kind=PLAIN),
    "trs": Setting(method="trs", settings={"steps": 1}, optim=ADAM),
    "trs printed": Setting(method="trs", settings={"preset": "printed", "steps": 1}, kind=PLAIN),
    "mrboost": Setting(method="mrboost", kind=PLAIN, precision="bf16"),
    "mrboost mean": Setting(method="mrboost", settings={"individual": False}, kind=PLAIN),
    "barre": Setting(method="barre", kind=PLAIN),
}
EPOCHS_DIFFER = {"trs", "trs printed", "dverge", "dverge at"}


class Training:
    """Steps of the last stage of a method, plain or recorded."""

    def __init__(self, setting: Setting, *, recorded: bool, stage: Stage | None = None) -> None:
        self.setting = setting
        self.ensemble = channels_last(setting.kind.build(num_classes=10, shape=SHAPE, seed=0))
        stages = setting.defence().stages(self.ensemble.num_members, 9)
        for one in stages:
            if one.before is not None:
                one.before(self.ensemble)
        self.stage = stage or stages[-1]
        members = self.stage.members
        found = [p for m in members for p in self.ensemble.parameters_of(m)]
        self.params = list(dict.fromkeys(found))
        self.optimizer = make_optimizer(self.params, setting.optim)
        compute = partial(
            gradients,
            self.ensemble,
            self.stage,
            self.params,
            setting.precision,  # type: ignore[arg-type]  # one of two
        )
        self.recorder, self.said = TapeRecorder(), list[str]()
        self.recorded = RecordedSteps(
            self.recorder, self.ensemble, self.params, compute, self.stage.name, self.said.append
        )
        self.compute = self.recorded if recorded else compute
        self.terms: list[dict[str, float]] = []

    def step(self, k: int, x: Tensor | None = None) -> None:
        rng = stream(5, "data", k)
        images = torch.rand(SIZE, *SHAPE, generator=rng) if x is None else x
        labels = torch.randint(10, (SIZE,), generator=rng)
        epoch = k // EPOCH
        progress = Progress(epoch, 9, draw_seed(stream(0, "epoch", epoch)))
        found = take_step(
            self.ensemble, self.stage, Batch(images, labels, torch.arange(SIZE), progress),
            self.optimizer, self.params, lr=learning_rate(self.setting.optim, k, 20),
            clip=self.setting.optim.clip, precision="fp32", total=k, rng=stream(0, "step", k),
            first=k == 0, compute=self.compute,
        )  # fmt: skip
        self.terms.append(found)

    def steps(self, first: int, last: int) -> "Training":
        for k in range(first, last):
            self.step(k)
        return self

    def state(self) -> dict[str, Tensor]:
        """Weights, statistics and the optimizer's state."""
        found = {name: t.clone() for name, t in self.ensemble.state_dict().items()}
        for i, p in enumerate(self.params):
            for name, value in self.optimizer.state[p].items():
                found[f"optimizer {i} {name}"] = torch.as_tensor(value).clone()
        return found

    def resumed(self) -> "Training":
        """A new process that goes on with what this one has saved."""
        other = Training(self.setting, recorded=True)
        other.ensemble.load_state_dict(self.ensemble.state_dict())
        for mine, p in zip(other.params, self.params, strict=True):
            saved = self.optimizer.state[p].items()
            other.optimizer.state[mine].update({name: value.clone() for name, value in saved})
        return other


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if not torch.equal(found[n], t)] == []


@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_steps_give_the_bits_of_plain_ones(name: str) -> None:
    setting = SETTINGS[name]
    # two epochs where the loss depends on the epoch: it is recorded again in the second
    count, replayed = (11, 4) if name in EPOCHS_DIFFER else (7, 3)
    plain = Training(setting, recorded=False).steps(0, count)
    mine = Training(setting, recorded=True).steps(0, count)
    assert mine.said == []
    assert mine.recorded.counts["replayed"] == replayed
    assert mine.terms == plain.terms
    assert_same_bits(mine.state(), plain.state())


def test_an_epoch_that_changes_nothing_keeps_the_recording() -> None:
    mine = Training(SETTINGS["red released"], recorded=True).steps(0, EPOCH + 2)
    assert len(mine.recorder.tapes) == 1


@pytest.mark.parametrize("name", ["gal dverge", "ps-red"])
def test_a_resumed_training_goes_on_to_the_same_bits(name: str) -> None:
    whole, states = Training(SETTINGS[name], recorded=True), []
    for k in range(12):
        if k in (1, 3, 5, 7):
            states.append((k, whole.resumed()))
        whole.step(k)
    for stop, again in states:
        again.steps(stop, 12)
        assert again.recorded.counts["replayed"] == 12 - stop - 4
        assert_same_bits(again.state(), whole.state())


def test_a_loss_that_is_not_finite_leaves_the_weights_alone() -> None:
    mine = Training(SETTINGS["red fp32"], recorded=True).steps(0, 5)
    before = {name: p.detach().clone() for name, p in mine.ensemble.named_parameters()}
    with pytest.raises(TrainingError, match="non-finite loss in stage 'joint' at step 6"):
        mine.step(5, torch.full((SIZE, *SHAPE), math.nan))
    assert mine.recorded.counts["replayed"] == 2
    assert_same_bits(dict(mine.ensemble.named_parameters()), before)


# --- mistakes on purpose ----------------------------------------------------------------------

LossOf = Callable[[Ensemble, Batch, torch.Generator], Iterator[Loss]]


def weighted(inner: LossOf, weight: Callable[[Batch, torch.Generator, Loss], Any]) -> LossOf:
    def loss(ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        for part in inner(ensemble, batch, rng):
            yield Loss(part.total * weight(batch, rng, part), part.terms)

    return loss


def step_number(batch: Batch) -> int:
    """A number that the host knows and a recording would keep."""
    return round(1e6 * float(batch.x.sum())) % 7


HELD = torch.ones(())
MISTAKES: dict[str, tuple[Callable[[Batch, torch.Generator, Loss], Any], str]] = {
    "reads a number": (lambda b, g, part: 2.0 if part.total.item() > 0 else 1.0, "reads numbers"),
    "branches on a mask": (lambda b, g, part: 1 + b.x[b.x > 0.5].mean(), "reads numbers"),
    "draws by itself": (lambda b, g, part: torch.rand((), generator=g), "rng.drawn"),
    "draws from another": (lambda b, g, part: torch.rand((), generator=stream(3)), "draws random"),
    "makes a constant": (lambda b, g, part: torch.tensor(1.5), "undeclared"),
    "holds a tensor": (lambda b, g, part: HELD, "undeclared"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_loss_that_cannot_be_recorded_is_computed_and_one_line_says_why(mistake: str) -> None:
    weight, why = MISTAKES[mistake]
    setting = SETTINGS["at independent"]
    inner = Training(setting, recorded=False).stage
    stage = replace(inner, loss=weighted(inner.loss, weight))
    plain = Training(setting, recorded=False, stage=stage).steps(0, 6)
    mine = Training(setting, recorded=True, stage=stage).steps(0, 6)
    (line,) = mine.said
    assert line.startswith("steps of stage 'joint' are not replayed: ")
    assert why in line
    assert mine.recorded.counts["replayed"] == 0
    assert_same_bits(mine.state(), plain.state())


def test_a_number_of_the_host_that_changes_is_found_by_the_proof_step() -> None:
    setting, states = SETTINGS["at independent"], []
    for recorded in (False, True):
        taken = [0.0]
        inner = Training(setting, recorded=False).stage
        stage = replace(inner, loss=weighted(inner.loss, lambda b, g, part, t=taken: 1 + t[0]))  # type: ignore[misc]  # bound now
        mine = Training(setting, recorded=recorded, stage=stage)
        for k in range(6):
            taken[0] = 0.1 * k
            mine.step(k)
        states.append(mine.state())
    assert mine.said == [
        "steps of stage 'joint' are not replayed: a replayed step did not give the bits of the "
        "step itself"
    ]
    assert_same_bits(states[1], states[0])


def test_other_numbers_of_draws_are_refused() -> None:
    setting = SETTINGS["at independent"]
    inner, calls = Training(setting, recorded=False).stage, [0]

    def loss(ensemble: Ensemble, batch: Batch, rng: torch.Generator) -> Iterator[Loss]:
        calls[0] += 1
        for _ in range(calls[0]):
            ADVERSARY.craft(ensemble.member(0), batch.x, batch.y, rng)
        yield from inner.loss(ensemble, batch, rng)

    mine = Training(setting, recorded=True, stage=replace(inner, loss=loss)).steps(0, 4)
    assert "draws more numbers" in mine.said[0]


# --- whole runs -------------------------------------------------------------------------------


def small_run(method: str, **settings: Any) -> Run:
    return Run(
        data=DataConfig(spec="digits", images=80),
        ensemble={"name": "independent", "model": "digits-cnn", "num_members": 2, "width": 4},
        defence={"name": method, **settings},
        threat=ThreatConfig(eps=0.2),
        optim=ADAM,
        epochs=2,
        batch_size=16,
    )


QUICK = {"adversary": {"eps": 0.1, "steps": 1, "step_size": 0.5}}


@pytest.mark.parametrize(
    ("run", "stages"),
    [
        (small_run("red", **QUICK), 1),
        (small_run("barre", **QUICK, refit_images=8, refit_steps=1), 2),
    ],
)
def test_a_run_is_trained_to_the_same_bits(
    run: Run, stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders: list[TapeRecorder] = []

    def recorder_for(device: torch.device) -> TapeRecorder:
        recorders.append(TapeRecorder())
        return recorders[-1]

    monkeypatch.setattr(training, "recorder_for", recorder_for)
    plain, mine = (
        training.train(run, tmp_path / replay, quiet=True, replay=replay)
        for replay in ("off", "auto")
    )
    (recorder,) = recorders  # asked for with "auto" alone
    assert len(recorder.tapes) == stages
    assert_same_bits(mine.state_dict(), plain.state_dict())


def test_profiled_runs_are_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "recorder_for", lambda device: pytest.fail("recorded"))
    run = small_run("vanilla").model_copy(update={"epochs": 1})
    training.train(run, tmp_path / "run", quiet=True, profile=True)
    with pytest.raises(ConfigError, match="--replay must be auto or off"):
        training.train(run, tmp_path / "other", replay="on")
