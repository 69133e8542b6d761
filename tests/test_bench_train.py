"""The training benchmark: its baseline is the definition, its ratios are those of its seconds."""

import pytest
import torch

from redefense.bench.train import joint_step, run, table
from redefense.defences.base import Adversary
from redefense.defences.red import RED
from redefense.ensembles import Members
from redefense.kinds import IndependentKind
from redefense.rng import stream

WAYS = ["joint", "exact fp32", "exact bf16", "finite bf16"]


def test_ratios_are_those_of_the_seconds_of_a_single_round() -> None:
    result = run(models=["resnet8"], members=[2], batch=4, steps=1, rounds=1)
    (case,) = result["cases"]
    assert (case["model"], case["members"], case["batch"]) == ("resnet8", 2, 4)
    assert list(case["ways"]) == WAYS
    joint = case["ways"]["joint"]["seconds"]
    for name, way in case["ways"].items():
        forward = case["forward"]["bf16" if "bf16" in name else "fp32"]
        assert way["times_faster_than_joint"] * way["seconds"] == pytest.approx(joint)
        assert way["times_the_floor"] * 24 * 2 * forward == pytest.approx(way["seconds"])
        assert f"{way['seconds']:.3f}" in table(result)


def test_finished_cases_are_told_at_once() -> None:
    said: list[str] = []
    result = run(models=["linear"], members=[1, 2], batch=2, steps=1, rounds=1, tell=said.append)
    assert said == table(result).splitlines()[2:]


def test_the_joint_step_descends_the_definition_and_keeps_no_gradient_of_the_attack() -> None:
    members = _members()
    x, y = torch.rand(6, 3, 32, 32, generator=stream(0, "x")), torch.arange(6)
    red = RED(adversary=Adversary(eps=0.0, steps=2))  # the examples are the images themselves
    red.terms(members, x, y, x)["total"].backward()
    # clones: the attack adds to the gradients it finds
    expected = [p.grad.clone() for p in members.parameters() if p.grad is not None]
    optimizer = torch.optim.SGD(members.parameters(), lr=0.0)
    joint_step(members, red, x, y, optimizer, stream(0, "step"))
    for p, grad in zip(members.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def _members() -> Members:
    kind = IndependentKind(model="mlp", num_members=2, width=8)
    return kind.build(num_classes=10, shape=(3, 32, 32), seed=0)
