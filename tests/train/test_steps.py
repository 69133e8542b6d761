"""A single step of every method: what it waits for, and what it does with numbers gone bad."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from redefense.config import OptimConfig
from redefense.defences import DEFENCES, Adversary, Stage
from redefense.ensembles import Ensemble
from redefense.ensembles.configs import HyperConfig, IndependentConfig
from redefense.errors import TrainingError
from redefense.rng import stream
from redefense.runtime.mesh import Mesh, Tally
from redefense.train.loop import take_step
from redefense.train.optim import make_optimizer
from redefense.types import Batch

STEPS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in DEFENCES),
    ("red", {"preset": "printed", "differentiate": "finite"}),
    ("red", {"preset": "released", "adversarial_training": True}),
    ("trs", {"preset": "printed"}),
    ("gal", {"differentiate": "finite"}),
    ("adp", {"adversarial_training": True}),
    ("dverge", {"adversarial_training": True}),
    ("at", {"variant": "independent"}),
    ("at", {"variant": "joint"}),
    ("mrboost", {"individual": False}),
]
QUICK: dict[str, Any] = {"steps": 2, "adversary": Adversary(steps=2)}


def step_of(stage: Stage, members: Ensemble, tally: Tally | None = None) -> dict[str, float]:
    """One step of the loop in the last stage of a method, on six images."""
    device = members.mixture.device
    x = torch.rand(6, 1, 8, 8, generator=stream(0, "x")).to(device)
    batch = Batch(x, torch.arange(6, device=device), torch.arange(6, device=device))
    params = [p for m in stage.members for p in members.parameters_of(m)]
    return take_step(
        members, stage, batch, make_optimizer(params, OptimConfig()), params, lr=0.1, clip=1.0,
        precision="fp32", total=6, rng=stream(0), first=False, tally=tally,
    )  # fmt: skip


def last_stage(name: str, settings: dict[str, Any], members: Ensemble) -> Stage:
    known = {field.name for field in fields(DEFENCES[name])}
    quick = {key: value for key, value in QUICK.items() if key in known}
    stage = DEFENCES[name](**quick, **settings).stages(members.num_members, 8)[-1]
    if stage.before is not None:
        stage.before(members)
    return stage


def digit_nets(*, hyper: bool = False) -> Ensemble:
    plain = IndependentConfig(model="digits-cnn", num_members=3, width=16)
    written = HyperConfig(
        model="digits-cnn", num_members=3, width=16, unit=16, embedding=4, hidden=4
    )
    return (written if hyper else plain).build(num_classes=10, shape=(1, 8, 8), seed=0)


class Unread(Tally):
    """Takes the log's place: the one thing that is read from the device."""

    def __call__(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        return dict.fromkeys(terms, 0.0)


@pytest.mark.parametrize(
    ("name", "settings", "hyper"), [*((*step, False) for step in STEPS), ("red", {}, True)]
)
def test_a_step_reads_nothing_from_the_device_but_its_log(
    name: str, settings: dict[str, Any], hyper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on the meta device no tensor has values: reading one, or branching on it, is an error there
    members = digit_nets(hyper=hyper)
    stage = last_stage(name, settings, members)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # unknown there
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    # barre asks once, before its step's first pass, who answers
    monkeypatch.setattr(members, "shares", lambda: [1 / 3] * 3)
    assert "total" in step_of(stage, members.to("meta"), Unread(Mesh()))


@pytest.mark.parametrize("name", DEFENCES)
def test_weights_that_are_not_finite_are_told_by_stage_and_step(name: str) -> None:
    members = digit_nets()
    stage = last_stage(name, {}, members)
    with torch.no_grad():
        members.parameters_of(2)[0].fill_(math.nan)
    before = {n: p.clone() for n, p in members.named_parameters()}
    with pytest.raises(TrainingError, match=f"stage '{stage.name}' at step 7: .*total = nan"):
        step_of(stage, members)
    for n, p in members.named_parameters():
        torch.testing.assert_close(p, before[n], rtol=0, atol=0, equal_nan=True)
