"""What every defence of the mapping promises to the training loop."""

import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from defence_tools import batch, ensemble
from redefense.config import DataConfig, OptimConfig, Run, choose, settings_of
from redefense.defences import DEFENCES, Adversary, Defence
from redefense.errors import Interrupted
from redefense.rng import stream
from redefense.train import loop as fit
from redefense.train.experiment import train

NAMES = list(DEFENCES)
MEMBERS = [2, 3, 8]
QUICK: dict[str, Any] = {
    "adversary": Adversary(steps=2), "steps": 2, "refit_images": 16, "refit_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_defence_says_in_one_line_what_it_does(name: str) -> None:
    summary = DEFENCES[name].summary
    assert 10 < len(summary) <= 100
    assert "\n" not in summary
    assert not summary.endswith(".")
    assert DEFENCES[name].__doc__


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_json(name: str) -> None:
    defence = DEFENCES[name]()
    settings = settings_of(DEFENCES, defence)
    assert choose(DEFENCES, settings, "defence") == defence


@pytest.mark.parametrize("num_members", MEMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_stages_share_the_epochs_and_train_every_member(name: str, num_members: int) -> None:
    for epochs in (8, 11, 200):
        stages = DEFENCES[name]().stages(num_members, epochs)
        assert sum(stage.epochs for stage in stages) == epochs
        assert min(stage.epochs for stage in stages) >= 1
        assert len({stage.name for stage in stages}) == len(stages)
        assert {m for stage in stages for m in stage.members} == set(range(num_members))


def quick(name: str) -> Defence:
    known = {field.name for field in fields(DEFENCES[name])}
    return DEFENCES[name](**{key: value for key, value in QUICK.items() if key in known})


@pytest.mark.parametrize("num_members", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_reaches_the_members_of_its_stage_and_nothing_else(
    name: str, num_members: int
) -> None:
    for stage in quick(name).stages(num_members, 8):
        members, data = ensemble(num_members, "digits-cnn"), batch()
        if stage.before is not None:
            stage.before(members)
        members.train_members(stage.members)
        state, images = torch.get_rng_state(), data.x.clone()
        modes = [module.training for module in members.modules()]
        buffers = {n: b.clone() for n, b in members.named_buffers()}
        for part in stage.loss(members, data, stream(0)):
            part.total.backward()
            assert all(not value.requires_grad for value in part.terms.values())
        for m in range(num_members):
            grads = [p.grad for p in members.parameters_of(m)]
            reached = [g is not None and bool(g.isfinite().all()) for g in grads]
            assert reached == [m in stage.members] * len(grads)
        untouched = [f"members.{m}." for m in range(num_members) if m not in stage.members]
        for key, buffer in members.named_buffers():
            if key.startswith(tuple(untouched)) or key == "mixture":
                assert torch.equal(buffer, buffers[key]), key
        assert all(p.requires_grad for p in members.parameters())
        assert [module.training for module in members.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(data.x, images)


@pytest.mark.parametrize("name", NAMES)
def test_equal_streams_give_equal_losses(name: str) -> None:
    defence = quick(name)

    def losses(seed: int) -> list[float]:
        members = ensemble(3, "digits-cnn").train()
        return [part.total.item() for part in defence.loss(members, batch(), stream(seed))]

    assert losses(0) == losses(0)


def tiny(defence: Defence) -> Run:
    """Two epochs of two steps on 64 digits, or two stages of one epoch."""
    return Run(
        data=DataConfig(spec="digits", images=64),
        ensemble={"name": "independent", "model": "digits-cnn", "num_members": 2, "width": 4},
        defence=settings_of(DEFENCES, defence),
        optim=OptimConfig(lr=0.05),
        epochs=2,
        batch_size=32,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_in_mid_stage_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny(quick(name))
    whole = train(run, tmp_path / "whole", quiet=True)
    step, taken = fit.take_step, list[int]()

    def stopping(*args: Any, **settings: Any) -> dict[str, float]:
        terms: dict[str, float] = step(*args, **settings)
        taken.append(settings["total"])
        if len(taken) in (1, 3):
            signal.raise_signal(signal.SIGINT)
        return terms

    monkeypatch.setattr(fit, "take_step", stopping)
    for resume in (False, True):
        with pytest.raises(Interrupted):
            train(run, tmp_path / "parts", resume=resume, quiet=True)
    parts = train(run, tmp_path / "parts", resume=True, quiet=True)
    assert taken == list(range(4))
    expected = whole.state_dict()
    for key, value in parts.state_dict().items():
        assert torch.equal(value, expected[key]), key
