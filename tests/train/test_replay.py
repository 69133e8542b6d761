"""Recorded training steps, on the tape that stands in for CUDA graphs: the bits of plain steps."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from redefense.config import DataConfig, OptimConfig, Run, ThreatConfig
from redefense.defences import DEFENCES
from redefense.ensembles import Ensemble
from redefense.errors import ConfigError, TrainingError
from redefense.rng import stream
from redefense.train import experiment as training
from redefense.types import Batch, Loss
from replay_tools import ADAM, ADVERSARY, EPOCH, EPOCHS_DIFFER, SETTINGS, SHAPE, SIZE, Training
from tape import TapeRecorder


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if not torch.equal(found[n], t)] == []


@pytest.mark.parametrize("name", SETTINGS)
def test_replayed_steps_give_the_bits_of_plain_ones(name: str) -> None:
    setting = SETTINGS[name]
    # two epochs where the loss depends on the epoch: it is recorded again in the second
    count, replayed = (10, 3) if name in EPOCHS_DIFFER else (6, 2)
    plain = Training(setting, recorded=False).steps(0, count)
    mine = Training(setting, recorded=True).steps(0, count)
    assert mine.said == []
    assert mine.recorded.counts["replayed"] == replayed
    assert mine.terms == plain.terms
    assert_same_bits(mine.state(), plain.state())


def test_an_epoch_that_changes_nothing_keeps_the_recording() -> None:
    mine = Training(SETTINGS["red released"], recorded=True).steps(0, EPOCH + 2)
    assert isinstance(mine.recorder, TapeRecorder)
    assert len(mine.recorder.tapes) == 1


def test_the_settings_cover_every_method_preset_and_option() -> None:
    for name, defence in DEFENCES.items():
        made = [setting.defence() for setting in SETTINGS.values() if setting.method == name]
        assert made, name
        for option in fields(defence):
            used = {getattr(one, option.name) for one in made if option.type in (str, bool)}
            named = {"preset", "variant", "adversarial_training", "individual"} & {option.name}
            assert not named or len(used) > 1, (name, option.name)
    optims = [setting.optim for setting in SETTINGS.values()]
    for key in ("name", "nesterov", "schedule", "clip", "momentum"):
        known = OptimConfig.model_fields[key].annotation
        wanted = len(get_args(known)) if get_origin(known) is Literal else 2
        assert len({getattr(optim, key) for optim in optims}) >= wanted, key


@pytest.mark.parametrize("name", ["gal", "ps-red", "dverge", "barre", "cosine"])
def test_a_resumed_training_goes_on_to_the_same_bits(name: str) -> None:
    whole, states = Training(SETTINGS[name], recorded=True), []
    for k in range(12):
        if k in (3, 7):
            states.append((k, whole.resumed()))
        whole.step(k)
    # the second epoch begins at step 6, and is recorded anew where epochs differ
    replayed = (3, 1) if name in EPOCHS_DIFFER else (5, 1)
    for (stop, again), count in zip(states, replayed, strict=True):
        again.steps(stop, 12)
        assert again.recorded.counts["replayed"] == count
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
        "steps of stage 'joint' are not replayed: a replayed step was not bit-identical to "
        "the direct step"
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
